"""How several rewards become one: the combiners of `visalign.rewards.aggregate` by name, with their options checked."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from visalign.names import unknown_name

from . import aggregate


def _gated(scores: Tensor, weights: Tensor, thresholds: Tensor) -> Tensor:
    return aggregate.gated(aggregate.weighted_sum(scores, weights), scores, thresholds)


# Each is called with (scores, weights or group_ids or neither, options), by the names of its own arguments.
COMBINERS: dict[str, Callable[..., Any]] = {
    "weighted": aggregate.weighted_sum,
    "log_tamed": aggregate.log_tamed_sum,
    "harmonic": aggregate.harmonic_mean,
    "geometric": aggregate.geometric_mean,
    "mean": aggregate.ensemble_mean,
    "min": aggregate.worst_case,
    "mean_minus_variance": aggregate.mean_minus_variance,
    "gated": _gated,
    "normalised": aggregate.normalised_sum,
    "correlation": aggregate.correlation_weighted,
}
ADVANTAGES = ("normalised", "correlation")  # give advantages, not scores
GIVEN = ("scores", "weights", "group_ids", "valid")  # arguments that are no options


@dataclass(frozen=True)
class Combine:
    """One of COMBINERS with its options.

    "gated" takes `gates`, {label: threshold}: the weighted sum, or 0 where one of these rewards stays below.
    """

    name: str = "weighted"
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def output_kind(self) -> str:
        """ "scores", or "advantages" of samples within their groups."""
        return "advantages" if self.name in ADVANTAGES else "scores"

    @property
    def kind(self) -> str:
        """What it must see at once, as a reward's kind says it: each sample, whole groups, or all samples."""
        if self.name in ("log_tamed", "correlation") or self.options.get("std") == "global":
            return "setwise"
        return "groupwise" if self.name == "normalised" else "pointwise"

    @property
    def gates(self) -> Mapping[str, float]:
        return self.options.get("gates", {})

    def __call__(
        self,
        scores: Tensor,
        weights: Sequence[float],
        labels: Sequence[str],
        group_ids: Tensor,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Scores (K, N) of the rewards `labels` to (N,), in the scores' dtype; `valid` (K, N), see `aggregate`."""
        function = COMBINERS[self.name]
        takes = inspect.signature(function).parameters
        given: dict[str, Any] = {key: value for key, value in self.options.items() if key != "gates"}
        if "weights" in takes:
            given["weights"] = torch.tensor(weights, dtype=torch.float64, device=scores.device)
        if "group_ids" in takes:
            given["group_ids"] = group_ids
        if "valid" in takes and valid is not None and not valid.all():
            given["valid"] = valid.to(scores.device)
        if "thresholds" in takes:
            given["thresholds"] = torch.tensor([self.gates.get(label, -math.inf) for label in labels]).to(scores)
        result = function(scores, **given)
        result = result[0] if isinstance(result, tuple) else result  # log_tamed also tells which it tamed
        return result.to(scores.dtype)

    def bounds(self, ends: Sequence[tuple[float, float]], weights: Sequence[float]) -> tuple[float, float]:
        """The range of the result, from those of the rewards; infinite where it cannot be told."""
        if self.name in ("weighted", "gated"):
            scaled = [sorted(w * end for end in pair) for w, pair in zip(weights, ends) if w]
            low, high = float(sum(s[0] for s in scaled)), float(sum(s[1] for s in scaled))
            return (low, high) if self.name == "weighted" else (min(low, 0.0), max(high, 0.0))
        lows, highs = zip(*ends)
        if self.name == "min":
            return min(lows), min(highs)
        if self.name in ("harmonic", "geometric") or self.name == "mean" and min(weights) > 0:
            return min(lows), max(highs)
        return -math.inf, max(highs) if self.name == "mean_minus_variance" else math.inf


def read_combine(given: Mapping[str, Any]) -> Combine:
    """{"combine": name, further keys are its options}, checked.

    Raises:
        ValueError: an unknown name or option, or a value that the combiner refuses.
    """
    name, options = given.get("combine", "weighted"), {k: v for k, v in given.items() if k != "combine"}
    if not isinstance(name, str) or name not in COMBINERS:
        raise unknown_name("combine", str(name), COMBINERS)
    valid = [p for p in inspect.signature(COMBINERS[name]).parameters if p not in (*GIVEN, "thresholds")]
    valid += ["gates"] if name == "gated" else []
    for option in options:
        if option not in valid:
            raise unknown_name(f"option of combine {name!r}", option, valid)
    if name == "gated":
        gates = options.get("gates")
        if not isinstance(gates, Mapping) or not gates:
            raise ValueError(f"gates: got {gates!r}, expected a mapping of reward names to thresholds")
        for label, threshold in gates.items():
            if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not math.isfinite(threshold):
                raise ValueError(f"gates: got {threshold!r} for {label!r}, expected a finite number")
    combine = Combine(name, options)
    try:  # on scores of two groups of two, so that the function's own checks speak
        labels = [*combine.gates, "a"]
        combine(torch.rand(len(labels), 4), [1.0] * len(labels), labels, torch.tensor([0, 0, 1, 1]))
    except TypeError as error:
        raise ValueError(f"options of combine {name!r}: got {dict(options)}: {error}") from error
    return combine


def check_members(combine: Combine, labels: Sequence[str], weights: Sequence[float]) -> None:
    """Raise ValueError unless rewards of these labels and weights can be combined so."""
    for label in combine.gates:
        if label not in labels:
            raise unknown_name("gates", label, labels)
    if combine.name == "weighted":
        return
    if not any(weights):
        raise ValueError(f"combine: got {combine.name!r} of rewards that all have weight 0")
    if "weights" not in inspect.signature(COMBINERS[combine.name]).parameters and set(weights) - {0.0, 1.0}:
        raise ValueError(
            f"weight: got {list(weights)}, expected 1 (or 0, to report only): {combine.name!r} has its own"
        )
    if combine.name in ("harmonic", "geometric") and min(weights) < 0:
        raise ValueError(f"weight: got {min(weights)}, expected >= 0 for {combine.name!r}")
    if combine.name == "mean" and sum(weights) == 0:
        raise ValueError(f"weight: got {list(weights)}, expected a sum other than 0 for 'mean'")
