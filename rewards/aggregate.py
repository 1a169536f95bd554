"""Many rewards to one: pure functions of scores (K, N), K rewards of N samples, finite.

Two families. *Scores* are combined first and normalised by the trainer afterwards; these functions keep the gradient,
and all but `log_tamed_sum`, which looks at all samples at once, treat each sample by itself. *Advantages* normalise
each reward first, so that one of small spread does not vanish beside a wide one; they cut the gradient and need each
group whole, from all processes. With one reward every function weighs it by 1, and none depends on their order.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from visalign.advantages.group import group_advantages


def weighted_sum(scores: Tensor, weights: Tensor) -> Tensor:
    """sum_k w_k r_k, (N,)."""
    scores, weights = _checked(scores, weights)
    total = torch.zeros_like(scores[0])
    for weight, row in zip(weights.tolist(), scores):  # one after the other: the rounding of a plain sum
        total = total + weight * row
    return total


def log_tamed_sum(
    scores: Tensor,
    weights: Tensor,
    threshold: float | Literal["mean", "median"] = "mean",
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The weighted sum after log(1 + r) of the rewards that vary too much (PaCo-GRPO, arXiv:2512.04784).

    Reward k is tamed where its variation h_k = std_k / (mean_k + 1e-6), population std, over all N samples, exceeds
    the threshold, which is a number or the mean or median of all h.

    Args:
        valid: (K, N) bool: of these samples h_k is; None: of all.

    Returns:
        The sum (N,), and which rewards were tamed, (K,) bool.

    Raises:
        ValueError: a reward to be tamed has a score of -1 or less.
    """
    scores, weights = _checked(scores, weights)
    flat = scores.detach().double()
    rows = flat if valid is None else [row[there] if there.any() else row for row, there in zip(flat, valid)]
    variation = torch.stack([row.std(correction=0) / (row.mean() + 1e-6) for row in rows])
    if threshold == "mean":
        limit = variation.mean()
    elif threshold == "median":
        limit = variation.quantile(0.5)
    elif isinstance(threshold, str):
        raise ValueError(f"threshold: got {threshold!r}, expected a number, 'mean' or 'median'")
    else:
        limit = variation.new_tensor(float(threshold))
    tamed = variation > limit
    if (flat[tamed] <= -1).any():
        k = int((tamed & (flat.amin(dim=1) <= -1)).nonzero()[0])
        raise ValueError(f"scores: got {flat[k].min().item():.4g} of reward {k}, expected > -1 to take log(1 + score)")
    inside = torch.where(tamed[:, None], scores, 0.0)  # no infinite gradient from the branch not taken
    return weighted_sum(torch.where(tamed[:, None], inside.log1p(), scores), weights), tamed


def harmonic_mean(scores: Tensor, weights: Tensor, eps: float = 1e-8) -> Tensor:
    """(sum_k w_k) / sum_k w_k / (r_k + eps), (N,): near the smallest score. Scores and weights at least 0."""
    scores, weights = _checked(scores, weights, positive=True)
    return weights.sum() / (weights[:, None] / (scores + eps)).sum(dim=0)


def geometric_mean(scores: Tensor, weights: Tensor, eps: float = 1e-8) -> Tensor:
    """exp(sum_k w_k log(r_k + eps) / sum_k w_k), (N,). Scores and weights at least 0."""
    scores, weights = _checked(scores, weights, positive=True)
    return ((weights[:, None] * (scores + eps).log()).sum(dim=0) / weights.sum()).exp()


def log_sigmoid(scores: Tensor, reference: Tensor | float, scale: float = 1.0) -> Tensor:
    """log sigmoid(scale (r - r_ref)), in (-inf, 0): Wang et al. 2024, "Transforming and Combining Rewards".

    Linear below the reference, flat above it. The sum over rewards is the log-probability that all are good (AND).

    Args:
        reference: as `reference_quantile` gives it; any shape that fits the scores'.
        scale: 1 in the paper.
    """
    return F.logsigmoid(scale * (scores - reference))


def reference_quantile(samples: Tensor, quantile: float = 0.85) -> Tensor:
    """The r_ref of `log_sigmoid`: a quantile of the normal fitted to rewards of reference samples, over the last dim.

    mean + z (std + 1e-5) with the unbiased std; that it is unbiased is reconstructed.
    """
    if not 0 < quantile < 1:
        raise ValueError(f"quantile: got {quantile}, expected between 0 and 1")
    if samples.shape[-1] < 2:
        raise ValueError(f"samples: got {samples.shape[-1]}, expected at least 2")
    z = torch.special.ndtri(torch.tensor(quantile, dtype=torch.float64)).item()
    return samples.mean(dim=-1) + z * (samples.std(dim=-1) + 1e-5)


def preference_as_reward(scores: Tensor, references: Tensor, k: float = 1.0) -> Tensor:
    """(1/M) sum_m sigmoid(k (r - r_m)), in (0, 1): PAR, Fu et al. 2025, arXiv:2502.18770.

    Bounded, and steepest near the rewards of the reference policy's samples.

    Args:
        scores: any shape.
        references: (..., M), M rewards of reference samples (10 in the paper) of the same prompt, or (M,) for all.
    """
    return (k * (scores[..., None] - references)).sigmoid().mean(dim=-1)


def ensemble_mean(scores: Tensor, weights: Tensor) -> Tensor:
    """sum_k w_k r_k / sum_k w_k, (N,). For judges of unlike units normalise each by its own reference first."""
    scores, weights = _checked(scores, weights)
    if weights.sum() == 0:
        raise ValueError(f"weights: got {weights.tolist()}, expected a sum other than 0")
    return weighted_sum(scores, weights) / weights.sum()


def worst_case(scores: Tensor) -> Tensor:
    """min_k r_k, (N,): WCO, Coste et al. 2023, arXiv:2310.02743."""
    return _checked(scores)[0].amin(dim=0)


def mean_minus_variance(scores: Tensor, penalty: float = 0.5) -> Tensor:
    """mean_k r_k - penalty * var_k r_k, (N,), unbiased variance: UWO, Coste et al. 2023, arXiv:2310.02743.

    Published code divides by K in best-of-n and by K - 1 in RL; this is the latter. One reward has no variance.
    """
    scores = _checked(scores)[0]
    if not penalty >= 0:
        raise ValueError(f"penalty: got {penalty}, expected >= 0")
    return scores.mean(dim=0) - (penalty * scores.var(dim=0) if len(scores) > 1 else 0)


def discount(scores: Tensor, uncertainty: Tensor) -> Tensor:
    """r exp(-u): doubtful scores count less. It shrinks towards 0, so it wants scores of at least 0."""
    return scores * (-uncertainty).exp()


def lower_bound(scores: Tensor, uncertainty: Tensor, kappa: float = 1.0) -> Tensor:
    """mu - kappa sigma, for rewards that give a mean and a standard deviation."""
    return scores - kappa * uncertainty


def gated(primary: Tensor, verifiers: Tensor, thresholds: Tensor) -> Tensor:
    """The primary score (N,) where each verifier (J, N) reaches its threshold (J,), else 0 (own design)."""
    return torch.where((verifiers >= thresholds[:, None]).all(dim=0), primary, torch.zeros_like(primary))


def constrained(primary: Tensor, secondary: Tensor, thresholds: Tensor, multipliers: Tensor) -> Tensor:
    """(r + sum_j m_j (s_j - c_j)) / (1 + sum_j m_j), (N,): the Lagrangian of max r subject to mean s_j >= c_j.

    The divisor keeps the scale as multipliers grow; it does not move the optimum. Multipliers come from
    `update_multipliers`, starting at 0, which is the primary reward alone. Own design.

    Args:
        primary: r, (N,).
        secondary: s, (J, N).
        thresholds, multipliers: c and m, (J,).
    """
    return (primary + (multipliers[:, None] * (secondary - thresholds[:, None])).sum(dim=0)) / (1 + multipliers.sum())


def update_multipliers(multipliers: Tensor, secondary: Tensor, thresholds: Tensor, rate: float) -> Tensor:
    """One step of dual ascent, (J,): up while a constraint is broken on average, down to 0 while it holds."""
    return (multipliers + rate * (thresholds - secondary.detach().mean(dim=1))).clamp(min=0)


def normalised_sum(
    scores: Tensor,
    weights: Tensor,
    group_ids: Tensor,
    std: Literal["group", "global"] = "group",
    eps: float = 1e-4,
    mode: Literal["max", "add"] = "add",
    valid: Tensor | None = None,
) -> Tensor:
    """sum_k w_k A_k, (N,) advantages, each A_k as `group_advantages` gives it; weights do not even out units here.

    With mode "add" a reward's scale matters as far as eps is not small against its std; with "max" not at all above it.
    `valid`, (K, N) bool: an A_k is 0 where False.
    """
    scores, weights = _checked(scores, weights)
    there = [None] * len(scores) if valid is None else list(valid)
    rows = [group_advantages(r, group_ids, std, 0, eps, mode, v) for r, v in zip(scores, there)]
    return weighted_sum(torch.stack(rows), weights)


def correlation_weights(scores: Tensor, temperature: float = 0.5) -> Tensor:
    """Weights (K,) of K concepts from their rewards (K, G) in one group: softmax_k((1 - b_k) / temperature) (CMO).

    b_k is concept k's mean Pearson correlation with the others, so those in conflict weigh more. A concept whose
    rewards are all alike (std up to 1e-6) has b_k = 1.
    """
    scores = scores.detach().double()
    if not temperature > 0:
        raise ValueError(f"temperature: got {temperature}, expected > 0")
    centred = scores - scores.mean(dim=1, keepdim=True)
    norms = centred.norm(dim=1)
    flat = scores.std(dim=1, correction=0) <= 1e-6
    correlation = (centred @ centred.T / (norms[:, None] * norms)).nan_to_num(0.0)
    agreement = (correlation.sum(dim=1) - 1) / max(len(scores) - 1, 1)
    return ((1 - torch.where(flat, 1.0, agreement)) / temperature).softmax(dim=0)


def correlation_weighted(
    scores: Tensor, group_ids: Tensor, temperature: float = 0.5, valid: Tensor | None = None
) -> Tensor:
    """sum_k w_k A_k with `correlation_weights` of each group, then standardised over all N: (N,) advantages (CMO).

    A_k = (r_k - mean) / sqrt(var + 1e-8) in the group, population variance. In a group with a missing entry the
    weights are 1 on what is there, as published; such a sum is up to K times larger than the weighted mean of others.

    Args:
        scores: (K, N), of all samples; the last step needs them all.
        group_ids: (N,), an integer type.
        valid: (K, N) bool, False where an entry is missing; None: none is.
    """
    scores = _checked(scores, group_ids=group_ids)[0].detach().double()
    valid = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
    if valid.shape != scores.shape:
        raise ValueError(f"valid: got shape {tuple(valid.shape)}, expected {tuple(scores.shape)}, as scores")
    combined = torch.zeros_like(scores[0])
    for number in group_ids.unique():
        here = group_ids == number
        rewards, there = scores[:, here], valid[:, here].double()
        counts = there.sum(dim=1, keepdim=True).clamp(min=1)
        rewards = torch.where(there > 0, rewards, 0.0)  # what stands in for a missing entry may be NaN
        centred = (rewards - rewards.sum(dim=1, keepdim=True) / counts) * there
        advantages = centred / ((centred**2).sum(dim=1, keepdim=True) / counts + 1e-8).sqrt()
        weights = correlation_weights(rewards, temperature) if there.all() else torch.ones(len(scores)).to(rewards)
        combined[here] = (weights[:, None] * advantages).sum(dim=0)
    return ((combined - combined.mean()) / (combined.std(correction=0) + 1e-8)).float()


def _checked(
    scores: Tensor, weights: Tensor | None = None, group_ids: Tensor | None = None, positive: bool = False
) -> tuple[Tensor, Tensor]:
    if scores.ndim != 2 or not scores.numel() or not scores.is_floating_point():
        raise ValueError(f"scores: got {scores.dtype} {tuple(scores.shape)}, expected floats (K, N), K, N >= 1")
    weights = scores.new_ones(len(scores)) if weights is None else weights
    if weights.shape != scores.shape[:1]:
        raise ValueError(f"weights: got shape {tuple(weights.shape)}, expected ({len(scores)},), one per reward")
    if group_ids is not None and (group_ids.shape != scores.shape[1:] or group_ids.is_floating_point()):
        got = f"{group_ids.dtype} {tuple(group_ids.shape)}"
        raise ValueError(f"group_ids: got {got}, expected integers ({scores.shape[1]},)")
    if positive and (weights.min() < 0 or weights.sum() <= 0):
        raise ValueError(f"weights: got {weights.tolist()}, expected none below 0 and a sum above 0")
    if positive and scores.min() < 0:
        raise ValueError(f"scores: got {scores.min().item():.4g}, expected >= 0 for this mean; transform them first")
    return scores, weights
