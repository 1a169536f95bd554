"""Transforms of one reward's scores before it is combined with others: "/26", log-odds, PAR and the like, by name."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from visalign.names import unknown_name

from . import aggregate
from .base import RewardError


def scale(scores: Tensor, by: float = 1.0, add: float = 0.0) -> Tensor:
    """by * r + add; "*100" for short."""
    return by * scores + add


def divide(scores: Tensor, by: float) -> Tensor:
    """r / by; "/26" for short."""
    return scores / by


def standardise(scores: Tensor, mean: float, std: float) -> Tensor:
    """(r - mean) / std, by the mean and std that the user measured on reference samples."""
    return (scores - mean) / std


def log_odds(scores: Tensor, eps: float = 1e-6) -> Tensor:
    """log(p / (1 - p)) of a probability kept eps away from 0 and 1."""
    return scores.clamp(eps, 1 - eps).logit()


def clip(scores: Tensor, low: float, high: float) -> Tensor:
    """r cut to [low, high]; no gradient outside."""
    return scores.clamp(low, high)


def par(scores: Tensor, references: Sequence[float], k: float = 1.0) -> Tensor:
    """`visalign.rewards.aggregate.preference_as_reward` with the same references for all prompts."""
    return aggregate.preference_as_reward(scores, scores.new_tensor(references), k)


TRANSFORMS: dict[str, Callable[..., Tensor]] = {
    "scale": scale,
    "divide": divide,
    "standardise": standardise,
    "log_odds": log_odds,
    "clip": clip,
    "par": par,
    "log_sigmoid": aggregate.log_sigmoid,
    "exp": torch.Tensor.exp,
    "tanh": torch.Tensor.tanh,
    "log1p": torch.Tensor.log1p,
    "discount": aggregate.discount,
    "lower_bound": aggregate.lower_bound,
}
BARE = ("exp", "tanh", "log1p")  # without options; built-ins have no signature to read
DOUBTING = ("discount", "lower_bound")  # these read the reward's uncertainty


@dataclass(frozen=True)
class Transform:
    """One of TRANSFORMS with its options."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, scores: Tensor, uncertainty: Tensor | None, label: str) -> Tensor:
        """Scores (N,) of the reward `label`, transformed."""
        if self.name not in DOUBTING:
            return TRANSFORMS[self.name](scores, **self.options)
        if uncertainty is None:
            raise RewardError(label, f"gives no uncertainty, which the transform {self.name!r} needs")
        return TRANSFORMS[self.name](scores, uncertainty.to(scores), **self.options)

    def bounds(self, ends: tuple[float, float]) -> tuple[float, float]:
        """Where the transformed scores of a reward of this range lie; each transform is monotone in the score."""
        if self.name == "discount":
            return min(ends[0], 0.0), max(ends[1], 0.0)
        if self.name == "lower_bound":
            return -torch.inf, ends[1]
        values = TRANSFORMS[self.name](torch.tensor(ends, dtype=torch.float64), **self.options)
        low, high = values.aminmax() if not values.isnan().any() else (-torch.inf, torch.inf)
        return float(low), float(high)


def read_transforms(given: Any) -> tuple[Transform, ...]:
    """What a config says about transforms: "log_odds", "/26", "*100", {"name": ..., options}, or a list of those.

    Raises:
        ValueError: an unknown name or option, a missing one, or a value that is no number.
    """
    items = [given] if isinstance(given, (str, Mapping)) else given
    if not isinstance(items, Sequence):
        raise ValueError(f"transform: got {given!r}, expected a name such as 'log_odds' or '/26', a mapping or a list")
    return tuple(_read(item) for item in items)


def _read(item: Any) -> Transform:
    if isinstance(item, str) and item[:1] in ("/", "*"):
        item = {"name": "divide" if item[0] == "/" else "scale", "by": _float(item[1:], item)}
    item = {"name": item} if isinstance(item, str) else item
    if not isinstance(item, Mapping) or not isinstance(item.get("name"), str):
        raise ValueError(f"transform: got {item!r}, expected a name or a mapping with 'name'")
    name, options = item["name"], {key: value for key, value in item.items() if key != "name"}
    if name not in TRANSFORMS:
        raise unknown_name("transform", name, [*TRANSFORMS, "/NUMBER", "*NUMBER"])
    taken = [] if name in BARE else list(inspect.signature(TRANSFORMS[name]).parameters.values())[1:]
    taken = [p for p in taken if p.name != "uncertainty"]
    for option in options:
        if option not in [p.name for p in taken]:
            raise unknown_name(f"option of transform {name!r}", option, [p.name for p in taken])
    for p in taken:
        if p.name not in options and p.default is p.empty:
            raise ValueError(f"transform: got {name!r} without {p.name!r}, which it needs")
    for option, value in options.items():
        several = option == "references" and isinstance(value, Sequence) and len(value) > 0
        for number in value if several else [value]:
            _checked(number, f"{option} of transform {name!r}")
    divisor = {"divide": "by", "standardise": "std"}.get(name)
    if divisor is not None and not options[divisor]:
        raise ValueError(f"{divisor} of transform {name!r}: got 0, expected another number")
    return Transform(name, options)


def _float(text: str, item: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"transform: got {item!r}, expected a number after {item[0]!r}") from None


def _checked(value: Any, what: str) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not torch.tensor(float(value)).isfinite():
        raise ValueError(f"{what}: got {value!r}, expected a finite number")
