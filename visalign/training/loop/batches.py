"""Micro-batches of an iteration: cut from its groups, handed to the reward, given their part of what all scored."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from visalign.advantages.group import group_statistics
from visalign.data.prompts import Group
from visalign.sampling.rollout import Trajectory
from visalign.training.run.folder import Run

from .scoring import Scored, Scorer


class Samples(NamedTuple):
    """What a micro-batch of N samples is drawn from."""

    ids: Tensor  # (N,) int64, of the groups
    prompts: list[str]
    seeds: list[int]
    noise_seeds: list[int]


def cut(groups: Sequence[Group], size: int) -> Iterator[Samples]:
    """All members of some groups, at most `size` at a time."""
    samples = [(g, k) for g in groups for k in range(len(g.seeds))]
    for start in range(0, len(samples), size):
        chosen = samples[start : start + size]
        yield Samples(
            torch.tensor([g.index for g, _ in chosen]),
            [g.prompt for g, _ in chosen],
            [g.seeds[k] for g, k in chosen],
            [g.noise_seeds[k] for g, k in chosen],
        )


@dataclass
class Batch:
    """A micro-batch of N samples, M scored pictures: the last of each sample (M = N), or several, one after another.

    `group_ids`, `scores` and `advantages` are of the M pictures; scores and advantages come later.
    """

    trajectory: Trajectory
    group_ids: Tensor  # (M,)
    images: Tensor | None = None  # (M, 3, H, W), where not the trajectory's; let go of once handed on
    scores: Scored | None = None
    advantages: Tensor | None = None


@dataclass(frozen=True)
class Gathered:
    """Scores of all processes' M pictures, in order of group and member: the same on any number of processes."""

    ids: Tensor  # (M,) int64, of groups, ascending
    parts: Tensor  # (P, M), raw scores of the reward's members
    shaped: Tensor  # (K, M), what `Scorer.combine` takes
    rewards: Tensor  # (M,) float64: each means something by itself
    valid: Tensor  # (M,) bool: no member failed on it
    labels: tuple[str, ...]  # of the parts
    order: Tensor  # (M,): place of each in the order of gathering, process by process
    share: slice  # of that order: this process's

    @property
    def seen(self) -> tuple[Tensor, Tensor]:
        """Groups and rewards in the order of gathering, the main process's first, as the hacking watch wants them."""
        back = torch.argsort(self.order)
        return self.ids[back], self.rewards[back]

    def mine(self, values: Tensor) -> Tensor:
        """Of (M,): this process's, in the order in which it gave them."""
        return values[torch.argsort(self.order)][self.share]

    def assign(self, batches: Sequence[Batch], advantages: Tensor) -> None:
        """Give this process's batches their part of the advantages (M,), 0 where scoring failed."""
        mine = self.mine(advantages.float().cpu() * self.valid.float())
        for batch, part in zip(batches, mine.split([len(b.group_ids) for b in batches])):
            batch.advantages = part.to(batch.trajectory.final.device)

    def values(self) -> dict[str, float]:
        """What to log."""
        groups = group_statistics(self.rewards, self.ids)
        named = zip(self.labels, self.parts.mean(1).tolist()) if len(self.parts) > 1 else ()
        return {
            "reward_mean": self.rewards.mean().item(),
            "reward_std_in_group": groups.stds.mean().item(),
            "zero_std_groups": groups.zero_std_fraction,
            "failed_scores": int((~self.valid).sum()),
            **{f"reward_{label}": mean for label, mean in named},
        }


class Scoring:
    """Pictures on their way through the reward; with threads it works while sampling goes on."""

    def __init__(self, run: Run, scorer: Scorer, accelerator: Accelerator) -> None:
        self.run, self.scorer, self.accelerator = run, scorer, accelerator
        self._held: list[Batch] = []
        self._waiting: list[tuple[list[Batch], Future[list[Scored]]]] = []

    def add(self, batch: Batch) -> None:
        """Hand a batch to the reward; one that compares a group's samples gets it at the next `flush`."""
        self._held.append(batch)
        if not self.scorer.whole:
            self.flush()

    def flush(self) -> None:
        """Hand all batches that are held back to the reward, to be scored together."""
        if not self._held:
            return
        pictures = [b.trajectory.images if b.images is None else b.images for b in self._held]
        images = [i for i in pictures if i is not None]
        prompts = [p for b in self._held for p in b.trajectory.prompts * (len(b.group_ids) // len(b.trajectory))]
        with self.run.stage("score"):
            ids = torch.cat([b.group_ids for b in self._held])
            self._waiting.append((self._held, self.scorer.submit(images, prompts, ids)))
        for batch in self._held:
            batch.images = None
        self._held = []

    def collect(self, batches: Sequence[Batch]) -> Gathered:
        """Wait for every score, and gather those of these batches and of the other processes'."""
        with self.run.stage("score"):
            for waited, future in self._waiting:
                for batch, scores in zip(waited, future.result()):
                    batch.scores = scores
        self._waiting = []
        ids = torch.cat([b.group_ids for b in batches])
        return self._gather(ids, [b.scores for b in batches if b.scores is not None])

    def score(self, images: Tensor, prompts: Sequence[str], group_ids: Tensor, size: int) -> Gathered:
        """Score pictures, `size` at a time unless the reward compares a group's; gather those of all processes."""
        size = len(images) if self.scorer.whole else size
        parts = [slice(k, k + size) for k in range(0, len(images), size)]
        with self.run.stage("score"):
            waiting = [self.scorer.submit([images[part]], prompts[part], group_ids[part]) for part in parts]
            scored = [scores for future in waiting for scores in future.result()]
        return self._gather(group_ids, scored)

    def _gather(self, group_ids: Tensor, scored: Sequence[Scored]) -> Gathered:
        """The scores of all processes, which all hold as many; each group is on one of them."""
        accelerator, device, labels = self.accelerator, self.accelerator.device, self.scorer.labels
        ids = accelerator.gather(group_ids.to(device)).cpu()
        rows = accelerator.gather(torch.cat([s.rows for s in scored]).to(device)).cpu()
        order = torch.argsort(ids, stable=True)
        parts, shaped, valid = rows[order, : len(labels)].T, rows[order, len(labels) : -1].T, rows[order, -1] > 0
        count = len(ids) // accelerator.num_processes
        share = slice(accelerator.process_index * count, (accelerator.process_index + 1) * count)
        return Gathered(ids[order], parts, shaped, self.scorer.plain(shaped), valid, labels, order, share)
