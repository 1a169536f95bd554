"""Whether a series of a training moves: trends and shifts that noise and a few outliers do not feign."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from scipy import stats

Number = tuple[float, float]  # a mean over pictures or groups, and the standard deviation among them
MOST_POINTS = 50  # longer series are averaged in blocks first; all pairs of points are compared


@dataclass
class Series:
    """One number over the training: its first values, how much it varied among them, and its last values."""

    first: list[float] = field(default_factory=list)
    first_spreads: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    count: int = 0  # all values ever added

    def add(self, step: int, number: Number, baseline: int, window: int) -> None:
        """Append; what is older than `window` steps goes, unless values come seldom."""
        if self.steps and step <= self.steps[-1]:
            raise ValueError(f"step: got {step} after {self.steps[-1]}, expected a later one")
        if len(self.first) < baseline:
            self.first.append(number[0])
            self.first_spreads.append(number[1])
        self.steps.append(step)
        self.values.append(number[0])
        self.count += 1
        while len(self.steps) > 2 * baseline and self.steps[0] <= step - window:
            del self.steps[0], self.values[0]

    @property
    def start(self) -> float:
        return sum(self.first) / len(self.first)

    @property
    def spread(self) -> float:
        """Standard deviation among the first pictures or groups; a thousandth of the mean where they are all alike."""
        pooled = math.sqrt(sum(s * s for s in self.first_spreads) / len(self.first_spreads))
        return max(pooled, 1e-3 * abs(self.start), 1e-6)

    def now(self, recent: int) -> float:
        return sum(self.values[-recent:]) / len(self.values[-recent:])

    def change(self, recent: int) -> float:
        """How far the last values are from the first, in spreads."""
        return (self.now(recent) - self.start) / self.spread

    def has(self, count: int) -> bool:
        """Whether that many values were ever added."""
        return self.count >= count

    def within(self, steps: int, fewest: int) -> int:
        """How many values are of so many last steps, or `fewest` where they come more seldom and there are as many."""
        return max(sum(s > self.steps[-1] - steps for s in self.steps), min(fewest, len(self.steps)))


class Trend(NamedTuple):
    """A slope and how sure its sign is."""

    slope: float  # Theil-Sen: median over the pairs of points, a step
    z: float  # Mann-Kendall's standard score, its variance widened for autocorrelation; sign as the slope's
    change: float  # slope times the span of the steps


def trend(steps: Sequence[int], values: Sequence[float]) -> Trend:
    """Trend of values over steps, by ranks.

    Theil-Sen's slope; the Mann-Kendall score with its correction for ties, divided by sqrt((1 + r) / (1 - r)), r the
    lag-one correlation of the residuals (after Hamed and Rao 1998, here with an AR(1) noise): neighbours that wander
    together are fewer independent points. Under white noise |z| > 3.3 comes at most once in a thousand series; a pure
    random walk shows it in about 4 of a hundred, rather than nearly always.

    Raises:
        ValueError: fewer than 3 points, or lengths that differ.
    """
    if len(steps) != len(values) or len(values) < 3:
        raise ValueError(f"values: got {len(values)} at {len(steps)} steps, expected as many, and at least 3")
    x, y = _blocks(np.asarray(steps, float)), _blocks(np.asarray(values, float))
    n = len(x)
    i, j = np.triu_indices(n, 1)
    rises = y[j] - y[i]
    slope = float(np.median(rises / (x[j] - x[i])))
    score = np.sign(rises).sum()
    ties = np.unique(y, return_counts=True)[1]
    variance = (n * (n - 1) * (2 * n + 5) - (ties * (ties - 1) * (2 * ties + 5)).sum()) / 18
    if variance <= 0:
        return Trend(0.0, 0.0, 0.0)
    z = (score - np.sign(score)) / np.sqrt(variance * _inflation(y - slope * x))
    return Trend(slope, float(z), slope * float(x[-1] - x[0]))


def shift_p_value(before: Sequence[float], after: Sequence[float]) -> float:
    """Two-sided p-value that two stretches of a series are of one level (Mann-Whitney)."""
    return float(stats.mannwhitneyu(before, after).pvalue)


def _blocks(values: np.ndarray) -> np.ndarray:
    """Means of equal blocks, at most MOST_POINTS of them; the oldest values, less than a block, are left out."""
    size = -(-len(values) // MOST_POINTS)
    return values[len(values) % size :].reshape(-1, size).mean(1)


def _inflation(residuals: np.ndarray) -> float:
    """How much more a sum of these varies than one of independent values, as an AR(1) process; >= 1."""
    residuals = residuals - residuals.mean()
    squares = float(residuals @ residuals)
    if squares == 0:
        return 1.0
    r = float(residuals[1:] @ residuals[:-1]) / squares
    r += (1 + 4 * r) / len(residuals)  # its bias in short series (Kendall 1954)
    r = min(max(r, 0.0), 0.98)
    return (1 + r) / (1 - r)
