"""What an iteration of a policy-gradient trainer is made of, beside its formulas: batches, scores, sums, the end."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from visalign.advantages import group_statistics
from visalign.rollout import Trajectory
from visalign.transitions import Transition

from . import preflight, setup
from .evaluate import Evaluation, evaluate
from .options import CommonConfig
from .run import Run
from .scoring import Scored, Scorer


@dataclass
class Batch:
    """A micro-batch: its samples' groups (N,), their scores when they are there, and then the advantages (N,)."""

    trajectory: Trajectory
    group_ids: Tensor
    scores: Scored | None = None
    advantages: Tensor | None = None


class Scoring:
    """Batches on their way through the reward; with threads it works while sampling goes on."""

    def __init__(self, run: Run, scorer: Scorer) -> None:
        self.run, self.scorer = run, scorer
        self._waiting: list[tuple[list[Batch], Future[list[Scored]]]] = []

    def submit(self, batches: list[Batch]) -> None:
        """Hand batches to the reward, to be scored together."""
        images = [b.trajectory.images for b in batches if b.trajectory.images is not None]
        prompts = [prompt for b in batches for prompt in b.trajectory.prompts]
        with self.run.stage("score"):
            ids = torch.cat([b.group_ids for b in batches])
            self._waiting.append((batches, self.scorer.submit(images, prompts, ids)))

    def collect(self) -> None:
        """Wait until every batch that was submitted has its scores."""
        with self.run.stage("score"):
            for batches, future in self._waiting:
                for batch, scores in zip(batches, future.result()):
                    batch.scores = scores
        self._waiting = []


@dataclass(frozen=True)
class Gathered:
    """Scores of all processes' M samples, in order of group and member: the same on any number of processes."""

    ids: Tensor  # (M,) int64, of groups
    parts: Tensor  # (P, M), raw scores of the reward's members
    rewards: Tensor  # (M,) float64: each means something by itself
    combined: Tensor  # (M,): rewards or, where the reward gives them, advantages
    valid: Tensor  # (M,) bool: no member failed on the sample
    labels: tuple[str, ...]
    order: Tensor  # (M,): place of each in the order of gathering, this process's samples first
    mine: slice  # of the order of gathering

    @property
    def seen(self) -> tuple[Tensor, Tensor]:
        """Groups and rewards in the order of gathering, for the hacking watch."""
        back = torch.argsort(self.order)
        return self.ids[back], self.rewards[back]

    def assign(self, batches: Sequence[Batch], advantages: Tensor) -> None:
        """Give this process's batches their part of the advantages (M,), 0 where scoring failed."""
        gathered = torch.empty(len(self.ids))
        gathered[self.order] = advantages.float().cpu() * self.valid.float()
        for batch, part in zip(batches, gathered[self.mine].split([len(b.group_ids) for b in batches])):
            batch.advantages = part.to(batch.trajectory.final.device)

    def values(self, advantages: Tensor) -> dict[str, float]:
        """What to log."""
        groups = group_statistics(self.rewards, self.ids)
        named = zip(self.labels, self.parts.mean(1).tolist()) if len(self.parts) > 1 else ()
        return {
            "reward_mean": self.rewards.mean().item(),
            "reward_std_in_group": groups.stds.mean().item(),
            "zero_std_groups": groups.zero_std_fraction,
            "advantage_abs_mean": (advantages.float().cpu() * self.valid.float()).abs().mean().item(),
            "failed_scores": int((~self.valid).sum()),
            **{f"reward_{label}": mean for label, mean in named},
        }


def gather_scores(accelerator: Accelerator, scorer: Scorer, batches: Sequence[Batch]) -> Gathered:
    """The scores of all processes, combined where the reward has several members."""
    device = accelerator.device
    ids = accelerator.gather(torch.cat([b.group_ids for b in batches]).to(device)).cpu()
    rows = torch.cat([b.scores.rows for b in batches if b.scores is not None])
    rows = accelerator.gather(rows.to(device)).cpu()
    order = torch.argsort(ids, stable=True)
    parts, shaped = rows[order, : len(scorer.labels)].T, rows[order, len(scorer.labels) : -1].T
    combined = scorer.combine(shaped, ids[order])
    count, place = len(ids) // accelerator.num_processes, accelerator.process_index
    mine = slice(place * count, (place + 1) * count)
    valid = rows[order, -1] > 0
    return Gathered(ids[order], parts, scorer.plain(shaped), combined, valid, scorer.labels, order, mine)


def mean_over_processes(accelerator: Accelerator, sums: dict[str, Tensor], names: Sequence[str]) -> dict[str, float]:
    """Sums of all processes, divided by those called "count"; 0 where a process has none."""
    zero = torch.zeros((), device=accelerator.device)
    values = torch.stack([sums.get(n, zero).to(zero.device).float() for n in (*names, "count")])
    values = accelerator.reduce(values, "sum")
    return dict(zip(names, (values[:-1] / values[-1].clamp(min=1)).tolist()))


def evaluate_average(
    cfg: CommonConfig,
    accelerator: Accelerator,
    run: Run,
    parts: setup.Parts,
    transition: Transition,
    prompts: Sequence[str],
) -> Evaluation:
    """The averaged weights on held-out prompts."""
    with run.stage("evaluate"), parts.policy.swapped(parts.average.values):
        return evaluate(
            parts.generator,
            transition,
            prompts,
            parts.judges,
            seed=cfg.eval_seed,
            batch_size=cfg.batch_size,
            process=accelerator.process_index,
            processes=accelerator.num_processes,
            gather=lambda t: accelerator.gather(t.to(accelerator.device)),
        )


@contextmanager
def opened(
    cfg: CommonConfig, plan: preflight.Plan, prompts_per_update: int
) -> Iterator[tuple[Accelerator, setup.Parts, Run]]:
    """Everything a training needs, built of its plan; closed at the end, whatever the end."""
    accelerator = Accelerator()
    preflight.check_shares(prompts_per_update, accelerator)
    plan.folder = setup.same_on_all(plan.folder)
    parts = setup.build(cfg, plan, accelerator)
    run = Run(plan.folder, main=accelerator.is_main_process, total=cfg.steps, done=parts.step)
    try:
        yield accelerator, parts, run
    finally:
        parts.scorer.close()
        run.close()
    accelerator.end_training()
