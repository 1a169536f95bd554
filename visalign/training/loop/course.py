"""A training under way: what a trainer's loop needs beside its algorithm.

    plan = make_plan(cfg, "vgpo")
    with open_course(cfg, plan, cfg.prompts_per_step) as course:
        for step in course.steps():
            ...  # sample, score, learn
            course.end_step(values, drawn, group_ids, rewards, images)

Evaluation before and after, the hacking watch, metrics, pictures, checkpoints, stopping and the summary are done here.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from visalign.data.prompts import Group, iteration_groups, share_of
from visalign.pipeline.generator import Generator
from visalign.training.before import preflight
from visalign.training.before.config import save_config
from visalign.training.policy import scaled_change
from visalign.training.run import outcome
from visalign.training.run.folder import WATCH, Run
from visalign.training.watch.watching import roll_back, watch, watch_evaluation

from . import setup
from .batches import Batch, Scoring
from .evaluate import Evaluation, Extras


class Course:
    """One process's part in a training.

    Attributes:
        scoring: hands pictures to the reward, and gathers the scores of all processes.
        scale: of the averaged weights, LoRA or difference to the start, where they are evaluated and exported.
        extras: (rows, prompts) of some held-out prompts to the pipeline's inputs and the rewards' context, if any.
        patience: evaluations under way without a better one after which training ends at the best; 0: it does not.
    """

    def __init__(self, cfg: Any, plan: preflight.Plan, accelerator: Accelerator, parts: setup.Parts, run: Run) -> None:
        self.cfg, self.plan, self.accelerator, self.parts, self.run = cfg, plan, accelerator, parts, run
        self.scoring = Scoring(run, parts.scorer, accelerator)
        self.scale, self.patience = 1.0, 0
        self.extras: Extras | None = None
        self._started = 0.0
        self._stop = self._ended = False

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
            if parts.step == cfg.steps or run.stopping == WATCH or self._ended:
                if self._ended or run.stopping == WATCH and cfg.monitor == "rollback":
                    roll_back(run, parts)
                outcome.finish(run, cfg, self.plan, parts, self._evaluate(), self._weights())

    def groups(
        self, step: int, size: int, updates: int = 1, same_latents: bool = False
    ) -> tuple[list[Group], list[list[Group]]]:
        """The groups of an iteration, `size` samples each, and of each update's this process's share: whole groups."""
        cfg, accelerator = self.cfg, self.accelerator
        groups = iteration_groups(self.plan.prompts, step, cfg.prompts_per_step, size, cfg.seed, same_latents)
        count = len(groups) // updates
        shares = [groups[k : k + count] for k in range(0, len(groups), count)]
        return groups, [share_of(share, accelerator.process_index, accelerator.num_processes) for share in shares]

    def _weights(self) -> dict[str, Tensor]:
        return scaled_change(self.parts.policy, self.parts.average.values, self.scale)

    def _evaluate(self, count: int | None = None) -> Evaluation:
        prompts, values = self.plan.eval_prompts[:count], self._weights()
        return setup.evaluate_with(values, self.run, self.cfg, self.parts, self.accelerator, prompts, self.extras)

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
            drawn: images and prompts of this process; where there are none, nothing is watched.
            group_ids, rewards: (N,) of all processes, the main one's first.
            images: sampled in this iteration, on all processes.
        """
        cfg, run, parts = self.cfg, self.run, self.parts
        step = parts.step
        if drawn:
            values |= watch(run, parts, step + 1, drawn, group_ids, rewards, values.get("kl"))
        parts.after_step(step + 1, time.monotonic() - self._started, images)
        if cfg.eval_every and (step + 1) % cfg.eval_every == 0:  # also when stopping: as the unbroken run
            evaluation = self._evaluate(cfg.eval_during)
            values |= outcome.evaluation_values(evaluation)
            watch_evaluation(run, parts, step + 1, evaluation, values)
            setup.keep_best(parts, evaluation)
        if self.patience and parts.best is not None:
            self._ended = step + 1 - parts.best[1] >= self.patience * cfg.eval_every
        self._stop = setup.stopping(run, self.accelerator) or self._ended
        run.log(step + 1, {**values, "learning_rate": parts.learning_rate(step)})
        if drawn and step % max(1, cfg.steps // 10) == 0:
            run.save_grid(f"step-{step + 1}.png", drawn[0][0][:16])
        # After the log: what a kill in between leaves in it is dropped at resume, and written again.
        setup.checkpoint(run, cfg, parts, self.accelerator, last=self._stop or step + 1 == cfg.steps)
        run.advance(step + 1, f"reward {values['reward_mean']:.3f}")
        if self._stop:
            said = "no better evaluation since" if self._ended else f"go on with --resume {self.plan.folder}"
            run.say(f"stopped after step {step + 1} of {cfg.steps}; {said}")


@contextmanager
def open_course(
    cfg: Any,
    plan: preflight.Plan,
    prompts_per_update: int,
    inputs: Callable[[Generator], dict[str, Any]] | None = None,
    component: str | None = None,
) -> Iterator[Course]:
    """Load what the plan says; afterwards, threads and files are closed.

    Args:
        prompts_per_update: groups that the processes share.
        inputs: of the pipeline's calls, for those that need more than prompts (for one prompt).
        component: module that is trained; None: the main one.

    Raises:
        ValueError: processes that cannot share the groups, before anything is loaded; or what only the model tells.
    """
    accelerator = Accelerator()
    preflight.check_shares(prompts_per_update, accelerator)
    plan.folder = setup.same_on_all(plan.folder)
    parts = setup.build(cfg, plan, accelerator, inputs, component)
    run = Run(plan.folder, main=accelerator.is_main_process, total=cfg.steps, done=parts.step)
    try:
        yield Course(cfg, plan, accelerator, parts, run)
    finally:
        parts.scorer.close()
        run.close()
    accelerator.end_training()


def shown(batches: Sequence[Batch]) -> list[tuple[Tensor, Sequence[str]]]:
    """Images and prompts, as `Course.end_step` wants them."""
    trajectories = [b.trajectory for b in batches]
    return [(t.images, t.prompts) for t in trajectories if t.images is not None]
