"""Pictures of prompts, drawn plainly or searched for: the work of `visalign generate`."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visalign.images import images_to_pil
from visalign.names import unknown_name
from visalign.pipeline.generator import Generator
from visalign.pipeline.lora_loading import load_lora
from visalign.rewards import Scores, make_reward, parse_spec, score
from visalign.sampling.rollout import rollout
from visalign.search import METHODS, find_method
from visalign.search.session import Finer, search_prompts
from visalign.training.policy import check_lora_fits
from visalign.training.run.folder import check_writable
from visalign.transitions import sampler_of
from visalign.worlds import resolve_model

BUDGET = 500  # denoiser calls a prompt


def generate(arguments: argparse.Namespace) -> None:
    """Draw or search, as the parsed options say; `option` is a dictionary."""
    check(arguments)
    model = resolve_model(arguments.model)
    if arguments.lora:
        check_lora_fits(Path(arguments.lora), Path(model))
    check_writable(arguments.out, resume=True, argument="out")
    reward = make_reward(arguments.reward) if arguments.reward else None
    generator = Generator.from_pretrained(
        model,
        dtype=torch.float32 if arguments.device == "cpu" else torch.bfloat16,
        device=arguments.device,
        num_steps=arguments.steps,
        guidance_scale=arguments.guidance,
    )
    if getattr(generator.pipeline, "safety_checker", None) is not None:
        generator.pipeline.safety_checker = None  # it paints pictures black, which would be scored, and kept
    if arguments.lora:
        load_lora(generator.pipeline, arguments.lora)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.search:
        assert reward is not None
        record = {key: getattr(arguments, key) for key in ("model", "lora", "reward", "steps", "guidance")}
        budget, finer = arguments.budget or BUDGET, None
        if arguments.render_steps:
            budget, record["render_steps"] = budget - arguments.render_steps, arguments.render_steps
            finer = Finer(arguments.render_steps, lambda: _with_steps(generator, arguments.render_steps))
        options = dict(budget=budget, seed=arguments.seed, transition=arguments.transition)
        options |= dict(batch_size=arguments.batch_size, **arguments.option)
        search_prompts(generator, arguments.prompt, reward, arguments.search, arguments.out, record, finer, **options)
    else:
        draw(generator, arguments, reward)


def check(arguments: argparse.Namespace) -> None:
    """Refuse what does not go together, before anything is loaded.

    Raises:
        ValueError: names the option.
    """
    for prompt in arguments.prompt:
        if not prompt.strip():
            raise ValueError("prompt: got an empty one, expected words")
    if arguments.guidance is not None and not (math.isfinite(arguments.guidance) and arguments.guidance >= 0):
        raise ValueError(f"guidance: got {arguments.guidance}, expected a finite number >= 0")
    if arguments.steps is not None and not 1 <= arguments.steps <= 1000:
        raise ValueError(f"steps: got {arguments.steps}, expected 1 .. 1000")
    if arguments.search is None:
        given = {name: getattr(arguments, name) for name in ("budget", "transition", "option", "render_steps")}
        for name, value in given.items():
            if value:
                raise ValueError(f"{name}: got {value!r} without --search, expected one of {sorted(METHODS)} with it")
    else:
        method = find_method(arguments.search)
        for name in arguments.option:  # the others have options of their own, or belong to Python
            if name not in method.options:
                raise unknown_name(f"option of {arguments.search!r}", name, method.options)
        method.check(arguments.search, arguments.option)
        if arguments.reward is None:
            raise ValueError("reward: got none, expected what the search is for, e.g. --reward clip")
        if arguments.count != 1:
            raise ValueError(f"count: got {arguments.count} with --search, expected 1: it gives the best picture")
        if arguments.budget is not None and arguments.budget < 1:
            raise ValueError(f"budget: got {arguments.budget}, expected >= 1")
        most = (arguments.budget or BUDGET) - 1
        if arguments.render_steps is not None and not 1 <= arguments.render_steps <= most:
            raise ValueError(f"render_steps: got {arguments.render_steps}, expected 1 .. {most}, within the budget")
    if arguments.batch_size < 1:
        raise ValueError(f"batch_size: got {arguments.batch_size}, expected >= 1")
    if arguments.reward:
        parse_spec(arguments.reward)


def _with_steps(generator: Generator, num_steps: int) -> Generator:
    """The same pipeline with other steps, in the place of the generator."""
    generator.close()
    settings: dict[str, Any] = dict(num_steps=num_steps, guidance_scale=generator.guidance_scale, calibrate=False)
    return Generator(generator.pipeline, **settings, **generator.call_kwargs)


@torch.no_grad()
def sample(generator: Generator, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
    """Pictures (N, 3, H, W) in [0, 1] of N prompts and seeds by the model's usual sampler."""
    sampler = sampler_of(generator.schedule)
    images = rollout(generator, prompts, seeds, sampler, sde_steps=None if sampler.stochastic else []).images
    assert images is not None
    return images


@torch.no_grad()
def draw(generator: Generator, arguments: argparse.Namespace, reward: Any) -> None:
    """`count` pictures a prompt by the model's usual sampler, from seeds that count up."""
    number = 0
    for prompt in arguments.prompt:
        for start in range(0, arguments.count, arguments.batch_size):
            seeds = [arguments.seed + k for k in range(start, min(start + arguments.batch_size, arguments.count))]
            images = sample(generator, [prompt] * len(seeds), seeds)
            scores = score(reward, images, [prompt] * len(seeds), on_fail="later") if reward else None
            for n, (seed, image) in enumerate(zip(seeds, images_to_pil(images))):
                path = arguments.out / f"{number:04d}-seed{seed}.png"
                image.save(path)
                print(path if scores is None else f"{path}  {told(scores, n)}")
                number += 1


def told(scores: Scores, row: int) -> str:
    """A sample's score in words, or why it has none."""
    return f"{float(scores.total[row]):.4f}" if scores.valid[row] else f"no score ({scores.problem})"
