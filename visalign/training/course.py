"""A training under way: what a trainer's loop needs beside its algorithm.

    with open_course(cfg, "vgpo", cfg.prompts_per_step) as course:
        for step in course.steps():
            ...  # sample, score, learn
            course.end_step(values, drawn, group_ids, rewards, images)

Evaluation before and after, the hacking watch, metrics, pictures, checkpoints, stopping and the summary are done here.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from visalign.rollout import Trajectory

from . import outcome, preflight, setup
from .config import save_config
from .data import Group, share_of
from .evaluate import Evaluation
from .run import WATCH, Run
from .scoring import Scored
from .watching import roll_back, watch, watch_evaluation


@dataclass
class Gathered:
    """The scores of all processes, group by group, in the same order on any number of processes.

    Attributes:
        ids: (N,) ascending. parts: (P, N). shaped: (K, N). valid: (N,), 1 or, where a member failed, 0.
    """

    ids: Tensor
    parts: Tensor
    shaped: Tensor
    valid: Tensor
    order: Tensor  # of the samples as gathered: process by process
    start: int  # of this process's samples there
    count: int

    def mine(self, values: Tensor) -> Tensor:
        """Of (..., N): this process's samples, in the order in which it gave them."""
        return values[..., torch.argsort(self.order)][..., self.start : self.start + self.count]

    def first_mine(self, values: Tensor) -> Tensor:
        """Of (N,): all samples as gathered, the main process's first, as `watch` wants them."""
        return values[torch.argsort(self.order)]


class Course:
    """One process's part in a training."""

    def __init__(self, cfg: Any, plan: preflight.Plan, accelerator: Accelerator, parts: setup.Parts, run: Run):
        self.cfg, self.plan, self.accelerator, self.parts, self.run = cfg, plan, accelerator, parts, run
        self._started = 0.0
        self._stop = False

    def steps(self) -> Iterator[int]:
        """The iterations that are left, between the evaluation before and the one after."""
        cfg, run, parts = self.cfg, self.run, self.parts
        if self.accelerator.is_main_process:
            save_config(replace(cfg, resume=None), self.plan.folder / "config.yaml")
        outcome.announce(run, cfg, self.plan, parts)
        if parts.before is None:
            parts.before = self._evaluate()
            outcome.say_evaluation(run, parts.before, "before")
            run.log(0, outcome.evaluation_values(parts.before))
        with run.progress:
            for step in range(parts.step, cfg.steps):
                self._started = time.monotonic()
                yield step
                if parts.step != step + 1:
                    raise RuntimeError(f"step {step}: got no end_step, expected one in each iteration")
                if self._stop:
                    break
            if parts.step == cfg.steps or run.stopping == WATCH:
                if run.stopping == WATCH and cfg.monitor == "rollback":
                    roll_back(run, parts)
                outcome.finish(run, cfg, self.plan, parts, self._evaluate())

    def share(self, groups: Sequence[Group]) -> list[Group]:
        """This process's groups."""
        return share_of(groups, self.accelerator.process_index, self.accelerator.num_processes)

    def gather(self, group_ids: Tensor, scored: Sequence[Scored]) -> Gathered:
        """The scores of all processes, which all hold as many.

        Args:
            group_ids: (n,) of this process's samples; each group is on one process.
            scored: of the same samples, in pieces.
        """
        accelerator, device = self.accelerator, self.accelerator.device
        ids = accelerator.gather(group_ids.to(device)).cpu()
        rows = accelerator.gather(torch.cat([s.rows for s in scored]).to(device)).cpu()
        order = torch.argsort(ids, stable=True)
        rows, labels = rows[order].T, len(self.parts.scorer.labels)
        count = len(ids) // accelerator.num_processes
        start = accelerator.process_index * count
        return Gathered(ids[order], rows[:labels], rows[labels:-1], rows[-1], order, start, count)

    def _evaluate(self, count: int | None = None) -> Evaluation:
        prompts = self.plan.eval_prompts[:count]
        return setup.evaluate_average(self.run, self.cfg, self.parts, self.accelerator, prompts)

    def end_step(
        self,
        values: dict[str, Any],
        drawn: Sequence[tuple[Tensor, Sequence[str]]],
        group_ids: Tensor,
        rewards: Tensor,
        images: int,
    ) -> None:
        """Watch, evaluate where due, log, save: whatever is done once an iteration has learnt.

        Args:
            values: to log; "reward_mean" among them.
            drawn: images and prompts of this process.
            group_ids, rewards: (N,) of all processes, the main one's first.
            images: sampled in this iteration, on all processes.
        """
        cfg, run, parts = self.cfg, self.run, self.parts
        step = parts.step
        values |= watch(run, parts, step + 1, drawn, group_ids, rewards, values.get("kl"))
        parts.after_step(step + 1, time.monotonic() - self._started, images)
        if cfg.eval_every and (step + 1) % cfg.eval_every == 0:  # also when stopping: as the unbroken run
            evaluation = self._evaluate(cfg.eval_during)
            values |= outcome.evaluation_values(evaluation)
            watch_evaluation(run, parts, step + 1, evaluation, values)
            setup.keep_best(parts, evaluation)
        self._stop = setup.stopping(run, self.accelerator)
        run.log(step + 1, {**values, "learning_rate": parts.learning_rate(step)})
        if step % max(1, cfg.steps // 10) == 0:
            run.save_grid(f"step-{step + 1}.png", drawn[0][0][:16])
        # After the log: what a kill in between leaves in it is dropped at resume, and written again.
        setup.checkpoint(run, cfg, parts, self.accelerator, last=self._stop or step + 1 == cfg.steps)
        run.advance(step + 1, f"reward {values['reward_mean']:.3f}")
        if self._stop:
            run.say(f"stopped after step {step + 1} of {cfg.steps}; go on with --resume {self.plan.folder}")


@contextmanager
def open_course(cfg: Any, trainer: str, prompts_per_update: int) -> Iterator[Course]:
    """Check all that can be checked, then load; afterwards, threads and files are closed.

    Args:
        trainer: its name, of the run folder.
        prompts_per_update: groups that the processes share.

    Raises:
        ValueError: a mistake in the options; nothing is loaded or written then.
    """
    plan = preflight.make_plan(cfg, trainer)
    accelerator = Accelerator()
    preflight.check_shares(prompts_per_update, accelerator)
    plan.folder = setup.same_on_all(plan.folder)
    parts = setup.build(cfg, plan, accelerator)
    run = Run(plan.folder, main=accelerator.is_main_process, total=cfg.steps, done=parts.step)
    try:
        yield Course(cfg, plan, accelerator, parts, run)
    finally:
        parts.scorer.close()
        run.close()
    accelerator.end_training()


def shown(trajectories: Sequence[Trajectory]) -> list[tuple[Tensor, Sequence[str]]]:
    """Images and prompts, as `Course.end_step` wants them."""
    return [(t.images, t.prompts) for t in trajectories if t.images is not None]
