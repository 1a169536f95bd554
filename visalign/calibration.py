"""Measuring a pipeline against itself: what its loop looks like, and whether driving it changes anything."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from visalign.pipeline_calls import to_images
from visalign.stepping import UnsupportedPipeline
from visalign.transitions import ode_of

if TYPE_CHECKING:
    from visalign.generator import Generator


@dataclass(frozen=True)
class Learned:
    """What one short run tells of a pipeline.

    Attributes:
        denoisers: components that run inside the loop.
        first, last: the loop's first step (above 0 for image-to-image) and its last.
        dtype: of the loop's latents.
        takes_latents: the call's `latents` arrive in the loop as they are.
    """

    denoisers: tuple[str, ...]
    first: int
    last: int
    dtype: torch.dtype
    takes_latents: bool


@torch.no_grad()
def learn(generator: "Generator", prompts: list[str], seeds: list[int], inputs: dict[str, Any]) -> Learned:
    """One whole run, along the ODE, with the real scheduler's step beside ours; then a prediction or two again.

    Raises:
        UnsupportedPipeline: the loop is not one step per timestep, or our step or prediction differs from the stock
            one; says by how much.
    """
    states: list[Tensor] = []
    predictions: list[Tensor] = []
    inner = generator.pipeline.scheduler.inner

    def step_fn(step_index: int, latents: Tensor, prediction: Tensor) -> Tensor:
        schedule = generator.schedule
        states.append(latents)
        predictions.append(prediction)
        following = ode_of(schedule)(schedule, step_index, latents, prediction)[0].mean
        if generator.calibrate and _has_own_step(inner, generator.num_steps):
            stock = inner.step(prediction, schedule.timesteps[step_index], latents, return_dict=False)[0]
            _refuse(generator, "step", stock, following, torch.float32)
        return following

    called: dict[str, None] = {}
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: called.setdefault(name) if in_loop() else None)
        for name, module in generator.pipeline.components.items()
        if isinstance(module, nn.Module)
    ]

    def in_loop() -> bool:
        control = generator.pipeline.scheduler.control
        return control is not None and control.at is not None

    try:
        run, _ = generator._run(prompts, seeds, inputs, step_fn, steps=None, output_type="latent")
    finally:
        for hook in hooks:
            hook.remove()
    name, count = type(generator.pipeline).__name__, generator.schedule.num_steps
    if not run.seen or run.seen != list(range(run.seen[0], count)):
        raise UnsupportedPipeline(
            f"pipeline: got {name}, with steps {run.seen}, expected one pass up to step {count - 1}"
        )
    assert run.dtype is not None
    learned = Learned(tuple(called), run.seen[0], run.seen[-1], run.dtype, takes_latents=False)
    learned = _with_latents(generator, learned, states[0], prompts, seeds, inputs)
    if generator.calibrate:
        for index in {0, len(states) - 1}:
            again = _predict(generator, learned, states[index], run.seen[index], prompts, seeds, inputs)
            _refuse(generator, f"prediction at step {run.seen[index]}", predictions[index], again, run.dtype)
    return learned


def _has_own_step(inner: Any, num_steps: int) -> bool:
    """Whether the scheduler's own step is the plain formula on the schedule's own levels."""
    if "FlowMatch" in type(inner).__name__:
        return True
    on_grid = inner.config.get("timestep_spacing") == "leading" or inner.config.num_train_timesteps % num_steps == 0
    return "DDIM" in type(inner).__name__ and on_grid


def _refuse(generator: "Generator", what: str, stock: Tensor, ours: Tensor, dtype: torch.dtype) -> None:
    difference, scale = (stock.float() - ours.float()).abs().max().item(), stock.abs().max().item()
    tolerance = (1e-4 if dtype == torch.float32 else 2e-2) * max(scale, 1e-6)
    if not difference <= tolerance:
        raise UnsupportedPipeline(
            f"pipeline: got {type(generator.pipeline).__name__}, whose {what} differs from the stock one by "
            f"{difference:.1e}, expected at most {tolerance:.1e}"
        )


def _predict(
    generator: "Generator", learned: Learned, latents: Tensor, step: int, prompts: Any, seeds: Any, inputs: Any
) -> Tensor:
    seen: list[Tensor] = []
    generator._run(
        prompts,
        seeds,
        inputs,
        lambda _i, _x, prediction: seen.append(prediction),  # type: ignore[arg-type, return-value]
        learned=learned,
        steps={step},
        states={step: latents},
        leave=True,
    )
    return seen[0]


def _with_latents(
    generator: "Generator", learned: Learned, noise: Tensor, prompts: Any, seeds: Any, inputs: Any
) -> Learned:
    """Whether latents given to the call arrive unchanged in the loop."""
    if "latents" not in generator._parameters:
        return learned
    given, seen = noise.flip(0) + 1, []
    accepting = Learned(learned.denoisers, learned.first, learned.last, learned.dtype, takes_latents=True)
    first = {learned.first}
    with contextlib.suppress(ValueError, TypeError, RuntimeError, IndexError):
        generator._run(
            prompts,
            seeds,
            inputs,
            lambda _i, latents, _v: seen.append(latents),  # type: ignore[arg-type, return-value]
            learned=accepting,
            steps=first,
            states={learned.first: given},
            leave=True,
            stub_all=True,
        )
    arrived = bool(seen) and seen[0].shape == given.shape and torch.equal(seen[0], given)
    return accepting if arrived else learned


@contextlib.contextmanager
def _recorded(inner: Any) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """What the scheduler's own `step` gets and gives meanwhile: (latents, prediction, next latents) of each step."""
    record: list[tuple[Tensor, Tensor, Tensor]] = []
    step = inner.step

    def recording(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = step(model_output, timestep, sample, *args, **kwargs)
        if model_output.shape[1] == 2 * sample.shape[1]:
            model_output = model_output.chunk(2, dim=1)[0]
        following = out[0] if isinstance(out, tuple) else out.prev_sample
        record.append((sample.clone(), model_output.clone(), following.clone()))
        return out

    inner.step = recording
    try:
        yield record
    finally:
        del inner.step


@torch.no_grad()
def check(
    generator: "Generator", prompts: Sequence[str], seeds: Sequence[int], inputs: dict[str, Any]
) -> dict[str, float]:
    """Largest absolute differences between a Generator and stock calls of the same pipeline, all steps.

    Returns:
        noise: first latents. prediction: `predict` at every stock state. trajectory: final latents of the ODE in one
        call (absent for consistency models, whose stock steps draw noise). decode: images of the stock final latents.
        image: of the driven run. batch: final latents of the first sample alone (absent for one prompt, or inputs).
    """
    pipe, inner = generator.pipeline, generator.pipeline.scheduler.inner
    prompts, seeds = list(prompts), list(seeds)
    first = generator._learn(prompts, seeds, inputs).first
    with _recorded(inner) as record:
        images = to_images(pipe(**generator.arguments(prompts, seeds, **inputs)))
    differences = {"noise": _distance(generator.noise(prompts, seeds, **inputs), record[0][0])}
    differences["prediction"] = max(
        _distance(generator.predict(latents.float(), first + i, prompts, seeds, **inputs), prediction)
        for i, (latents, prediction, _) in enumerate(record)
    )
    transition, schedule = ode_of(generator.schedule), generator.schedule

    def ode(step_index: int, latents: Tensor, prediction: Tensor) -> Tensor:
        if schedule.kind == "consistency":
            return record[step_index - first][2].float()
        return transition(schedule, step_index, latents, prediction)[0].mean

    final, driven = generator.denoise(prompts, seeds, ode, decode=True, **inputs)
    if schedule.kind != "consistency":
        differences["trajectory"] = _distance(final, record[-1][2])
    stock_final = record[-1][2].float()
    differences["decode"] = _distance(generator.decode(stock_final, prompts, seeds, **inputs), images)
    differences["image"] = _distance(driven, images)
    if len(prompts) > 1 and not inputs and schedule.kind != "consistency":
        alone = generator.denoise(prompts[:1], seeds[:1], ode)
        differences["batch"] = _distance(alone, final[:1])
    return differences


def _distance(a: Tensor, b: Tensor) -> float:
    return (a.float() - b.float()).abs().max().item() if a.shape == b.shape else float("inf")
