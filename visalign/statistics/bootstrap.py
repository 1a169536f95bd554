"""Intervals by bootstrap over prompts, whose seeds stay together."""

from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f})"


def paired_interval(values: np.ndarray, base: np.ndarray | float = 0.0, seed: int = 0) -> Interval:
    """Mean of values - base with a bootstrap over prompts, whose seeds stay together.

    Args:
        values, base: (prompts, seeds), the same prompts and seeds in both; or (prompts,).

    Raises:
        ValueError: shapes that differ.
    """
    values, base = np.asarray(values, float), np.asarray(base, float)
    if base.ndim and base.shape != values.shape:
        raise ValueError(f"values: got shape {values.shape}, expected {base.shape}, as the base")
    gains = (values - base).reshape(len(values), -1).mean(1)
    rows = np.random.default_rng(seed).integers(0, len(gains), (RESAMPLES, len(gains)))
    low, high = np.percentile(gains[rows].mean(1), (2.5, 97.5))
    return Interval(float(gains.mean()), float(low), float(high))
