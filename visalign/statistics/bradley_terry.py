"""What people's choices between two pictures say: of the models that drew them, and of rewards."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, log_expit

Z = 1.959964  # of a 95 % interval
HOPELESS = 15.0  # apart in log-odds, which no comparisons show: the likelihood has no maximum


@dataclass(frozen=True)
class Strengths:
    """Bradley-Terry strengths of M competitors; i is preferred to j with probability sigmoid(values[i] - values[j]).

    Attributes:
        values: (M,), of mean 0.
        low, high: (M,), 95 % intervals.
        games: (M,), comparisons that each took part in.
    """

    values: np.ndarray
    low: np.ndarray
    high: np.ndarray
    games: np.ndarray


def bradley_terry(
    first: Sequence[int],
    second: Sequence[int],
    outcomes: Sequence[float],
    count: int,
    prior: float = 2.0,
    virtual_games: float = 0.0,
) -> Strengths:
    """The strengths under which these comparisons are likeliest (Bradley and Terry 1952), with a weak prior.

    A tie counts as half a win of each. The prior keeps one who never lost finite: a Gaussian of mean 0 on every
    strength, or as many wins as defeats against an opponent of strength 0 (which then is the zero of the strengths;
    else they are of mean 0). Intervals are of the Gaussian with the posterior's curvature at its top.

    Args:
        first, second: (N,), the two competitors of each comparison, in 0 .. count - 1.
        outcomes: (N,), 1 where the first is preferred, 0 the second, 0.5 neither.
        prior: standard deviation, in units of log-odds; infinite: no Gaussian.
        virtual_games: won, and as many lost, by everybody against strength 0.

    Raises:
        ValueError: lengths that differ, a competitor or outcome out of range, someone compared with himself; or
            no prior of either kind where somebody won or lost all comparisons.
    """
    a, b, won = np.asarray(first, np.int64), np.asarray(second, np.int64), np.asarray(outcomes, float)
    if not len(a) == len(b) == len(won):
        raise ValueError(f"outcomes: got {len(won)} for {len(a)} and {len(b)} competitors, expected as many")
    if count < 1 or prior <= 0 or virtual_games < 0:
        raise ValueError(f"count, prior: got {count}, {prior}, {virtual_games}, expected >= 1, > 0, >= 0")
    for name, places in (("first", a), ("second", b)):
        if len(places) and not (places.min() >= 0 and places.max() < count):
            raise ValueError(f"{name}: got {places.min()} .. {places.max()}, expected within 0 .. {count - 1}")
    if (a == b).any():
        raise ValueError(f"second: got {a[a == b][0]}, which is first too, expected another one")
    if not ((won >= 0) & (won <= 1)).all():
        raise ValueError("outcomes: got one outside [0, 1], expected 1, 0 or 0.5")
    sides = np.zeros((len(a), count))
    sides[np.arange(len(a)), a], sides[np.arange(len(a)), b] = 1.0, -1.0

    def loss(strengths: np.ndarray) -> tuple[float, np.ndarray]:
        gap = sides @ strengths
        misfit = -(won * log_expit(gap) + (1 - won) * log_expit(-gap)).sum()
        misfit -= virtual_games * (log_expit(strengths) + log_expit(-strengths)).sum()
        slope = sides.T @ (expit(gap) - won) + strengths / prior**2 + virtual_games * (2 * expit(strengths) - 1)
        return float(misfit + (strengths**2).sum() / (2 * prior**2)), slope

    raw = minimize(loss, np.zeros(count), jac=True, method="BFGS", options={"gtol": 1e-8}).x
    values = raw if virtual_games else raw - raw.mean()
    if np.ptp(values) > HOPELESS and not virtual_games and np.isinf(prior):
        raise ValueError(f"prior: got {prior} where somebody won or lost all comparisons, expected a finite one")
    chance, own = expit(sides @ values), expit(values)
    curvature = (sides * (chance * (1 - chance))[:, None]).T @ sides
    curvature += np.diag(1 / prior**2 + 2 * virtual_games * own * (1 - own))
    centred = np.eye(count) - 1 / count
    spread = Z * np.sqrt(np.diag(centred @ np.linalg.pinv(curvature, hermitian=True) @ centred))
    games = np.bincount(np.concatenate([a, b]), minlength=count)
    return Strengths(values, values - spread, values + spread, games)


def agreement(preferred: Sequence[bool], margins: Sequence[float]) -> tuple[float, float, float]:
    """How often a score prefers the picture that people preferred: the share, and its 95 % interval (Wilson's).

    Args:
        preferred: (N,), whether the first picture of each pair was preferred; pairs without a winner are left out.
        margins: (N,), the score of the first picture less that of the second; 0 counts as half right.

    Returns:
        The share in [0, 1] and the interval's ends; (nan, 0, 1) without any pair.

    Raises:
        ValueError: lengths that differ, or a margin that is no number.
    """
    chosen, gap = np.asarray(preferred, bool), np.asarray(margins, float)
    if len(chosen) != len(gap):
        raise ValueError(f"margins: got {len(gap)}, expected {len(chosen)}, one per pair")
    if not np.isfinite(gap).all():
        raise ValueError("margins: got one that is not finite, expected numbers")
    n = len(gap)
    if n == 0:
        return float("nan"), 0.0, 1.0
    share = float(np.where(gap == 0, 0.5, (gap > 0) == chosen).mean())
    middle = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * np.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return share, max(0.0, float(middle - half)), min(1.0, float(middle + half))
