"""A training under way: what a trainer's iterations need beside its algorithm.

Evaluation before and after, the hacking watch, metrics, pictures, checkpoints, stopping and the summary are done here.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from visalign.data.prompts import Group, iteration_groups, share_of
from visalign.pipeline.generator import Generator
from visalign.training.before import preflight
from visalign.training.before.config import save_config
from visalign.training.policy import scaled_change
from visalign.training.run import outcome
from visalign.training.run.checkpoint import clean
from visalign.training.run.folder import WATCH, Run
from visalign.training.watch.watching import roll_back, watch, watch_evaluation

from . import setup
from .batches import Batch, GatheredScores, Submitted, gather, submit
from .evaluate import Evaluation, Extras


@dataclass(frozen=True)
class Iteration:
    """What an iteration made, to be logged and watched.

    Attributes:
        values: to log; "reward_mean" among them.
        images: of this process, with their prompts; where there are none, nothing is watched.
        group_ids, rewards: (N,) of all processes, the main one's first.
        count: images sampled, on all processes.
    """

    values: dict[str, Any]
    images: Sequence[tuple[Tensor, Sequence[str]]]
    group_ids: Tensor
    rewards: Tensor
    count: int


class TrainingLoop:
    """One process's part in a training.

    Attributes:
        scale: of the averaged weights, LoRA or difference to the start, where they are evaluated and exported.
        extras: (rows, prompts) of some held-out prompts to the pipeline's inputs and the rewards' context, if any.
        patience: evaluations under way without a better one after which training ends at the best; 0: it does not.
    """

    def __init__(
        self, cfg: Any, plan: preflight.Plan, accelerator: Accelerator, state: setup.TrainState, run: Run
    ) -> None:
        self.cfg, self.plan, self.accelerator, self.state, self.run = cfg, plan, accelerator, state, run
        self.scale, self.patience = 1.0, 0
        self.extras: Extras | None = None
        self._started = 0.0
        self._stop = self._ended = False

    def steps(self) -> Iterator[int]:
        """The iterations that are left, between the evaluation before and the one after."""
        cfg, run, state = self.cfg, self.run, self.state
        if self.accelerator.is_main_process:
            clean(self.plan.folder / "checkpoints")
            save_config(replace(cfg, resume=None), self.plan.folder / "config.yaml")
        outcome.announce(run, cfg, self.plan, state)
        if state.before is None:
            state.before = self._evaluate()
            outcome.say_evaluation(run, state.before, "before")
            run.log(0, outcome.evaluation_values(state.before))
        with run.progress:
            for step in range(state.step, cfg.steps):
                self._started = time.monotonic()
                yield step
                if state.step != step + 1:
                    raise RuntimeError(f"step {step}: got no end_step, expected one in each iteration")
                if self._stop:
                    break
            if state.step == cfg.steps or run.stopping == WATCH or self._ended:
                if self._ended or run.stopping == WATCH and cfg.monitor == "rollback":
                    roll_back(run, state)
                outcome.finish(run, cfg, self.plan, state, self._evaluate(), self._weights())

    @property
    def interrupted(self) -> str | None:
        """The signal that ended the run before its last step."""
        left = self.state.step < self.cfg.steps and not self._ended
        return self.run.stopping if left and self.run.stopping != WATCH else None

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
        return scaled_change(self.state.policy, self.state.average.values, self.scale)

    def _evaluate(self, count: int | None = None) -> Evaluation:
        prompts, values = self.plan.eval_prompts[:count], self._weights()
        return setup.evaluate_with(values, self.run, self.cfg, self.state, self.accelerator, prompts, self.extras)

    def submit(self, batches: Iterable[Batch]) -> Submitted:
        """Sample batches, and hand each to the reward, which works while the next is sampled; whole groups."""
        return submit(self.run, self.state.scorer, batches)

    def collect(self, shares: Sequence[Submitted]) -> GatheredScores:
        """Wait for the scores of all these batches, and gather them with the other processes'."""
        with self.run.stage("score"):
            scores = [s for share in shares for future in share.scores for s in future.result()]
        ids = torch.cat([batch.group_ids for share in shares for batch in share.batches])
        return gather(self.accelerator, self.state.scorer, ids, scores)

    def score(self, images: Tensor, prompts: Sequence[str], group_ids: Tensor, size: int) -> GatheredScores:
        """Score images, `size` at a time unless the reward compares a group's; gather those of all processes."""
        scorer = self.state.scorer
        size = len(images) if scorer.needs_groups else size
        parts = [slice(k, k + size) for k in range(0, len(images), size)]
        with self.run.stage("score"):
            futures = [scorer.submit([images[part]], prompts[part], group_ids[part]) for part in parts]
            scores = [s for future in futures for s in future.result()]
        return gather(self.accelerator, scorer, group_ids, scores)

    def end_step(self, made: Iteration) -> None:
        """Watch, evaluate where due, log, save: whatever is done once an iteration has learnt."""
        cfg, run, state = self.cfg, self.run, self.state
        step, values, images = state.step, dict(made.values), made.images
        if images:
            values |= watch(run, state, step + 1, images, made.group_ids, made.rewards, values.get("kl"))
        state.after_step(step + 1, time.monotonic() - self._started, made.count)
        if cfg.eval_every and (step + 1) % cfg.eval_every == 0:  # also when stopping: as the unbroken run
            evaluation = self._evaluate(cfg.eval_during)
            values |= outcome.evaluation_values(evaluation)
            watch_evaluation(run, state, step + 1, evaluation, values)
            setup.keep_best(state, evaluation)
        if self.patience and state.best is not None:
            self._ended = step + 1 - state.best[1] >= self.patience * cfg.eval_every
        self._stop = setup.stopping(run, self.accelerator) or self._ended
        outcome.say_rounding(run, cfg, values)
        run.log(step + 1, {**values, "learning_rate": state.learning_rate(step)})
        if images and step % max(1, cfg.steps // 10) == 0:
            run.save_grid(f"step-{step + 1}.png", images[0][0][:16])
        # After the log: what a kill in between leaves in it is dropped at resume, and written again.
        setup.checkpoint(run, cfg, state, self.accelerator, last=self._stop or step + 1 == cfg.steps)
        run.advance(step + 1, f"reward {values['reward_mean']:.3f}")
        if self._stop:
            why = "no better evaluation since" if self._ended else f"go on with --resume {self.plan.folder}"
            run.say(f"stopped after step {step + 1} of {cfg.steps}; {why}")


@contextmanager
def open_training(
    cfg: Any,
    plan: preflight.Plan,
    prompts_per_update: int,
    inputs: Callable[[Generator], dict[str, Any]] | None = None,
    component: str | None = None,
) -> Iterator[TrainingLoop]:
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
    with setup.claimed(plan, accelerator):
        state = setup.build(cfg, plan, accelerator, inputs, component)
        run = Run(plan.folder, main=accelerator.is_main_process, total=cfg.steps, done=state.step)
        try:
            yield TrainingLoop(cfg, plan, accelerator, state, run)
        finally:
            state.scorer.close()
            run.close()
    accelerator.end_training()


def images_of(shares: Sequence[Sequence[Batch]]) -> list[tuple[Tensor, Sequence[str]]]:
    """Images and prompts of all batches, as `Iteration.images` wants them."""
    trajectories = [batch.trajectory for share in shares for batch in share]
    return [(t.images, t.prompts) for t in trajectories if t.images is not None]
