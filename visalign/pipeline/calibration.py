"""What a pipeline's loop looks like, learned from one run of it, and refused where driving it would change it."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from visalign.transitions import ode_of

from .driver import PipelineDriver
from .loop import LoopRun
from .stepping import UnsupportedPipeline

Call = tuple[list[str], list[int], dict[str, Any]]  # prompts, seeds, inputs


@dataclass(frozen=True)
class Learned:
    """What one run tells of a pipeline.

    Attributes:
        denoisers: components that run inside the loop.
        first, last: the loop's first step (above 0 for image-to-image) and its last.
        feed: (first, dtype of the loop's latents) if the call's `latents` arrive in the loop as they are, else None.
    """

    denoisers: tuple[str, ...]
    first: int
    last: int
    feed: tuple[int, torch.dtype] | None = None


@torch.no_grad()
def learn(driver: PipelineDriver, call: Call, compare: bool = True) -> Learned:
    """Learn from one whole run along the ODE, to which the real scheduler's step and a few predictions are compared.

    Raises:
        UnsupportedPipeline: the loop is not one step per timestep, or (`compare`) our step or prediction differs from
            the stock one; says by how much.
    """
    states: list[Tensor] = []
    predictions: list[Tensor] = []
    name = type(driver.pipeline).__name__

    def step_fn(step_index: int, latents: Tensor, prediction: Tensor) -> Tensor:
        schedule = driver.schedule
        assert schedule is not None
        states.append(latents)
        predictions.append(prediction)
        following = ode_of(schedule)(schedule, step_index, latents, prediction)[0].mean
        if compare and _has_own_step(driver.scheduler, schedule.num_steps):
            stock = driver.scheduler.step(prediction, schedule.timesteps[step_index], latents, return_dict=False)[0]
            _refuse(name, f"step {step_index}", stock, following, torch.float32)
        return following

    with _modules_in_loop(driver) as called:
        run, _ = driver.run(*call, step_fn, output_type="latent")
    count = driver.schedule.num_steps if driver.schedule else 0
    if not run.seen or run.dtype is None or run.seen != list(range(run.seen[0], count)):
        raise UnsupportedPipeline(f"pipeline: got {name} with steps {run.seen}, expected one pass up to {count - 1}")
    learned = Learned(tuple(called), run.seen[0], run.seen[-1])
    if "latents" in driver.parameters and _takes_latents(driver, learned, states[0], run.dtype, call):
        learned = replace(learned, feed=(learned.first, run.dtype))
    for index in sorted({0, len(states) - 1}) if compare else ():
        again = _predict(driver, learned, states[index], run.seen[index], call)
        _refuse(name, f"prediction at step {run.seen[index]}", predictions[index], again, run.dtype)
    return learned


@contextlib.contextmanager
def _modules_in_loop(driver: PipelineDriver) -> Iterator[dict[str, None]]:
    """Names of the components that run while a step is under way, in the order of their first call."""
    called: dict[str, None] = {}

    def note(name: str) -> None:
        control = driver.stand_in.control
        if isinstance(control, LoopRun) and control.at is not None:
            called.setdefault(name)

    modules = driver.modules(list(driver.pipeline.components))
    hooks = [m.register_forward_pre_hook(lambda *_, name=name: note(name)) for name, m in modules.items()]
    try:
        yield called
    finally:
        for hook in hooks:
            hook.remove()


def _has_own_step(scheduler: Any, num_steps: int) -> bool:
    """Whether the scheduler's own step is the plain formula on the schedule's own levels."""
    name, config = type(scheduler).__name__, scheduler.config
    if "FlowMatch" in name:
        return True
    on_grid = config.get("timestep_spacing") == "leading" or config.num_train_timesteps % num_steps == 0
    return "DDIM" in name and on_grid


def _refuse(name: str, what: str, stock: Tensor, ours: Tensor, dtype: torch.dtype) -> None:
    difference, scale = distance(stock, ours), stock.abs().max().item()
    tolerance = (1e-4 if dtype == torch.float32 else 2e-2) * max(scale, 1e-6)
    if not difference <= tolerance:
        raise UnsupportedPipeline(
            f"pipeline: got {name}, whose {what} differs from the stock one by {difference:.1e}, "
            f"expected at most {tolerance:.1e}"
        )


def _predict(driver: PipelineDriver, learned: Learned, latents: Tensor, step: int, call: Call) -> Tensor:
    seen: list[Tensor] = []

    def step_fn(_step: int, _latents: Tensor, prediction: Tensor) -> None:
        seen.append(prediction)

    options: dict[str, Any] = dict(
        denoisers=learned.denoisers, feed=learned.feed, steps={step}, states={step: latents}, leave=True
    )
    driver.run(*call, step_fn, **options)
    return seen[0]


def _takes_latents(driver: PipelineDriver, learned: Learned, noise: Tensor, dtype: torch.dtype, call: Call) -> bool:
    """Whether latents given to the call arrive unchanged in the loop."""
    first, given = learned.first, noise.flip(-1) + 1
    seen: list[Tensor] = []

    def step_fn(_step: int, latents: Tensor, _prediction: Tensor) -> None:
        seen.append(latents)

    options: dict[str, Any] = dict(
        denoisers=learned.denoisers, steps={first}, states={first: given}, leave=True, stub_all=True
    )
    with contextlib.suppress(ValueError, TypeError, RuntimeError, IndexError):  # another layout
        driver.run(*call, step_fn, feed=(first, dtype), **options)
    return bool(seen) and seen[0].shape == given.shape and torch.equal(seen[0], given)


def distance(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference; infinite where shapes differ."""
    return (a.float() - b.float()).abs().max().item() if a.shape == b.shape else float("inf")
