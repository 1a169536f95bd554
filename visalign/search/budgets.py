"""How much to spend: settings tuned on a calibration split, a budget that stops growing, NFE moved between prompts."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from visalign.statistics.bootstrap import paired_interval

from .ledger import Ledger
from .records import Event

Setting = TypeVar("Setting")


def successive_halving(
    candidates: Sequence[Setting],
    prompts: Sequence[str],
    evaluate: Callable[[Setting, Sequence[str]], float],
    first: int = 3,
) -> tuple[Setting, int]:
    """The best setting of a method: all on a few prompts, then the best third on three times as many, and so on.

    Args:
        prompts: the calibration split; it must not hold a prompt that results are reported on.
        evaluate: (setting, prompts) -> mean reward at the budget; minus infinity where a quality gate fails.
        first: prompts of the first round.

    Returns:
        The setting, and how many (setting, prompt) pairs were evaluated: the cost of tuning, to be reported.
    """
    if not candidates or not 1 <= first <= len(prompts):
        raise ValueError(
            f"candidates, first: got {len(candidates)}, {first}, expected some, and 1 .. {len(prompts)} prompts"
        )
    left, count, paid = list(candidates), first, 0
    while True:
        count = min(count, len(prompts))
        scores = [evaluate(setting, prompts[:count]) for setting in left]
        paid += len(left) * count
        order = np.argsort([-score for score in scores], kind="stable")
        left = [left[k] for k in order[: -(-len(left) // 3)]]
        if len(left) == 1:
            return left[0], paid
        count *= 3


@dataclass(frozen=True)
class Doubling:
    """One budget of `grow_budget`: the mean reward at it, and the lower bound of the gain over half of it."""

    budget: int
    reward: float
    gain_low: float


def grow_budget(
    search: Callable[[int], np.ndarray], start: int, max_nfe: int, base_std: float, min_gain: float = 0.02
) -> list[Doubling]:
    """Search at start, 2 start, 4 start, ... until a doubling no longer pays.

    Stops when the lower bound of the paired gain of a doubling was below min_gain * base_std twice, or before max_nfe
    would be passed.

    Args:
        search: budget -> the best rewards (prompts,) or (prompts, seeds), paired between budgets.
        base_std: standard deviation of the base's rewards.
    """
    if not 0 < start <= max_nfe:
        raise ValueError(f"start: got {start}, expected 1 .. {max_nfe} (max_nfe)")
    budget, values, low = start, search(start), float("nan")
    steps, poor = [Doubling(start, float(values.mean()), low)], 0
    while 2 * budget <= max_nfe and poor < 2:
        budget, before = 2 * budget, values
        values = search(budget)
        low = paired_interval(values, before).low
        steps.append(Doubling(budget, float(values.mean()), low))
        poor += low < min_gain * base_std
    return steps


def share_budget(
    searches: Sequence[tuple[Ledger, Iterator[Event]]], budget: int, enough: float, recent: int = 4
) -> Iterator[tuple[int, Event]]:
    """Several prompts' searches on one budget: each stops once it is good enough, and what it leaves goes to others.

    Each in turn gets one event; after every one has `recent` events, the next goes to the search whose best reward has
    grown most per NFE over its last `recent` events. Anytime methods only.

    Args:
        searches: a ledger and its events each; the ledgers' `max_nfe` are moved here. One that is done leaves.
        budget: NFE of all together.
        enough: a search whose best reward reaches it stops (a high quantile of the base's rewards, from calibration).

    Yields:
        The place of the search and its event.
    """
    traces: list[list[tuple[int, float]]] = [[] for _ in searches]
    going = set(range(len(searches)))
    while going:
        k = min(going, key=lambda n: (_urgency(traces[n], recent), n))
        ledger, events = searches[k]
        ledger.max_nfe = ledger.nfe + budget - sum(other.nfe for other, _ in searches)
        event = next(events, None)
        if event is None:
            going.discard(k)
            continue
        if event.best is not None:
            traces[k].append((event.nfe, event.best.reward))
            if event.best.reward >= enough:
                going.discard(k)
        yield k, event


def _urgency(trace: list[tuple[int, float]], recent: int) -> tuple[int, float]:
    """Sorts first: few events, then a steep gain."""
    if len(trace) < recent:
        return len(trace), 0.0
    (start, low), (end, high) = trace[-recent], trace[-1]
    return recent, -(high - low) / max(end - start, 1)
