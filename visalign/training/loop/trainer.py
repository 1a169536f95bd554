"""What a trainer is, and the function that runs one.

class MyTrainer(Trainer):
    name, config, kinds = "my_trainer", MyConfig, ("flow",)

    def iteration(self, step: int) -> Iteration: ...  # sample, score, learn

train(MyTrainer, MyConfig(steps=100))
"""

import signal
import sys
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from visalign.pipeline.generator import Generator
from visalign.training.before import preflight
from visalign.training.before.config import parse_config
from visalign.training.before.options import CommonConfig

from .training_loop import Iteration, TrainingLoop, open_training


class Trainer(ABC):
    """One process's part in a training; a subclass is an algorithm.

    Attributes:
        name: of the command, the run folder and messages.
        config: its options, a frozen dataclass.
        kinds: of model that it takes, of "flow", "diffusion", "consistency"; None: all.
    """

    name: ClassVar[str]
    config: ClassVar[type[CommonConfig]]
    kinds: ClassVar[tuple[str, ...] | None] = None

    def __init__(self, loop: TrainingLoop) -> None:
        self.cfg, self.loop, self.state, self.run = loop.cfg, loop, loop.state, loop.run
        self.generator, self.scorer = self.state.generator, self.state.scorer
        self.schedule = self.generator.schedule
        if self.kinds is not None:
            preflight.check_kind(self.cfg.model, self.schedule.kind, self.kinds)

    @abstractmethod
    def iteration(self, step: int) -> Iteration:
        """Sample, score and learn once; all processes call it together."""

    def finish(self) -> None:
        """Called after the last iteration of a run."""
        return

    # Before a model loads --------------------------------------------------------------------------------------------

    @classmethod
    def plan(cls, cfg: Any) -> preflight.Plan:
        """All that can be refused before a model loads."""
        return preflight.make_plan(cfg, cls.name, kinds=cls.kinds)

    @classmethod
    def prompts_per_update(cls, cfg: Any) -> int:
        """Groups that the processes share in whole numbers."""
        return cfg.prompts_per_step // getattr(cfg, "updates_per_step", 1)

    @classmethod
    def inputs(cls, cfg: Any, plan: preflight.Plan, generator: Generator) -> dict[str, Any]:
        """Of the pipeline's calls for one prompt, where it needs more than the prompt."""
        return {}

    @classmethod
    def component(cls, cfg: Any) -> str | None:
        """The module that is trained; None: the main one."""
        return None


def check_trainer(where: str, trainer: Any) -> None:
    """Refuse what `train` cannot run.

    Raises:
        ValueError: no Trainer, or one that lacks something; names it.
    """
    if not isinstance(trainer, type) or not issubclass(trainer, Trainer):
        raise ValueError(f"trainer: got {where!r}, which is no subclass of visalign.training.loop.trainer.Trainer")
    missing = [name for name in ("name", "config") if not hasattr(trainer, name)] + sorted(trainer.__abstractmethods__)
    if missing:
        raise ValueError(f"trainer: got {where!r} without {missing[0]!r}, expected name, config and iteration")


def train(trainer_class: type[Trainer], cfg: Any) -> Path:
    """Train; returns the run folder."""
    return _train(trainer_class, cfg)[0]


def _train(trainer_class: type[Trainer], cfg: Any) -> tuple[Path, str | None]:
    """The run folder, and the signal that ended the run before its last step, if one did."""
    plan = trainer_class.plan(cfg)
    inputs, component = trainer_class.inputs, trainer_class.component(cfg)
    with open_training(
        cfg, plan, trainer_class.prompts_per_update(cfg), lambda generator: inputs(cfg, plan, generator), component
    ) as loop:
        trainer = trainer_class(loop)
        for step in loop.steps():
            loop.end_step(trainer.iteration(step))
        trainer.finish()
    return plan.folder, loop.interrupted


def launch(trainer_class: type[Trainer], argv: list[str] | None = None) -> None:
    """A trainer's command line: its options, then the training. The first paragraph of its module describes it.

    A mistake, or a failed reward, ends with one line on stderr and exit status 2. A run that a signal ended before its
    last step ends with 128 + its number (SIGTERM: 143, Ctrl-C: 130): saved, and unfinished.
    """
    name, text = trainer_class.name, sys.modules[trainer_class.__module__].__doc__ or ""
    cfg = parse_config(trainer_class.config, argv, prog=name, description=text.split("\n\n")[0])
    try:
        interrupted = _train(trainer_class, cfg)[1]
    except (ValueError, OSError) as error:
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"{name}: stopped at once; the last checkpoint is whole, go on with --resume", file=sys.stderr)
        raise SystemExit(130) from None
    if interrupted:
        raise SystemExit(128 + signal.Signals[interrupted])
