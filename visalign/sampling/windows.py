"""Which denoising steps are stochastic (and trained) in an iteration; the rest follow the ODE.

A window is a callable (iteration, generator or None) -> step indices, in order. Without a generator a random window is
drawn from the iteration alone, so that every process, and a resumed run, draws the same.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch

from visalign.names import build

from .seeds import derived_seed


class Window(Protocol):
    def __call__(self, iteration: int, generator: torch.Generator | None = None) -> list[int]:
        """The stochastic steps of this iteration (0, 1, ...): ascending, never empty."""
        ...


@dataclass(frozen=True)
class AllSteps:
    """Every step (Flow-GRPO, arXiv:2505.05470)."""

    name: ClassVar[str] = "all"
    num_steps: int

    def __post_init__(self):
        _check_int("num_steps", self.num_steps, 1)

    def __call__(self, iteration: int, generator: torch.Generator | None = None) -> list[int]:
        return list(range(self.num_steps))


@dataclass(frozen=True)
class EarlyWindow:
    """The `size` steps after the first one, in every iteration: where noise still changes what the picture shows.

    On the shapes world most of the gradient's signal lies there (docs/decisions.md); later steps change details.
    """

    name: ClassVar[str] = "early"
    num_steps: int
    size: int = 2

    def __post_init__(self):
        _check_int("num_steps", self.num_steps, 3)
        _check_int("size", self.size, 1)
        if self.size > self.num_steps - 2:
            raise ValueError(
                f"size: got {self.size}, expected at most {self.num_steps - 2}: all but the first and last"
            )

    def __call__(self, iteration: int, generator: torch.Generator | None = None) -> list[int]:
        return list(range(1, 1 + self.size))


@dataclass(frozen=True)
class RandomWindow:
    """`size` steps whose start is uniform over those that fit in span = (low, high), high excluded (Flow-GRPO-Fast).

    The default span is all steps but the last. size 0 means the whole span.
    """

    name: ClassVar[str] = "random"
    num_steps: int
    size: int
    span: tuple[int, int] | None = None
    seed: int = 0  # used without a generator

    def __post_init__(self):
        _check_int("num_steps", self.num_steps, 1)
        _check_int("size", self.size, 0)
        low, high = self._span()
        if not 0 <= low < high <= self.num_steps:
            raise ValueError(f"span: got {(low, high)}, expected 0 <= low < high <= {self.num_steps}")
        if self.size > high - low:
            raise ValueError(f"size: got {self.size}, expected at most {high - low}, the span {(low, high)}")

    def _span(self) -> tuple[int, int]:
        return (0, self.num_steps - 1) if self.span is None else (self.span[0], self.span[1])

    def __call__(self, iteration: int, generator: torch.Generator | None = None) -> list[int]:
        low, high = self._span()
        size = self.size or high - low
        start = low + _draw(high - low - size + 1, iteration, self.seed, generator)
        return list(range(start, start + size))


@dataclass(frozen=True)
class MixRandomWindow:
    """MixGRPO's random window (arXiv:2507.21802): as `RandomWindow`, never in the last two steps."""

    name: ClassVar[str] = "mix_random"
    num_steps: int
    size: int
    seed: int = 0  # used without a generator

    def __post_init__(self):
        _check_mix(self.num_steps, self.size)

    def __call__(self, iteration: int, generator: torch.Generator | None = None) -> list[int]:
        start = _draw(self.num_steps - 2 - self.size + 1, iteration, self.seed, generator)
        return list(range(start, start + self.size))


@dataclass(frozen=True)
class ProgressiveWindow:
    """MixGRPO's moving window: from the first steps towards the image, never in the last two.

    Positions are 0, stride, 2 stride, ... until the window first reaches the end, where it is cut short if it does not
    fit (stride = size, without overlap). `iterations` are spent at each.
    """

    name: ClassVar[str] = "progressive"
    num_steps: int
    size: int
    iterations: int = 25  # at each position
    stride: int = 1  # 1 overlaps; size does not
    end: Literal["stay", "restart"] = "stay"  # after the last position

    def __post_init__(self):
        _check_mix(self.num_steps, self.size)
        _check_int("iterations", self.iterations, 1)
        _check_int("stride", self.stride, 1)
        if self.stride > self.size:
            raise ValueError(f"stride: got {self.stride}, expected at most the size {self.size}, to skip no step")
        if self.end not in ("stay", "restart"):
            raise ValueError(f"end: got {self.end!r}, expected 'stay' or 'restart'")

    def positions(self) -> list[int]:
        count = math.ceil((self.num_steps - 2 - self.size) / self.stride) + 1
        return [self.stride * i for i in range(count)]

    def dwell(self, position: int) -> int:
        """Iterations spent at a position."""
        return self.iterations

    def __call__(self, iteration: int, generator: torch.Generator | None = None) -> list[int]:
        _check_int("iteration", iteration, 0)
        positions = self.positions()
        dwells = [self.dwell(position) for position in positions]
        if self.end == "restart":
            iteration %= sum(dwells)
        start = positions[-1]
        for position, dwell in zip(positions, dwells):
            if iteration < dwell:
                start = position
                break
            iteration -= dwell
        return list(range(start, min(start + self.size, self.num_steps - 2)))


@dataclass(frozen=True)
class DecayWindow(ProgressiveWindow):
    """As progressive, with the iterations falling linearly towards `last_iterations` at step T - 2, rounded down.

    As in MixGRPO's code: the last position lies before T - 2, so that it has some more.
    """

    name: ClassVar[str] = "decay"
    last_iterations: int | None = None  # None: a quarter of `iterations`, at least 1

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.fewest <= self.iterations:
            raise ValueError(f"last_iterations: got {self.last_iterations}, expected within 1 .. {self.iterations}")

    @property
    def fewest(self) -> int:
        return max(1, self.iterations // 4) if self.last_iterations is None else self.last_iterations

    def dwell(self, position: int) -> int:
        along = position / (self.num_steps - 2)
        return max(self.fewest, int(self.iterations * (1 - along) + self.fewest * along))


@dataclass(frozen=True)
class ExpDecayWindow(ProgressiveWindow):
    """As progressive, with ceil(iterations * exp(-rate * max(position - knee, 0))) iterations at a position."""

    name: ClassVar[str] = "exp_decay"
    rate: float = 0.1
    knee: int = 13  # position from which it falls

    def __post_init__(self):
        super().__post_init__()
        if not self.rate >= 0:
            raise ValueError(f"rate: got {self.rate}, expected >= 0")

    def dwell(self, position: int) -> int:
        return math.ceil(self.iterations * math.exp(-self.rate * max(position - self.knee, 0)))


_WINDOWS: dict[str, type] = {
    window.name: window
    for window in (AllSteps, EarlyWindow, RandomWindow, MixRandomWindow, ProgressiveWindow, DecayWindow, ExpDecayWindow)
}


def make_window(kind: str, num_steps: int, size: int | None = None, **options: Any) -> Window:
    """Make a window by name: all, early, random, mix_random, progressive, decay, exp_decay; options are its fields.

    Raises:
        ValueError: an unknown kind or option (the error names the nearest valid one), no size for a kind that has one,
            or a size for "all".
    """
    if kind in _WINDOWS and kind != "early" and (size is None) != (kind == "all"):
        raise ValueError(f"size: got {size}, expected {None if kind == 'all' else 'a number of steps'} for {kind!r}")
    sized = {} if size is None else {"size": size}
    return build(kind, _WINDOWS, "kind", num_steps=num_steps, **sized, **options)


def trained_steps(steps: list[int], fraction: float) -> list[int]:
    """The first int(fraction * n) of the stochastic steps: Flow-GRPO's 0.99 leaves out the last of 10.

    The last step's std is tiny and its gradient huge.
    """
    if not 0 < fraction <= 1 or int(fraction * len(steps)) < 1:
        raise ValueError(
            f"fraction: got {fraction} of {len(steps)} steps, expected within (0, 1] and at least one step"
        )
    return steps[: int(fraction * len(steps))]


def flash_post_steps(num_steps: int, last_step: int, ratio: float = 0.4) -> int:
    """MixGRPO-Flash's number of solver steps after the last stochastic one: int((T - last_step) * ratio) - 1.

    Its code lays that many *levels*, the one after `last_step` and 0 among them, so there is one step less. At least 1,
    and no more than there are; the code makes none at all, and decodes noise, where the number is 1.
    """
    if not 0 <= last_step < num_steps - 1:
        raise ValueError(f"last_step: got {last_step}, expected 0 .. {num_steps - 2}, with steps left after it")
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio: got {ratio}, expected within (0, 1]")
    return min(max(int((num_steps - last_step) * ratio) - 1, 1), num_steps - last_step - 1)


def _draw(count: int, iteration: int, seed: int, generator: torch.Generator | None) -> int:
    """Uniform in 0 .. count - 1."""
    _check_int("iteration", iteration, 0)
    if generator is None:
        generator = torch.Generator().manual_seed(derived_seed(seed, iteration))
    return int(torch.randint(count, (), generator=generator, device=generator.device))


def _check_mix(num_steps: int, size: int) -> None:
    _check_int("num_steps", num_steps, 3)
    _check_int("size", size, 1)
    if size > num_steps - 2:
        raise ValueError(f"size: got {size}, expected at most {num_steps - 2}: the last two of {num_steps} stay out")


def _check_int(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: got {value!r}, expected an integer >= {least}")
