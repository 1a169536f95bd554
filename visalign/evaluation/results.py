"""The table: means, differences and win rates with intervals by prompt, and where each contestant wins and loses most.

Scores are (contestants, rewards, prompts, seeds), NaN where there is none. Two contestants are compared on the pictures
that both have a score for, prompt and seed alike; a prompt counts once, however many of its seeds are there.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from visalign.files import read_yaml
from visalign.rewards import parse_spec
from visalign.statistics.bootstrap import Interval, paired_interval

from .plan import Plan
from .store import Drawn, Score, Store


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts with its 95 % bootstrap interval by prompt; None where less than two prompts allow none."""

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Pair:
    """One contestant against another on a reward.

    Attributes:
        contestant, against, reward: places.
        difference: of the mean scores, contestant - against; None where they share no scored picture.
        win_rate: share of pictures of the contestant that score more than the other's of the same prompt and seed; a
            tie counts half.
        wins, ties, losses: pictures; prompts: that they are of.
    """

    contestant: int
    against: int
    reward: int
    difference: Estimate | None
    win_rate: Estimate | None
    wins: int
    ties: int
    losses: int
    prompts: int


@dataclass(frozen=True)
class Results:
    """All that an evaluation found.

    Attributes:
        scores: (contestants, rewards, prompts, seeds), NaN where there is none.
        drawn: by (contestant, prompt, seed), places.
        details: the whole scores by (contestant, reward, prompt, seed), places; without pictures that do not exist.
    """

    plan: Plan
    scores: np.ndarray
    drawn: dict[tuple[int, int, int], Drawn]
    details: dict[tuple[int, int, int, int], Score]


def collect(plan: Plan, store: Store) -> Results:
    """What the store holds of a plan.

    Raises:
        ValueError: a picture or a score was neither made nor said to have failed.
    """
    shape = (len(plan.contestants), len(plan.columns), len(plan.prompts), len(plan.seeds))
    scores = np.full(shape, np.nan)
    pictures_of: dict[tuple[int, int, int], Drawn] = {}
    details: dict[tuple[int, int, int, int], Score] = {}
    known = [store.scores(column.key) for column in plan.columns]
    missing = 0
    for c, key in enumerate(plan.keys):
        pictures = store.drawn(key)
        for number, task in enumerate(plan.tasks):
            place = (task.place, number % len(plan.seeds))
            picture = pictures.get(task.name)
            if picture is None:
                missing += 1
                continue
            pictures_of[c, *place] = picture
            for r in range(len(plan.columns) if picture.file else 0):
                score = known[r].get((picture.pixels, task.prompt))
                if score is None:
                    missing += 1
                    continue
                details[c, r, *place] = score
                scores[c, r, *place] = np.nan if score["score"] is None else score["score"]
    if missing:
        raise ValueError(
            f"out: {missing} pictures or scores of other processes are missing in {str(plan.out)!r}; processes on "
            "several machines need a folder that all of them see"
        )
    return Results(plan, scores, pictures_of, details)


def estimate(values: np.ndarray) -> Estimate | None:
    """Of values (prompts, seeds): the mean over prompts of the mean over a prompt's seeds, NaN left out."""
    means = by_prompt(values)
    if not len(means):
        return None
    interval: Interval = paired_interval(means)
    return (
        Estimate(interval.mean, interval.low, interval.high) if len(means) > 1 else Estimate(interval.mean, None, None)
    )


def by_prompt(values: np.ndarray) -> np.ndarray:
    """(prompts, seeds) to the mean of each prompt that has a value, (at most prompts,)."""
    return np.array([row[~np.isnan(row)].mean() for row in values if not np.isnan(row).all()])


def compare(values: np.ndarray, base: np.ndarray, places: tuple[int, int, int]) -> Pair:
    """A contestant's scores (prompts, seeds) of one reward against another's.

    Args:
        places: of the contestant, the other and the reward, for the result.
    """
    gains = values - base
    there = ~np.isnan(gains)
    won = np.where(there, (np.sign(gains) + 1) / 2, np.nan)
    counts = [int((won[there] == share).sum()) for share in (1.0, 0.5, 0.0)]
    return Pair(*places, estimate(gains), estimate(won), counts[0], counts[1], counts[2], int(there.any(axis=1).sum()))


def pairs(scores: np.ndarray) -> list[Pair]:
    """Every later contestant against every earlier one, reward by reward."""
    return [
        compare(scores[b, r], scores[a, r], (b, a, r))
        for a, b in combinations(range(len(scores)), 2)
        for r in range(scores.shape[1])
    ]


def extremes(values: np.ndarray, base: np.ndarray, count: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The places (prompt, seed) of the most won and the most lost pictures, of each prompt at most one, most first."""
    gains = values - base
    ends = []
    for sign in (1, -1):
        signed = np.where(np.isnan(gains), -np.inf, sign * gains)
        best = signed.argmax(axis=1)
        order = np.argsort(-signed.max(axis=1), kind="stable")
        ends.append([(int(p), int(best[p])) for p in order if signed[p, best[p]] > 0][:count])
    return ends[0], ends[1]


def optimised(plan: Plan) -> set[tuple[int, int]]:
    """(contestant, reward) places where the contestant was searched or trained for that very reward, as far as known.

    A LoRA's reward is read from the configuration of its run, in the folder above it.
    """
    cells = set()
    for c, contestant in enumerate(plan.contestants):
        names = {name for aim in (contestant.reward, trained_for(contestant.lora)) for name in _names(aim)}
        for r, column in enumerate(plan.columns):
            if names & set(_names(column.spec)):
                cells.add((c, r))
    return cells


def trained_for(lora: str | None) -> str | None:
    """The reward that a LoRA's run was for; None where that is not known."""
    if lora is None:
        return None
    folder = Path(lora) if Path(lora).is_dir() else Path(lora).parent
    file = folder.resolve().parent / "config.yaml"
    try:
        config = read_yaml(file, "config")
    except ValueError:
        return None
    reward = config.get("reward") if isinstance(config, dict) else None
    return reward if isinstance(reward, str) else None


def _names(spec: str | None) -> Iterator[str]:
    if spec is not None:
        try:
            yield from (term.name for term in parse_spec(spec))
        except ValueError:  # e.g. a file that is gone since the training
            return
