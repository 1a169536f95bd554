"""Rewards to advantages: the baseline of group-relative policy gradients."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor


class GroupStatistics(NamedTuple):
    """Per-group numbers, in ascending order of group id; float64 on the device of the rewards."""

    group_ids: Tensor  # (K,), int64
    sizes: Tensor  # (K,)
    means: Tensor  # (K,)
    stds: Tensor  # (K,); 0 for a group of one or of equal rewards
    zero_std_fraction: float  # share of groups that give no signal; high: raise the group size or filter prompts


def group_statistics(rewards: Tensor, group_ids: Tensor, ddof: int = 0, valid: Tensor | None = None) -> GroupStatistics:
    """Mean and std of the rewards of each group.

    Args:
        rewards: (N,), finite.
        group_ids: (N,), an integer type: the sampler's index of the prompt, not its text.
        ddof: 0 divides the squared deviations by the size, 1 by the size less one.
        valid: (N,) bool; others are left out, and groups without any. None: all.
    """
    if valid is not None:
        rewards, group_ids = rewards[_mask(valid, rewards)], group_ids[_mask(valid, rewards)]
    rewards, group_ids = _checked(rewards, group_ids, ddof)
    ids, inverse = group_ids.unique(return_inverse=True)
    sizes, means, stds, equal = _grouped(rewards, inverse, len(ids), ddof)
    return GroupStatistics(ids, sizes, means, stds, equal.double().mean().item())


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    std: Literal["group", "global"] = "group",
    ddof: int = 0,
    eps: float = 1e-4,
    mode: Literal["max", "add"] = "max",
    valid: Tensor | None = None,
) -> Tensor:
    """(reward - group mean) / std, (N,): computed in float64, returned in float32.

    A group whose rewards are all equal gives exactly 0, with either std. Advantages of a group sum to 0.
    Published settings differ: Flow-GRPO (arXiv:2505.05470) std "global", ddof 0, mode "add", eps 1e-4;
    DanceGRPO (arXiv:2505.07818) std "group", ddof 1, mode "add", eps 1e-8.

    Args:
        rewards: (N,), finite; gathered from all processes that share a group (and for "global", from all).
        group_ids: (N,), an integer type.
        std: of the sample's own group, or of all N rewards.
        ddof: as in `group_statistics`.
        eps: floor of the std.
        mode: "max" divides by max(std, eps), "add" by std + eps.
        valid: (N,) bool; the others, whose scoring failed, belong to no statistic and get exactly 0. None: all.
    """
    if valid is not None and not bool(valid.all()):
        rows, out = _mask(valid, rewards), torch.zeros(len(rewards), device=rewards.device)
        if rows.any():
            out[rows] = group_advantages(rewards[rows], group_ids[rows], std, ddof, eps, mode)
        return out
    if std not in ("group", "global"):
        raise ValueError(f"std: got {std!r}, expected 'group' or 'global'")
    if mode not in ("max", "add"):
        raise ValueError(f"mode: got {mode!r}, expected 'max' or 'add'")
    if not eps > 0:
        raise ValueError(f"eps: got {eps}, expected > 0")
    rewards, group_ids = _checked(rewards, group_ids, ddof)
    ids, inverse = group_ids.unique(return_inverse=True)
    _, means, stds, equal = _grouped(rewards, inverse, len(ids), ddof)
    spread = stds[inverse] if std == "group" else _grouped(rewards, torch.zeros_like(inverse), 1, ddof)[2]
    spread = spread.clamp(min=eps) if mode == "max" else spread + eps
    advantages = (rewards - means[inverse]) / spread
    # Subtracting a rounded mean leaves 1e-17, which a small std would blow up and which is not 0 to a mask.
    return torch.where(equal[inverse], torch.zeros_like(advantages), advantages).float()


def clip_advantages(advantages: Tensor, limit: float) -> Tensor:
    """Clamp to [-limit, limit]: after normalising, before any weight of a step."""
    if not limit > 0:
        raise ValueError(f"limit: got {limit}, expected > 0")
    return advantages.clamp(-limit, limit)


def _mask(valid: Tensor, rewards: Tensor) -> Tensor:
    if valid.dtype != torch.bool or valid.shape != rewards.shape:
        got = f"{valid.dtype} {tuple(valid.shape)}"
        raise ValueError(f"valid: got {got}, expected bool {tuple(rewards.shape)}, as rewards")
    return valid.to(rewards.device)


def _grouped(rewards: Tensor, inverse: Tensor, count: int, ddof: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sizes, means, stds and whether all rewards are equal, (K,) each."""
    zeros = rewards.new_zeros(count)
    sizes = zeros.index_add(0, inverse, torch.ones_like(rewards))
    means = zeros.index_add(0, inverse, rewards) / sizes
    squares = zeros.index_add(0, inverse, (rewards - means[inverse]) ** 2)
    highest = zeros.scatter_reduce(0, inverse, rewards, "amax", include_self=False)
    lowest = zeros.scatter_reduce(0, inverse, rewards, "amin", include_self=False)
    equal = highest == lowest
    stds = (squares / (sizes - ddof).clamp(min=1)).sqrt()
    return sizes, means, torch.where(equal, zeros, stds), equal


def _checked(rewards: Tensor, group_ids: Tensor, ddof: int) -> tuple[Tensor, Tensor]:
    if rewards.dim() != 1 or len(rewards) == 0:
        raise ValueError(f"rewards: got shape {tuple(rewards.shape)}, expected (N,)")
    if group_ids.shape != rewards.shape:
        raise ValueError(f"group_ids: got shape {tuple(group_ids.shape)}, expected {tuple(rewards.shape)}, as rewards")
    if group_ids.is_floating_point() or group_ids.dtype == torch.bool:
        raise ValueError(f"group_ids: got {group_ids.dtype}, expected an integer type (float32 merges ids above 2^24)")
    if ddof not in (0, 1):
        raise ValueError(f"ddof: got {ddof}, expected 0 or 1")
    rewards = rewards.detach().double()
    if not rewards.isfinite().all():
        raise ValueError(f"rewards: got {int((~rewards.isfinite()).sum())} not finite, expected all finite")
    return rewards, group_ids.to(rewards.device, torch.int64)
