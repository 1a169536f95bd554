"""Samples that could not be scored: what stands in for their scores."""

import math

import torch
from torch import Tensor

ON_FAIL = ("group_mean", "zero", "midpoint", "raise", "later")


def fill_invalid(
    scores: Tensor,
    valid: Tensor,
    group_ids: Tensor | None = None,
    on_fail: str = "group_mean",
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """Scores (N,) with those of failed samples replaced.

    By `on_fail`: "group_mean" the mean of the group's valid samples, which is a zero advantage (of all valid samples,
    where the group has none); "zero"; "midpoint" of the reward's range; "later": any number the reward
    might give, for a caller that looks at `valid` and has more samples to come (it never raises).

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
        if not math.isfinite(middle):
            raise ValueError(f"on_fail: got 'midpoint' for a reward of range {bounds}, expected a finite range")
        return torch.where(valid, scores, middle)
    if on_fail == "later" and not valid.any():
        middle = sum(bounds) / 2
        return torch.full_like(scores, middle if math.isfinite(middle) else min(max(0.0, bounds[0]), bounds[1]))
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
