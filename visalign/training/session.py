"""What stands around a trainer's loop: its parts built and given back, evaluations, the last words."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from visalign.generator import Generator

from . import outcome, preflight, setup
from .config import save_config
from .evaluate import Evaluation, Extras
from .options import CommonConfig
from .policy import scaled_change
from .run import WATCH, Run
from .watching import roll_back


@contextmanager
def session(
    cfg: CommonConfig,
    plan: preflight.Plan,
    share: int,
    inputs: Callable[[Generator], dict[str, Any]] | None = None,
    component: str | None = None,
) -> Iterator[tuple[Accelerator, setup.Parts, Run]]:
    """The processes, what is trained, and the run's instruments; all closed at the end, whatever happens.

    Args:
        share: prompts an update, which the processes must be able to share.
        inputs: of the pipeline's calls, for those that need more than prompts (for one prompt).
        component: module that is trained; None: the main one.
    """
    accelerator = Accelerator()
    preflight.check_shares(share, accelerator)
    plan.folder = setup.same_on_all(plan.folder)
    parts = setup.build(cfg, plan, accelerator, inputs, component)
    run = Run(plan.folder, main=accelerator.is_main_process, total=cfg.steps, done=parts.step)
    try:
        if accelerator.is_main_process:
            save_config(replace(cfg, resume=None), plan.folder / "config.yaml")
        outcome.announce(run, cfg, plan, parts)
        yield accelerator, parts, run
    finally:
        parts.scorer.close()
        run.close()
    accelerator.end_training()


class Evaluator:
    """Evaluations of a session's averaged weights, LoRA or difference to the start scaled by `scale`.

    Args:
        extras: (rows, prompts) of some held-out prompts to the pipeline's inputs and the rewards' context, if any.
    """

    def __init__(
        self,
        cfg: CommonConfig,
        plan: preflight.Plan,
        accelerator: Accelerator,
        parts: setup.Parts,
        run: Run,
        scale: float = 1.0,
        extras: Extras | None = None,
    ) -> None:
        self.cfg, self.plan, self.accelerator, self.parts, self.run = cfg, plan, accelerator, parts, run
        self.scale, self.extras = scale, extras

    def values(self) -> dict[str, Tensor]:
        """The averaged weights, scaled: those that are evaluated and exported."""
        return scaled_change(self.parts.policy, self.parts.average.values, self.scale)

    def __call__(self, count: int | None = None) -> Evaluation:
        """On the first `count` held-out prompts, without noise in the steps."""
        return setup.evaluate_average(
            self.run,
            self.cfg,
            self.parts,
            self.accelerator,
            self.plan.eval_prompts[:count],
            values=self.values(),
            extras=self.extras,
        )

    def before(self) -> None:
        """The evaluation before the first step, unless a resumed run has it."""
        if self.parts.before is None:
            self.parts.before = self()
            outcome.say_evaluation(self.run, self.parts.before, "before")
            self.run.log(0, outcome.evaluation_values(self.parts.before))

    def during(self, step: int) -> dict[str, float]:
        """The evaluation under way where one is due after `step` steps; remembers the best. Returns what to log."""
        if not self.cfg.eval_every or step % self.cfg.eval_every:
            return {}
        evaluation = self(self.cfg.eval_during)
        setup.keep_best(self.parts, evaluation)
        return outcome.evaluation_values(evaluation)

    def after(self, ended: bool) -> None:
        """Where training is over: back to the best step if the watch or an early stop says so, then the last words."""
        if self.parts.step < self.cfg.steps and self.run.stopping != WATCH and not ended:
            return
        if ended or self.run.stopping == WATCH and self.cfg.monitor == "rollback":
            roll_back(self.run, self.parts)
        outcome.finish(self.run, self.cfg, self.plan, self.parts, self(), self.values())
