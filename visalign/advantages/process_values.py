"""Values of single denoising steps: VGPO's dense values and dual advantages, TP-GRPO's turning points.

Rewards here are (T, N): row i belongs to the state after step i, so the last row is the finished image's.
"""

from typing import Any

import torch
from torch import Tensor

from .group import group_advantages


def process_values(instant_rewards: Tensor, discount: float) -> Tensor:
    """VGPO's action values Q_i = sum_{j >= 0} discount^j R_{i+j} (arXiv:2512.12387, eq. 10), (T, N) in float64.

    Each sum runs along a sample's own trajectory, from step i to the image. The equation is quoted in public reviews;
    that the discount runs towards the image is our reconstruction, and its value is unknown.

    Args:
        instant_rewards: (T, N), the reward of the one-step projection of the state after each step (eq. 9). Not
            negative, or the weights made of them mean nothing: see `shift_rewards`.
        discount: in [0, 1]; 0 leaves each step its instant reward.
    """
    _check(instant_rewards, "instant_rewards")
    if not 0 <= discount <= 1:
        raise ValueError(f"discount: got {discount}, expected within [0, 1]")
    rewards = instant_rewards.detach().double()
    values = torch.empty_like(rewards)
    after = torch.zeros_like(rewards[0])
    for i in reversed(range(len(rewards))):
        after = rewards[i] + discount * after
        values[i] = after
    return values


def shift_rewards(rewards: Tensor, lowest: float) -> tuple[Tensor, float]:
    """Rewards less their running minimum, where that is negative; returns them and the new running minimum.

    VGPO assumes rewards >= 0. Rewards that never were negative are left as they are, for a constant matters here.

    Args:
        rewards: any shape, finite.
        lowest: the running minimum so far; 0 at the start.
    """
    lowest = min(lowest, 0.0, float(rewards.min()))
    return rewards - lowest, lowest


def temporal_weights(values: Tensor, eps: float = 1e-6, limit: float = 5.0) -> Tensor:
    """VGPO's weight of a step, Q_i / (mean over the trajectory's steps + eps), clamped to [0, limit] (eq. 11), (T, N).

    Of mean 1 over the steps where nothing is clamped. The clamp is ours: means near 0 make the quotient explode.

    Args:
        values: (T, N), from `process_values`.
        eps: > 0.
        limit: >= 1.
    """
    _check(values, "values")
    if not eps > 0:
        raise ValueError(f"eps: got {eps}, expected > 0")
    if not limit >= 1:
        raise ValueError(f"limit: got {limit}, expected >= 1")
    return (values / (values.mean(0) + eps)).clamp(0, limit)


def dual_advantages(
    values: Tensor,
    group_ids: Tensor,
    absolute: float = 0.0,
    horizon: int = 5,
    std: str = "group",
    eps: float = 1e-4,
    valid: Tensor | None = None,
) -> Tensor:
    """VGPO's advantages before the temporal weight, a relative and an absolute term (eqs. 12 and 13), (T, N) float32.

    (Q_i - group mean) / max(std, eps) + absolute * Q_i, the second for the first `horizon` steps only. A group of equal
    values has the relative term exactly 0; the absolute one goes on pushing towards high values.

    Reconstructed: of the source are a mixture by a weight alpha = absolute * std of the group (appendix), and the
    horizon of 5. With [(1 + alpha) Q - mean] / std the absolute term is alpha Q / std = absolute * Q for every std; it
    is computed so, which is also the limit at std 0. The value of `absolute` is unknown.

    Args:
        values: (T, N), from `process_values`.
        group_ids: (N,), an integer type.
        absolute: k >= 0; 0 leaves Flow-GRPO's advantage of each step.
        horizon: steps from the first that have the absolute term.
        std, eps: as in `group_advantages`, over the samples of one step; ddof 0.
        valid: (N,) bool; the others get 0 and are in no statistic. None: all.
    """
    _check(values, "values")
    if not absolute >= 0:
        raise ValueError(f"absolute: got {absolute}, expected >= 0")
    if horizon < 0:
        raise ValueError(f"horizon: got {horizon}, expected >= 0")
    given: dict[str, Any] = {"std": std, "eps": eps, "valid": valid}
    relative = torch.stack([group_advantages(row, group_ids, **given) for row in values])
    values = values if valid is None else values * valid
    early = (torch.arange(len(values), device=values.device) < horizon).to(values.dtype)
    return relative + (absolute * early[:, None] * values).float()


def turning_points(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """TP-GRPO's increments and turning points (arXiv:2602.06422), (n, N) each: float64, and bool.

    d_i = R_i - R_{i-1}, and s_i = sign(d_i) sign(R_n - R_0). Step i > 1 is a turning point where s_{i-1} < 0 < s_i:
    the first step that goes the whole trajectory's way after one against it; step 1 where s_1 > 0.

    Args:
        rewards: (n + 1, N); row i is of the image that the ODE makes after the first i stochastic steps.
    """
    _check(rewards, "rewards")
    if len(rewards) < 2:
        raise ValueError(f"rewards: got {len(rewards)} rows, expected at least 2, without and with a stochastic step")
    rewards = rewards.detach().double()
    steps = rewards.diff(dim=0)
    along = steps.sign() * (rewards[-1] - rewards[0]).sign()
    before = torch.cat([-torch.ones_like(along[:1]), along[:-1]])
    return steps, (before < 0) & (along > 0)


def turning_point_rewards(rewards: Tensor, bonus: float = 1.0) -> Tensor:
    """TP-GRPO's reward of each stochastic step in the released configuration, (n, N): R_n - R_0 + bonus * turning * d.

    To be normalised by prompt and step. The paper's text has d_i, with a long-term reward at turning points, instead.

    Args:
        rewards: (n + 1, N), as in `turning_points`.
    """
    steps, turning = turning_points(rewards)
    rewards = rewards.detach().double()
    return (rewards[-1] - rewards[0]).expand_as(steps) + bonus * turning * steps


def _check(rewards: Tensor, name: str) -> None:
    if rewards.dim() != 2 or rewards.numel() == 0:
        raise ValueError(f"{name}: got shape {tuple(rewards.shape)}, expected (steps, samples)")
    if not bool(rewards.isfinite().all()):
        raise ValueError(f"{name}: got {int((~rewards.isfinite()).sum())} not finite, expected all finite")
