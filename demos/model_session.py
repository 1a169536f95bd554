"""What all tabs work with: one model with its variants, the rewards, and drawing and scoring, one piece at a time."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visalign.commands.drawing import sample
from visalign.images import pil_to_images
from visalign.names import unknown_name
from visalign.pipeline.calls import call_parameters
from visalign.pipeline.generator import Generator
from visalign.pipeline.variants import Variants
from visalign.rewards import Reward, make_reward, parse_spec, score
from visalign.search import METHODS, Event, events_of, prepare
from visalign.training.policy import check_lora_fits
from visalign.worlds import resolve_model

from .files import run_names
from .jobs import Job, Stopped
from .requests import BASE, MOST_BUDGET, PLAIN, DrawRequest, Reading, Side
from .settings import Settings

MOST_RUNS = 12  # whose LoRAs are offered


class ModelSession:
    """The model and the rewards, loaded once. One thread at a time draws or scores; others wait."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.folder = resolve_model(settings.model)
        self.specs = {name_of(spec): spec for spec in settings.reward_specs}
        for spec in settings.reward_specs:
            parse_spec(spec)
        self.offered = offered(settings, Path(self.folder))
        self._rewards: dict[str, Reward] = {}
        self._lock = threading.RLock()
        self.generator = Generator.from_pretrained(
            self.folder,
            dtype=torch.float32 if settings.device == "cpu" else torch.bfloat16,
            device=settings.device,
        )
        self.own_steps, self.own_guidance = self.generator.num_steps, self.generator.guidance_scale
        parameters = call_parameters(self.generator.pipeline)
        if "num_frames" in parameters:
            raise ValueError(f"model: got {settings.model!r}, which draws videos, expected one that draws pictures")
        self.guided = "guidance_scale" in parameters
        self.variants = Variants(self.generator.pipeline)
        for name in list(self.offered)[: len(settings.loras)]:  # what was asked for must load; runs may wait
            self.variants.add(name, self.offered[name])

    @property
    def variant_names(self) -> list[str]:
        return [BASE, *self.offered]

    def reward(self, name: str) -> Reward:
        """A reward by its name in the page, loaded at its first use.

        Raises:
            ValueError: not one of those that the workbench was started with.
        """
        if name not in self.specs:
            raise ValueError(f"reward: got {name!r}, expected one of {list(self.specs)}")
        with self._lock:
            if name not in self._rewards:
                self._rewards[name] = make_reward(self.specs[name])
            return self._rewards[name]

    def draw(self, side: Side, request: DrawRequest, job: Job) -> Tensor:
        """The pictures (count, 3, H, W) in [0, 1] of one side, on the CPU.

        Raises:
            Stopped: the job was told to stop; of a search that has found something, what it has found is returned.
        """
        with self.at_work(request, side, job) as generator:
            if side.search == PLAIN:
                total = request.steps
                with watched(generator, job, lambda calls: job.report(f"drawing, step {min(calls, total)} of {total}")):
                    return sample(generator, [request.prompt] * request.count, request.seeds).cpu()
            images: list[Tensor] = []
            for seed in request.seeds:
                image = self._found(generator, side, request, seed, job)
                images += [] if image is None else [image]
                if job.halt.is_set():
                    break
            if not images:
                raise Stopped
            return torch.cat(images)

    def _found(self, generator: Generator, side: Side, request: DrawRequest, seed: int, job: Job) -> Tensor | None:
        best = None
        for event in self.search(generator, side.search, side.reward, request.prompt, seed, side.budget, job):
            best = event.best or best
            value = f", best {best.reward:.3f}" if best else ""
            job.report(f"{side.search}: {event.nfe} of {side.budget} calls{value}", event.nfe / side.budget)
        return best.image.cpu() if best else None

    def search(
        self, generator: Generator, method: str, reward: str, prompt: str, seed: int, budget: int, job: Job
    ) -> Iterator[Event]:
        """The events of a search until it ends or the job is stopped; within `at_work`.

        Raises:
            ValueError: an unknown search, a budget out of range, or what the search itself refuses.
        """
        if method not in METHODS:  # a visitor's own would be code
            raise unknown_name("search", method, METHODS)
        if not 1 <= budget <= MOST_BUDGET:
            raise ValueError(f"budget: got {budget}, expected 1 to {MOST_BUDGET}")
        chain = prepare(generator, prompt, self.reward(reward), method, budget=budget, seed=seed)
        job.chain = chain
        events = events_of(chain, method, {})
        while True:
            try:
                with watched(generator, job, lambda _calls: None):
                    event = next(events)
            except StopIteration:
                return
            except Stopped:
                yield chain.event(None, "stopped")
                return
            yield event

    @contextmanager
    def at_work(self, request: DrawRequest, side: Side, job: Job) -> Iterator[Generator]:
        """The model as asked for, held until the end; others wait, and are told so."""
        with self._held(job):
            self._set_up(request)
            name = None if side.variant == BASE else side.variant
            if name in self.offered and name not in self.variants.names:
                self.variants.add(name, self.offered[name])
            with self.variants.using(self.generator, name, side.strength):
                yield self.generator

    def score(self, names: Sequence[str], images: Tensor, prompt: str, job: Job) -> dict[str, list[Reading]]:
        """What these rewards say of pictures (N, 3, H, W) of one prompt, N readings each."""
        readings = {}
        for name in names:
            with self._held(job):
                job.report(f"scoring by {name}")
                readings[name] = read(self.reward(name), images, prompt)
        return readings

    def score_pictures(self, reward: Reward, pictures: Sequence[Any], prompt: str, job: Job) -> list[Reading]:
        """As `score`, of RGB pictures of any sizes."""
        with self._held(job):
            return [read(reward, pil_to_images([picture]), prompt)[0] for picture in pictures]

    @contextmanager
    def _held(self, job: Job) -> Iterator[None]:
        while not self._lock.acquire(timeout=0.1):
            job.check()
        try:
            job.check()
            yield
        finally:
            self._lock.release()

    def _set_up(self, request: DrawRequest) -> None:
        """The generator with the steps and the guidance asked for; one at a time drives the pipeline."""
        guidance = request.guidance if self.guided else self.own_guidance
        old = self.generator
        if (old.num_steps, old.guidance_scale) == (request.steps, guidance):
            return
        old.close()
        self.generator = Generator(
            old.pipeline, num_steps=request.steps, guidance_scale=guidance, calibrate=False, **old.call_kwargs
        )


def read(reward: Reward, images: Tensor, prompt: str) -> list[Reading]:
    """What a reward says of pictures (N, 3, H, W) of one prompt; where it refuses them, why."""
    try:
        result = score(reward, images, [prompt] * len(images), on_fail="later")
    except ValueError as error:
        return [Reading(None, problem=" ".join(str(error).split()))] * len(images)
    readings, one = [], next(iter(result.outputs.values())) if len(result.outputs) == 1 else None
    for n in range(len(images)):
        parts = one.criteria if one is not None else result.parts
        criteria = {key: float(values[n]) for key, values in parts.items() if values[n] == values[n]}
        why = one.rationale[n] if one is not None and one.rationale is not None else None
        if result.valid[n]:
            readings.append(Reading(float(result.total[n]), criteria, why))
        else:
            readings.append(Reading(None, problem=f"could not be scored: {why or result.problem}"))
    return readings


@contextmanager
def watched(generator: Generator, job: Job, tell: Callable[[int], None]) -> Iterator[None]:
    """Within, every call of the denoiser is counted and told, and ends with Stopped once the job is to stop."""
    calls = 0

    def count(_module: Any, _args: Any) -> None:
        nonlocal calls
        job.check()
        calls += 1
        tell(calls)

    hook = generator.denoiser.register_forward_pre_hook(count)
    try:
        yield
    finally:
        hook.remove()


def name_of(spec: str) -> str:
    """How a reward is called in the page: the file's name for a file, else the spec."""
    return Path(spec).stem if spec.endswith((".yaml", ".yml")) else spec


def offered(settings: Settings, model: Path) -> dict[str, Path]:
    """Folders of LoRAs and components by name: those asked for first, then the newest runs' LoRAs that fit the model.

    Raises:
        ValueError: one that was asked for does not fit.
    """
    variants: dict[str, Path] = {}
    for folder in map(Path, settings.loras):
        if not (folder / "config.json").is_file():
            check_lora_fits(folder, model)
        variants[name_of_folder(folder, list(variants))] = folder
    for run in run_names(settings.runs)[:MOST_RUNS]:
        folder = settings.runs / run / "lora"
        try:
            check_lora_fits(folder, model)
        except ValueError:
            continue  # another model's, or none
        if folder.resolve() not in [known.resolve() for known in variants.values()]:
            variants[name_of_folder(folder, list(variants))] = folder
    return variants


def name_of_folder(folder: Path, taken: Sequence[str]) -> str:
    """How a LoRA is called in the page: its run's name for runs/NAME/lora, else the folder's; numbered if taken."""
    folder = folder.resolve()
    name = folder.parent.name if folder.name in ("lora", "weights") else folder.name
    name = f"{name} (2)" if name == BASE else name
    number = 2
    while name in taken:
        name, number = f"{name.removesuffix(f' ({number - 1})')} ({number})", number + 1
    return name
