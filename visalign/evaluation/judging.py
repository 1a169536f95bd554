"""Scores of the pictures as they stand in their files, kept batch by batch; what a reward cannot score is said."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visalign.data.prompt_context import PromptContext
from visalign.images import numpy_to_images
from visalign.rewards import CombinedReward, Reward, RewardError, RewardOutput, make_reward
from visalign.rewards.base import Context
from visalign.training.loop.scoring import Scorer

from .plan import Column, Plan
from .store import Drawn, Score, Store

Key = tuple[str, str]  # (pixels, prompt)


class ContextReward:
    """A reward that is handed what the prompt set knows of each prompt, for searches, which know the words alone."""

    def __init__(self, reward: Reward, context: PromptContext) -> None:
        self._reward, self._context = reward, context
        self.name, self.differentiable, self.kind = reward.name, reward.differentiable, reward.kind
        self.range, self.needs = reward.range, ("prompts",)
        self.media = getattr(reward, "media", "images")

    def __call__(self, images: Tensor, prompts: Sequence[str], context: Context | None = None) -> Tensor | RewardOutput:
        return self._reward(images, prompts, {**self._context(prompts), **(context or {})})


class Judge:
    """A reward on a device, for scoring pictures and for searches.

    Raises:
        ValueError: it compares pictures with each other, so that a score would depend on who else is there.
    """

    def __init__(self, spec: str, device: torch.device, context: PromptContext, **options: Any) -> None:
        reward = make_reward(spec, **options)
        self.scorer = Scorer(reward, device, 0, context)
        if self.scorer.needs_groups:
            raise ValueError(f"reward: got {spec!r}, which is {reward.kind}, expected one that scores each by itself")
        self.device = device
        self.for_search: Any = ContextReward(reward, context) if context([""]) else reward
        self._parts = self.scorer.labels if isinstance(reward, CombinedReward) else ()

    def scores(self, pictures: Sequence[np.ndarray], prompts: Sequence[str]) -> list[Score]:
        """A score for each picture, uint8 (H, W, 3), all of one size.

        Where the reward fails on the batch each picture is tried by itself, so that one that cannot be scored costs
        only its own score.
        """
        try:
            return self._batch(pictures, prompts)
        except RewardError as error:
            if len(pictures) == 1:
                return [{"score": None, "why": str(error)}]
        return [self.scores([picture], [prompt])[0] for picture, prompt in zip(pictures, prompts)]

    def _batch(self, pictures: Sequence[np.ndarray], prompts: Sequence[str]) -> list[Score]:
        images = numpy_to_images(np.stack(pictures)).to(self.device)
        (scores,) = self.scorer.submit([images], list(prompts), torch.arange(len(prompts))).result()
        totals = self.scorer.plain(scores.shaped).tolist()
        results: list[Score] = []
        for row, (total, valid) in enumerate(zip(totals, scores.valid.tolist())):
            parts = {label: float(scores.parts[label][row]) for label in self._parts}
            if valid:
                results.append({"score": total} | ({"parts": parts} if parts else {}))
            else:
                why = f"reward {self.scorer.reward.name!r}: could not score this sample ({scores.problem})"
                results.append({"score": None, "why": why})
        return results


@dataclass(frozen=True)
class Batch:
    """Pictures of one size that a reward scores together, and those of them that have no score yet."""

    column: Column
    pictures: tuple[tuple[Key, Drawn], ...]
    missing: frozenset[Key]


def missing_batches(plan: Plan, store: Store) -> list[Batch]:
    """The batches with a picture that has no score yet, with all of each; the same on every process.

    Equal pictures of a prompt are scored once, whoever drew them: their scores are then exactly equal.
    """
    pictures = drawn_pictures(plan, store)
    batches = []
    for column in plan.columns:
        there = {key for key, score in store.scores(column.key).items() if score["score"] is not None}
        for start in range(0, len(pictures), plan.batch_size):
            batch = pictures[start : start + plan.batch_size]
            for size in dict.fromkeys(stored.size for _, stored in batch):
                equal = tuple(picture for picture in batch if picture[1].size == size)
                missing = frozenset(key for key, _ in equal) - there
                batches += [Batch(column, equal, missing)] if missing else []
    return batches


def drawn_pictures(plan: Plan, store: Store) -> list[tuple[Key, Drawn]]:
    """All different (pixels, prompt) of the plan, in its order."""
    pictures: dict[Key, Drawn] = {}
    for key in plan.keys:
        stored = store.drawn(key)
        for task in plan.tasks:
            picture = stored.get(task.name)
            if picture is not None and picture.file:
                pictures.setdefault((picture.pixels, task.prompt), picture)
    return list(pictures.items())


def judge(
    batches: Sequence[Batch],
    store: Store,
    judges: dict[str, Judge],
    advance: Callable[[int, str], None] = lambda count, note: None,
) -> None:
    """Score this process's batches, and keep what had no score before.

    Args:
        judges: by column.
        advance: told the number of pictures and the column, after each batch.
    """
    for batch in batches:
        pictures = [store.picture(picture) for _, picture in batch.pictures]
        scores = judges[batch.column.label].scores(pictures, [prompt for (_, prompt), _ in batch.pictures])
        missing = {key: score for (key, _), score in zip(batch.pictures, scores) if key in batch.missing}
        store.keep_scores(batch.column.key, missing)
        advance(len(batch.pictures), batch.column.label)
