"""How far scores agree with the truth: pairwise accuracy with ties, rank correlation, telling two apart."""

import numpy as np
from scipy import stats


def tie_calibrated_accuracy(truth: np.ndarray, scores: np.ndarray) -> tuple[float, float]:
    """Pairwise accuracy with tie calibration (Deutsch et al. 2023, "Ties Matter", arXiv:2305.14324).

    A pair of one group is right where truth and scores order it the same way, or both call it a tie; scores call a tie
    what differs by at most epsilon. Of all pairs (C agree, D do not, T_h are ties of the truth alone, T_m of the scores
    alone, T_hm of both)

        accuracy = (C + T_hm) / (C + D + T_h + T_m + T_hm)

    and epsilon is the one, among 0 and all differences that occur, that makes this greatest. As in the paper it is
    found on the same pairs, so a reward that knows nothing still has the share of ties, or half of what is no tie.

    Args:
        truth, scores: (G, n), G groups of n samples; only samples of a group are compared.

    Returns:
        accuracy in [0, 1], and the smallest epsilon that reaches it, in units of the scores.
    """
    order, difference = (_differences(values) for values in _checked(truth, scores))
    size = np.abs(difference)
    candidates = np.unique(np.append(size, 0.0))  # ascending
    by_size = np.argsort(size, kind="stable")
    tied = np.searchsorted(size[by_size], candidates, side="right")  # so many pairs are ties at each candidate
    right_as_tie = np.append(0, np.cumsum(order[by_size] == 0))
    right_apart = np.append(0, np.cumsum((order * difference > 0)[by_size]))
    right = right_as_tie[tied] + right_apart[-1] - right_apart[tied]
    best = int(right.argmax())
    return float(right[best] / len(order)), float(candidates[best])


def kendall_within(truth: np.ndarray, scores: np.ndarray) -> float:
    """Mean over groups of Kendall's tau-b, in [-1, 1]; NaN where no group has anything to order.

    Groups whose truth is all the same are left out. Where the scores are all the same and the truth is not, tau-b has
    no value and counts as 0: nothing was told.

    Args:
        truth, scores: (G, n).
    """
    values = []
    for known, given in zip(*_checked(truth, scores)):
        if np.ptp(known) > 0:
            values.append(float(stats.kendalltau(known, given).statistic) if np.ptp(given) > 0 else 0.0)
    return float(np.mean(values)) if values else float("nan")


def area_under_curve(labels: np.ndarray, scores: np.ndarray) -> float:
    """Probability that a sample with the label scores above one without it, ties as half (Mann-Whitney's U).

    Args:
        labels: (N,) bool, both values present.
        scores: (N,).
    """
    labels = _labels(labels)
    ranks = stats.rankdata(scores)
    positive = int(labels.sum())
    above = ranks[labels].sum() - positive * (positive + 1) / 2
    return float(above / (positive * (len(labels) - positive)))


def threshold_accuracy(labels: np.ndarray, scores: np.ndarray) -> float:
    """Share told right by "the score is at least a threshold", which is chosen on the other half of the samples.

    Halves are the samples at even and at odd places of each label. Of thresholds equally good the middle one is taken.
    """
    labels, scores = _labels(labels), np.asarray(scores, dtype=np.float64)
    half = np.zeros(len(labels), dtype=int)
    for value in (True, False):
        half[labels == value] = np.arange((labels == value).sum()) % 2
    right = 0
    for part in (0, 1):
        threshold = _best_threshold(labels[half != part], scores[half != part])
        right += int(((scores >= threshold) == labels)[half == part].sum())
    return right / len(labels)


def _best_threshold(labels: np.ndarray, scores: np.ndarray) -> float:
    levels = np.unique(scores)
    cuts = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
    right = ((scores[None] >= cuts[:, None]) == labels[None]).sum(1)
    best = np.flatnonzero(right == right.max())
    return float(cuts[best[len(best) // 2]])


def _labels(labels: np.ndarray) -> np.ndarray:
    labels = np.asarray(labels, dtype=bool)
    if labels.ndim != 1 or labels.all() or not labels.any():
        raise ValueError(f"labels: got {int(labels.sum())} of {labels.size} true, expected some true and some false")
    return labels


def _checked(truth: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    truth, scores = (np.asarray(values, dtype=np.float64) for values in (truth, scores))
    if truth.ndim != 2 or truth.shape[1] < 2 or scores.shape != truth.shape:
        raise ValueError(f"scores: got {scores.shape} for truth {truth.shape}, expected both (G, n) with n at least 2")
    return truth, scores


def _differences(values: np.ndarray) -> np.ndarray:
    """Of each two in a row, (G * n (n - 1) / 2,)."""
    first, second = np.triu_indices(values.shape[1], 1)
    return (values[:, first] - values[:, second]).ravel()
