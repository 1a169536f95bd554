"""Micro-batches of an iteration: cut from its groups, scored, given their part of the advantages.

One record of scores grows on the way: `submit` hands batches to the reward, `gather` joins the scores of all batches
and processes, `GatheredScores.assign` hands the advantages made of them back to the batches.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from visalign.advantages.group import group_statistics
from visalign.data.prompts import Group
from visalign.rewards import RewardError, Scores, fill_invalid
from visalign.sampling.rollout import Trajectory
from visalign.training.run.folder import Run

from .scoring import Scorer


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


@dataclass(frozen=True)
class Batch:
    """A micro-batch of N samples, M scored images: the last of each sample (M = N), or several, one after another.

    `group_ids`, `advantages` and `valid` are of the M images; the last two come of `GatheredScores.assign`.
    """

    trajectory: Trajectory
    group_ids: Tensor  # (M,)
    images: Tensor | None = None  # (M, 3, H, W), where not the trajectory's; let go of once handed on
    advantages: Tensor | None = None  # (M,), 0 where scoring failed
    valid: Tensor | None = None  # (M,) bool: scored


class Submitted(NamedTuple):
    """Batches that the reward has been handed, and their scores to come, in order."""

    batches: list[Batch]
    scores: list[Future[list[Scores]]]


def submit(run: Run, scorer: Scorer, batches: Iterable[Batch]) -> Submitted:
    """Hand batches to the reward as they are sampled, so that it can work meanwhile.

    A reward that compares a group's samples gets all of them together: the batches must hold whole groups.
    """
    taken: list[Batch] = []
    futures: list[Future[list[Scores]]] = []
    held: list[Batch] = []

    def hand_over() -> None:
        pictures = [b.trajectory.images if b.images is None else b.images for b in held]
        images = [i for i in pictures if i is not None]
        prompts = [p for b in held for p in b.trajectory.prompts * (len(b.group_ids) // len(b.trajectory))]
        with run.stage("score"):
            futures.append(scorer.submit(images, prompts, torch.cat([b.group_ids for b in held])))
        taken.extend(replace(b, images=None) for b in held)
        held.clear()

    for batch in batches:
        held.append(batch)
        if not scorer.needs_groups:
            hand_over()
    if held:
        hand_over()
    return Submitted(taken, futures)


@dataclass(frozen=True, kw_only=True)
class GatheredScores(Scores):
    """Scores of all processes' M images, float64, in order of group and member: the same on any number of processes.

    `total` means something for each sample by itself; `Scorer.combine(shaped, group_ids, scored)` may say more. What
    stands for failed samples are the means of their groups: of no meaning, and in no statistic (`valid`).
    """

    group_ids: Tensor  # (M,) int64, ascending
    order: Tensor  # (M,): place of each in the order of gathering, process by process
    share: slice  # of that order: this process's

    @property
    def as_gathered(self) -> tuple[Tensor, Tensor]:
        """Groups and rewards in the order of gathering, the main process's first, as the hacking watch wants them.

        NaN where scoring failed.
        """
        back = torch.argsort(self.order)
        return self.group_ids[back], self.total.masked_fill(~self.valid, math.nan)[back]

    def local(self, values: Tensor) -> Tensor:
        """Of (M,): this process's, in the order in which it gave them."""
        return values[torch.argsort(self.order)][self.share]

    def assign(self, shares: Sequence[Submitted], advantages: Tensor) -> list[list[Batch]]:
        """This process's batches with their part of the advantages (M,), 0 where scoring failed; share by share."""
        sizes = [len(batch.group_ids) for share in shares for batch in share.batches]
        values = self.local(advantages.float().cpu() * self.valid.float()).split(sizes)
        parts = iter(zip(values, self.local(self.valid).split(sizes)))

        def assigned(batch: Batch) -> Batch:
            values, valid = next(parts)
            return replace(batch, advantages=values.to(batch.trajectory.final.device), valid=valid)

        return [[assigned(batch) for batch in share.batches] for share in shares]

    def values(self) -> dict[str, float]:
        """What to log."""
        groups = group_statistics(self.total, self.group_ids, valid=self.valid)
        named = self.parts.items() if len(self.parts) > 1 else ()
        return {
            "reward_mean": self.total[self.valid].mean().item(),
            "reward_std_in_group": groups.stds.mean().item(),
            "zero_std_groups": groups.zero_std_fraction,
            "failed_scores": int((~self.valid).sum()),
            **{f"reward_{label}": values[self.scored[label]].mean().item() for label, values in named},
        }


def gather(accelerator: Accelerator, scorer: Scorer, group_ids: Tensor, scores: Sequence[Scores]) -> GatheredScores:
    """The scores of all processes, which all hold as many; each group is on one of them.

    Args:
        group_ids: (m,) of this process's images, whose scores come in the same order.

    Raises:
        RewardError: not one image of all processes could be scored.
    """
    device, labels = accelerator.device, scorer.labels

    def rows_of(s: Scores) -> Tensor:
        parts, scored = (torch.stack([values[label] for label in labels]) for values in (s.parts, s.scored))
        return torch.cat([parts, scored, s.valid[None], s.shaped]).double().T

    rows = torch.cat([rows_of(s) for s in scores])  # all of it in one tensor, to be gathered at once
    ids = accelerator.gather(group_ids.to(device)).cpu()
    rows = accelerator.gather(rows.to(device)).cpu()
    order = torch.argsort(ids, stable=True)
    sizes = [len(labels), len(labels), 1, rows.shape[1] - 2 * len(labels) - 1]
    parts, scored, valid, shaped = rows[order].T.split(sizes)
    ids, valid, scored = ids[order], valid[0] > 0, scored > 0
    problem = next((s.problem for s in scores if s.problem), None)
    if not valid.any():
        raise RewardError(scorer.reward.name, f"could score none of {len(ids)} images ({problem}); nothing was updated")
    if not (scored.all() and valid.all()):
        known = dict(zip(labels, scored))
        parts = torch.stack([fill_invalid(p, v, ids, "later") for p, v in zip(parts, scored)])
        filled = [fill_invalid(row, known[label], ids) for row, label in zip(shaped, scorer.used)]
        shaped = torch.stack(filled) if filled else shaped
    count = len(ids) // accelerator.num_processes
    share = slice(accelerator.process_index * count, (accelerator.process_index + 1) * count)
    named = (dict(zip(labels, parts)), shaped, valid, dict(zip(labels, scored)), problem)
    return GatheredScores(scorer.plain(shaped), *named, group_ids=ids, order=order, share=share)
