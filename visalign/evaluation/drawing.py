"""Drawing the pictures that are missing: plain draws in batches, or a search each, shared by all processes.

A picture's noise follows from its prompt and seed alone. A plain draw takes the noise of the first sample of a search
with that seed, so that what a search adds is seen pair by pair. Batches are cut from the whole list of pictures and
drawn whole, so that neither the number of processes nor a run that was killed changes a picture.
"""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visalign.images import check_images, images_to_numpy
from visalign.pipeline.generator import Generator
from visalign.pipeline.lora_loading import load_lora
from visalign.rewards import RewardError
from visalign.sampling.rollout import rollout
from visalign.sampling.seeds import derived_seed, text_key
from visalign.search import Role, events_of, find_method, prepare
from visalign.transitions import Schedule, Transition, make_transition, ode_of, sampler_of
from visalign.worlds import resolve_model

from .contestants import Contestant
from .judging import Judge
from .plan import Plan, Task
from .store import Store


@dataclass(frozen=True)
class Unit:
    """Pictures that one process draws together: a batch, or one search."""

    contestant: Contestant
    key: str
    tasks: tuple[Task, ...]


def missing_units(plan: Plan, store: Store) -> list[Unit]:
    """The units that hold a picture not drawn yet, with those pictures; the same on every process."""
    units = []
    for key, contestant in dict(zip(plan.keys, plan.contestants)).items():  # equal ones are drawn once
        there = {name for name, picture in store.drawn(key).items() if picture.file}
        size = 1 if contestant.search else plan.batch_size
        tasks = plan.tasks
        for start in range(0, len(tasks), size):
            left = tuple(task for task in tasks[start : start + size] if task.name not in there)
            if left:
                units.append(Unit(contestant, key, left))
    return units


def draw(
    units: Sequence[Unit],
    plan: Plan,
    store: Store,
    judges: dict[str, Judge],
    device: torch.device,
    advance: Callable[[int, str], None] = lambda count, note: None,
) -> None:
    """Draw this process's units and keep each as it is finished.

    A picture that cannot be drawn (its search's reward fails, or its pixels are no numbers) is kept as such, with the
    reason; all else goes on.

    Args:
        judges: of the searches' rewards, by spec.
        advance: told the number of pictures and what they are of, after each unit.

    Raises:
        ValueError: a model, LoRA, step or search that turns out not to work; names the contestant.
    """
    order = list(dict.fromkeys(unit.contestant.weights for unit in units))
    for weights in order:
        local = [unit for unit in units if unit.contestant.weights == weights]
        with _named(local[0].contestant):
            generator = load(local[0].contestant, device, plan.dtype)
        for unit in local:
            started = time.monotonic()
            with _named(unit.contestant):
                pictures, nfe = draw_unit(generator, unit, plan, judges)
            store.keep(
                unit.key,
                [task.name for task in unit.tasks],
                pictures,
                nfe,
                time.monotonic() - started,
                [_texts(unit.contestant, task) for task in unit.tasks],
            )
            advance(len(unit.tasks), unit.contestant.label)
        del generator
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def load(contestant: Contestant, device: torch.device, dtype: str) -> Generator:
    """The contestant's model, its LoRA at its strength; no safety checker, whose black pictures would be scored."""
    generator = Generator.from_pretrained(
        resolve_model(contestant.model),
        dtype=getattr(torch, dtype),
        device=device,
        num_steps=contestant.steps,
        guidance_scale=contestant.guidance,
    )
    if getattr(generator.pipeline, "safety_checker", None) is not None:
        generator.pipeline.safety_checker = None
    if contestant.lora is not None:
        load_lora(generator.pipeline, contestant.lora, "contestant")
        generator.pipeline.set_adapters(["contestant"], [contestant.strength])
    return generator


def draw_unit(
    generator: Generator, unit: Unit, plan: Plan, judges: dict[str, Judge]
) -> tuple[list[np.ndarray | str], list[int]]:
    """The unit's pictures, uint8 (H, W, 3), or why there is none; and the denoiser calls of each."""
    if unit.contestant.search:
        (task,) = unit.tasks
        picture, nfe = _search(generator, unit.contestant, task, judges[str(unit.contestant.reward)], plan.batch_size)
        return [picture], [nfe]
    schedule = generator.schedule
    images = plain(generator, unit.tasks, _transition(unit.contestant.transition, schedule))
    return _pictures(images), [schedule.num_steps] * len(unit.tasks)


@torch.no_grad()
def plain(generator: Generator, tasks: Sequence[Task], transition: Transition) -> Tensor:
    """One draw a task, (N, 3, H, W), by the noises of sample 0 of a search for it."""
    starts, steps = (
        [derived_seed(task.chain_seed, text_key(task.prompt), role, 0) for task in tasks]
        for role in (Role.INIT, Role.STEP)
    )
    noisy: list[int] | None = None if transition.stochastic else []
    prompts = [task.prompt for task in tasks]
    images = rollout(generator, prompts, starts, transition, sde_steps=noisy, noise_seeds=steps).images
    assert images is not None
    return images


def _search(
    generator: Generator, contestant: Contestant, task: Task, judge: Judge, batch_size: int
) -> tuple[np.ndarray | str, int]:
    """The best picture of a search, or why there is none, and the denoiser calls spent."""
    assert contestant.search is not None and contestant.budget is not None
    options: dict[str, Any] = dict(budget=contestant.budget, seed=task.chain_seed, batch_size=batch_size)
    options |= {"transition": contestant.transition, **contestant.options}
    chain = prepare(generator, task.prompt, judge.for_search, contestant.search, **options)
    try:
        for _ in events_of(chain, contestant.search, options):
            pass
    except RewardError as error:
        return f"search: {error}", chain.ledger.nfe
    if chain.best is None:
        return f"search: {contestant.search} ended before its first picture was finished", chain.ledger.nfe
    return _pictures(chain.best.image)[0], chain.ledger.nfe


def _pictures(images: Tensor) -> list[np.ndarray | str]:
    if images.dim() == 5:
        raise ValueError(f"model: got one that draws videos, {tuple(images.shape[1:])} each, expected pictures")
    check_images(images)
    pictures: list[np.ndarray | str] = []
    for image in images:
        try:
            pictures.append(images_to_numpy(image[None])[0])
        except ValueError as error:
            pictures.append(f"drawing: {error}")
    return pictures


def _transition(name: str | None, schedule: Schedule) -> Transition:
    if name is None:
        return sampler_of(schedule)
    return ode_of(schedule) if name == "ode" else make_transition(name)


def _texts(contestant: Contestant, task: Task) -> dict[str, str]:
    metadata = {"prompt": task.prompt, "seed": str(task.seed), "copy": str(task.copy)}
    return metadata | {key: str(value) for key, value in contestant.settings().items()}


@contextmanager
def _named(contestant: Contestant) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"contestant {contestant.label!r}: {error}") from error


def check_searched(contestant: Contestant, judge: Judge) -> None:
    """Refuse a reward without a gradient for a search that needs one, once it is loaded but before anything is drawn.

    Raises:
        ValueError: names the contestant.
    """
    reward = judge.for_search
    if find_method(str(contestant.search)).gradient and not reward.differentiable:
        raise ValueError(
            f"contestant {contestant.label!r}: reward: got {reward.name!r}, which has no gradient, expected a "
            f"differentiable one, which {contestant.search!r} needs"
        )
