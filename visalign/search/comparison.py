"""Searches against each other at equal cost: curves over NFE, intervals by prompt, and whether a reward was hacked.

A trace is what `run` yields, as (nfe, best reward) pairs; a table of results is (prompts, seeds), paired by both.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr

from visalign.statistics.bootstrap import RESAMPLES, Interval

Trace = list[tuple[int, float]]


def at_budgets(trace: Trace, budgets: Sequence[int]) -> np.ndarray:
    """The best reward reached with at most each budget, (B,); NaN where no result was finished by then."""
    spent, best = np.array([n for n, _ in trace]), np.array([r for _, r in trace])
    place = np.searchsorted(spent, budgets, side="right")
    return np.array([best[k - 1] if k else np.nan for k in place])


def area(budgets: Sequence[int], curve: Sequence[float]) -> float:
    """Mean height of a curve over log NFE (trapezoids)."""
    x = np.log(budgets)
    return float(np.trapezoid(curve, x) / (x[-1] - x[0]))


def relative_area(budgets: Sequence[int], curve: Sequence[float], control: Sequence[float], base: float) -> float:
    """Area of a curve above the base, in that of the control (best of N); 1 is as good."""
    return (area(budgets, curve) - base) / (area(budgets, control) - base)


def nfe_to_match(budgets: Sequence[int], curve: Sequence[float], target: float) -> float:
    """The smallest NFE at which a curve reaches a reward, by lines in log NFE; infinity if it never does."""
    reached = np.maximum.accumulate(np.asarray(curve, float))
    k = int(np.searchsorted(reached, target))
    if k == len(reached):
        return float("inf")
    if k == 0:
        return float(budgets[0])
    share = (target - reached[k - 1]) / (reached[k] - reached[k - 1])
    return float(np.exp(np.log(budgets[k - 1]) + share * np.log(budgets[k] / budgets[k - 1])))


def speedup(budgets: Sequence[int], values: np.ndarray, control: np.ndarray, spent: float, seed: int = 0) -> Interval:
    """How many times fewer NFE a search needs for what the control reaches by `spent`; 0 where it never does.

    The interval is a bootstrap over prompts, whose curves, seeds and control stay together.

    Args:
        values: rewards (prompts, seeds, budgets).
        control: rewards (prompts, seeds) by `spent`, the same prompts and seeds; in both NaN where one was not run.
    """
    curves, targets = np.nanmean(values, 1), np.nanmean(control, 1)
    resampled = np.random.default_rng(seed).integers(0, len(curves), (RESAMPLES, len(curves)))
    speedups = [spent / nfe_to_match(budgets, curves[rows].mean(0), targets[rows].mean()) for rows in resampled]
    low, high = np.percentile(speedups, (2.5, 97.5))
    return Interval(spent / nfe_to_match(budgets, curves.mean(0), float(targets.mean())), float(low), float(high))


@dataclass(frozen=True)
class Gate:
    """Whether a reward that was not searched for stays: its gain over the base, that one's error, and the verdict."""

    gain: float
    error: float

    @property
    def passed(self) -> bool:
        """The gain is no worse than one standard error below 0."""
        return self.gain >= -self.error


def hacking_gate(held_out: np.ndarray, base: np.ndarray) -> Gate:
    """Scores (prompts, seeds) of a reward never searched for, of the results found and of the base's."""
    gains = np.asarray(held_out, float) - np.asarray(base, float)
    gains = gains.reshape(len(gains), -1).mean(1)
    error = gains.std(ddof=1) / np.sqrt(len(gains)) if len(gains) > 1 else 0.0
    return Gate(float(gains.mean()), float(error))


def step_agreement(few: Sequence[float], full: Sequence[float], least: float = 0.8) -> tuple[float, bool]:
    """Spearman's rank correlation of rewards with few and with all steps, and whether few may stand for all (> 0.8).

    Of the same initial noise, sample by sample: a search with few steps finds what is best with all only if they agree.
    """
    if len(few) != len(full) or len(few) < 3:
        raise ValueError(f"few, full: got {len(few)} and {len(full)}, expected as many, and at least 3")
    correlation = float(spearmanr(few, full).statistic)
    return correlation, correlation > least
