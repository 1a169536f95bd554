"""What a reward gives back: scores, and where it has them criteria, reasons, doubts and failures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .base import RewardError, as_scores

ON_FAIL = ("group_mean", "zero", "midpoint", "raise")


@dataclass(frozen=True)
class RewardOutput:
    """Scores of N samples. A reward may return this, or just its scores.

    A sample that could not be scored (an unreadable answer, a server that gave up on it) has `valid` False; its score
    is not looked at. Only a NaN where `valid` is True is an error.
    """

    scores: Tensor  # (N,), raw, higher is better
    criteria: Mapping[str, Tensor] = field(default_factory=dict)  # (N,) each; NaN where one does not apply
    rationale: Sequence[str | None] | None = None  # N reasons in words
    valid: Tensor | None = None  # (N,) bool; None: all
    uncertainty: Tensor | None = None  # (N,), >= 0, in the scores' unit unless the reward says otherwise
    extra: Mapping[str, Any] = field(default_factory=dict)  # whatever else, e.g. lists of N

    @property
    def is_valid(self) -> Tensor:
        """(N,) bool, on the CPU."""
        return torch.ones(len(self.scores), dtype=torch.bool) if self.valid is None else self.valid.cpu()


def as_output(result: Any, name: str, prompts: Sequence[str]) -> RewardOutput:
    """What a reward returned, checked: (N,) float32 scores and as many of everything that comes with them.

    Raises:
        RewardError: wrong lengths or types. Values are not looked at.
    """
    if not isinstance(result, RewardOutput):
        return RewardOutput(as_scores(result, name, prompts))
    n = len(prompts)
    criteria = {key: as_scores(value, f"{name}.{key}", prompts) for key, value in result.criteria.items()}
    doubt = None if result.uncertainty is None else as_scores(result.uncertainty, f"{name}.uncertainty", prompts)
    valid = result.valid
    if valid is not None:
        valid = torch.as_tensor(valid)
        if valid.dtype != torch.bool or valid.shape != (n,):
            raise RewardError(name, f"got valid {valid.dtype} {tuple(valid.shape)}, expected bool ({n},)")
    if result.rationale is not None and len(result.rationale) != n:
        raise RewardError(name, f"got {len(result.rationale)} rationales for {n} images, expected {n}")
    scores = as_scores(result.scores, name, prompts)
    return RewardOutput(scores, criteria, result.rationale, valid, doubt, result.extra)


def fill_invalid(
    scores: Tensor,
    valid: Tensor,
    group_ids: Tensor | None = None,
    on_fail: str = "group_mean",
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """Scores (N,) with those of failed samples replaced.

    By `on_fail`: "group_mean" the mean of the group's valid samples, which is a zero advantage (of all valid samples,
    where the group has none); "zero"; "midpoint" of the reward's range.

    Args:
        group_ids: (N,) int64; None: all are one group.

    Raises:
        ValueError: an unknown `on_fail`, "raise" with a failed sample, no valid sample at all, or "midpoint" of an
            infinite range.
    """
    if on_fail not in ON_FAIL:
        raise ValueError(f"on_fail: got {on_fail!r}, expected one of {ON_FAIL}")
    if bool(valid.all()):
        return scores
    failed = int((~valid).sum())
    if on_fail == "raise":
        raise ValueError(f"{failed} of {len(scores)} samples could not be scored")
    if on_fail == "zero":
        return torch.where(valid, scores, 0.0)
    if on_fail == "midpoint":
        middle = sum(bounds) / 2
        if not torch.tensor(middle).isfinite():
            raise ValueError(f"on_fail: got 'midpoint' for a reward of range {bounds}, expected a finite range")
        return torch.where(valid, scores, middle)
    if not valid.any():
        raise ValueError(f"none of {len(scores)} samples could be scored")
    ids = torch.zeros(len(scores), dtype=torch.long) if group_ids is None else group_ids.cpu()
    places = ids.unique(return_inverse=True)[1]
    number = int(places.max()) + 1
    known = torch.where(valid, scores, 0.0).double()
    sums = torch.zeros(number, dtype=torch.float64).index_add(0, places, known)
    counts = torch.zeros(number, dtype=torch.float64).index_add(0, places, valid.double())
    means = torch.where(counts > 0, sums / counts.clamp(min=1), known.sum() / valid.sum())
    return torch.where(valid, scores, means[places].to(scores.dtype))
