"""A Generator against stock runs of its own pipeline: whether driving it changes anything."""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from visalign.transitions import ode_of

from .calibration import distance
from .calls import to_images
from .generator import Generator


@contextlib.contextmanager
def recorded(scheduler: Any) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """What the scheduler's own `step` gets and gives meanwhile: (latents, prediction, next latents) of each step."""
    record: list[tuple[Tensor, Tensor, Tensor]] = []
    step = scheduler.step

    @functools.wraps(step)  # pipelines look at its signature
    def recording(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = step(model_output, timestep, sample, *args, **kwargs)
        if model_output.shape[1] == 2 * sample.shape[1]:
            model_output = model_output.chunk(2, dim=1)[0]
        following = out[0] if isinstance(out, tuple) else out.prev_sample
        record.append((sample.clone(), model_output.clone(), following.clone()))
        return out

    scheduler.step = recording
    try:
        yield record
    finally:
        scheduler.step = step


@torch.no_grad()
def check(
    generator: Generator, prompts: Sequence[str], seeds: Sequence[int] | None = None, **inputs: Any
) -> dict[str, float]:
    """Largest absolute differences between a Generator and stock calls of the same pipeline, all steps.

    Returns:
        noise: first latents. prediction: `predict` at every stock state. trajectory: final latents of the ODE in one
        call (absent for consistency models, whose stock steps draw noise). decode: images of the stock final latents.
        image: of the driven run. batch: final latents of the first sample alone (absent for one prompt, or inputs).
    """
    seeds = [0] * len(prompts) if seeds is None else seeds
    first = generator.first_step(prompts, seeds, **inputs)
    with recorded(generator.pipeline.scheduler) as record:
        images = to_images(generator.pipeline(**generator.arguments(prompts, seeds, **inputs)))
    differences = {"noise": distance(generator.noise(prompts, seeds, **inputs), record[0][0])}
    differences["prediction"] = max(
        distance(generator.predict(latents.float(), first + i, prompts, seeds, **inputs), prediction)
        for i, (latents, prediction, _) in enumerate(record)
    )
    transition, schedule = ode_of(generator.schedule), generator.schedule

    def ode(step_index: int, latents: Tensor, prediction: Tensor) -> Tensor:
        if schedule.kind == "consistency":
            return record[step_index - first][2].float()
        return transition(schedule, step_index, latents, prediction)[0].mean

    final, driven = generator.denoise(prompts, seeds, ode, decode=True, **inputs)
    if schedule.kind != "consistency":
        differences["trajectory"] = distance(final, record[-1][2])
    stock_final = record[-1][2].float()
    differences["decode"] = distance(generator.decode(stock_final, prompts, seeds, **inputs), images)
    differences["image"] = distance(driven, images)
    if len(prompts) > 1 and not inputs and schedule.kind != "consistency":
        alone = generator.denoise(prompts[:1], seeds[:1], ode)
        differences["batch"] = distance(alone, final[:1])
    return differences
