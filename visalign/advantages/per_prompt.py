"""DDPO's baseline: the latest rewards of each prompt, kept from iteration to iteration."""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor


class PromptStatistics:
    """Rewards to advantages by the statistics of each sample's own prompt (DDPO, Black et al. 2023, arXiv:2305.13301).

    As the paper's code: a prompt's latest `size` rewards are kept, those just given among them; with `min_count` of
    them there, its samples get (reward - mean) / std of these, else of all rewards given now. So a prompt has a
    baseline without several images of it in one iteration; part of it is of earlier policies. Advantages of one call do
    not sum to 0 in general.

    Args:
        size: rewards kept a prompt, the oldest go first.
        min_count: from so many on a prompt's own statistics are used; None: `size`.
    """

    def __init__(self, size: int = 16, min_count: int | None = None) -> None:
        self.size, self.min_count = size, size if min_count is None else min_count
        if size < 2:
            raise ValueError(f"size: got {size}, expected >= 2 (one reward has no spread)")
        if not 2 <= self.min_count <= size:
            raise ValueError(f"min_count: got {min_count}, expected within 2 .. size ({size})")
        self._kept: dict[str, deque[float]] = {}

    def advantages(
        self,
        prompts: Sequence[str],
        rewards: Tensor,
        valid: Tensor | None = None,
        eps: float = 1e-4,
        mode: Literal["max", "add"] = "max",
    ) -> Tensor:
        """Remember rewards, then normalise them: (N,) to (N,), computed in float64, returned in float32.

        Args:
            prompts, rewards: N of each, of all processes, in an order that does not depend on their number.
            valid: (N,) bool; others are neither remembered nor counted, and get exactly 0. None: all.
            eps, mode: as in `group_advantages`; the paper's code: 1e-6, "add". Where all rewards looked at are equal
                the advantage is exactly 0.

        Raises:
            ValueError: shapes that do not go together, or a valid reward that is not finite.
        """
        if rewards.shape != (len(prompts),):
            raise ValueError(f"rewards: got shape {tuple(rewards.shape)}, expected ({len(prompts)},), one per prompt")
        counted = torch.ones(len(prompts), dtype=torch.bool) if valid is None else valid.cpu().bool()
        if counted.shape != rewards.shape:
            raise ValueError(f"valid: got shape {tuple(counted.shape)}, expected ({len(prompts)},), as rewards")
        values = rewards.detach().double().cpu()
        if not values[counted].isfinite().all():
            raise ValueError("rewards: got some not finite, expected all finite where valid")
        rows: dict[str, list[int]] = {}
        for row in counted.nonzero().flatten().tolist():
            rows.setdefault(prompts[row], []).append(row)
            self._kept.setdefault(prompts[row], deque(maxlen=self.size)).append(values[row].item())
        out = torch.zeros(len(prompts))
        for prompt, places in rows.items():
            own = torch.tensor(list(self._kept[prompt]), dtype=torch.float64)
            base = own if len(own) >= self.min_count else values[counted]
            out[places] = normalised(values[places], base, eps, mode)
        return out.to(rewards.device)

    def share_of_own(self, prompts: Sequence[str]) -> float:
        """The share of these that have a baseline of their own by now."""
        return sum(len(self._kept.get(p, ())) >= self.min_count for p in prompts) / max(1, len(prompts))

    def state_dict(self) -> dict[str, list[float]]:
        """The rewards kept, as JSON can hold them exactly."""
        return {prompt: list(kept) for prompt, kept in self._kept.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        self._kept = {prompt: deque(kept, maxlen=self.size) for prompt, kept in state.items()}


def normalised(rewards: Tensor, base: Tensor, eps: float = 1e-4, mode: Literal["max", "add"] = "max") -> Tensor:
    """(reward - mean of base) / std of base, ddof 0, (N,) float32; exactly 0 where `base` (M,) and they are all equal.

    `eps`, `mode` as in `group_advantages`.
    """
    if bool((base == base[0]).all() and (rewards == base[0]).all()):
        return torch.zeros(len(rewards))  # subtracting a rounded mean would leave 1e-17, which is not 0 to a mask
    spread = base.std(correction=0)
    return ((rewards - base.mean()) / (spread.clamp(min=eps) if mode == "max" else spread + eps)).float()
