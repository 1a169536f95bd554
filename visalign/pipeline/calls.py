"""What goes into a pipeline call and what comes out of it, for any diffusers pipeline."""

import contextlib
import inspect
import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from visalign.names import unknown_name

from .stepping import UnsupportedPipeline

# Arguments of a pipeline call that the Generator sets itself.
OURS = frozenset({"prompt", "generator", "latents", "num_inference_steps", "output_type", "return_dict"})
_FOLDER_KEYS = {"num_steps", "guidance_scale", "call_kwargs"}


def call_parameters(pipeline: Any) -> frozenset[str]:
    """Names of the arguments of the pipeline's `__call__`."""
    return frozenset(inspect.signature(type(pipeline).__call__).parameters) - {"self"}


def check_names(call_kwargs: Collection[str], parameters: frozenset[str]) -> None:
    """Raise ValueError for an argument that the pipeline does not have, or that is not the caller's to set."""
    for name in call_kwargs:
        if name in OURS or name.startswith("num_") and name.endswith("_per_prompt"):
            raise ValueError(f"call_kwargs: got {name!r}, expected another (the Generator sets it)")
        if name not in parameters:
            raise unknown_name("call_kwargs", name, parameters - OURS)


def check_batch(prompts: Sequence[str], seeds: Sequence[int]) -> None:
    """Raise ValueError unless there is a non-empty list of prompts and one integer seed for each."""
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts) or not len(prompts):
        raise ValueError(f"prompts: got {prompts!r}, expected a non-empty list of strings")
    if isinstance(seeds, (int, Tensor)) or len(seeds) != len(prompts):
        got = f"{len(seeds)} seeds" if isinstance(seeds, Sequence) else repr(seeds)
        raise ValueError(f"seeds: got {got}, expected a list of {len(prompts)} integers, one per prompt")


def call_arguments(
    parameters: frozenset[str], settings: dict[str, Any], prompts: Sequence[str], seeds: Sequence[int], device: Any
) -> dict[str, Any]:
    """The keyword arguments of one call: `settings`, prompts and one generator per sample.

    Negative prompts become lists, one per prompt.
    """
    count = len(prompts)
    arguments = {name: value for name, value in settings.items() if name in parameters}
    for name, value in arguments.items():
        if name.startswith("negative_prompt") and isinstance(value, str):
            arguments[name] = [value] * count
        elif name.startswith("negative_prompt") and isinstance(value, (list, tuple)) and len(value) != count:
            raise ValueError(f"{name}: got {len(value)} strings, expected one, or {count}, one per prompt")
    arguments["prompt"] = list(prompts)
    if "generator" in parameters:
        arguments["generator"] = [torch.Generator(device).manual_seed(int(seed)) for seed in seeds]
    return arguments


@contextlib.contextmanager
def own_random_state(seed: int, device: torch.device) -> Iterator[None]:
    """Forks torch's global random state and seeds it: some condition encoders sample from it."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.default_generators[device.index or 0].manual_seed(seed)
        yield


def to_images(media: Any) -> Tensor:
    """A pipeline's output of type "pt" as one float32 tensor: (N, 3, H, W), or (N, F, 3, H, W) for videos."""
    first = media[0] if isinstance(media, tuple) else media
    if isinstance(first, (list, tuple)):
        first = torch.stack([torch.as_tensor(np.asarray(x)) if not isinstance(x, Tensor) else x for x in first])
    return first.float() if isinstance(first, Tensor) else torch.as_tensor(np.asarray(first)).float()


def refuse_unfit(pipeline: Any) -> None:
    """Raise UnsupportedPipeline, with the reason, for what can be told without running it."""
    name = type(pipeline).__name__
    if not isinstance(pipeline, DiffusionPipeline):
        raise UnsupportedPipeline(f"pipeline: got {name}, expected a diffusers pipeline")
    inner = [key for key, value in vars(pipeline).items() if isinstance(value, DiffusionPipeline)]
    if inner:
        raise UnsupportedPipeline(
            f"pipeline: got {name}, a combined pipeline whose inner pipelines hold their own schedulers; "
            f"expected one of them ({', '.join(inner)})"
        )
    if getattr(pipeline, "scheduler", None) is None:
        raise UnsupportedPipeline(f"pipeline: got {name} without a scheduler, expected one that denoises in steps")
    if "prompt" not in call_parameters(pipeline):
        raise UnsupportedPipeline(f"pipeline: got {name}, which takes no prompt, expected one driven by text")


def folder_defaults(id_or_folder: str | Path) -> dict[str, Any]:
    """The contents of `visalign.json` in a model folder ({} without one); a hub id, "owner/name", has none.

    Raises:
        ValueError: a path that does not exist, a folder without `model_index.json`, or an unreadable `visalign.json`.
    """
    folder = Path(id_or_folder)
    if not folder.exists():
        text = str(id_or_folder)
        if text.count("/") == 1 and not text.startswith((".", "/", "~")) and not folder.parent.exists():
            return {}  # a hub id
        raise ValueError(f"id_or_folder: got {text!r}, which does not exist, expected a model folder or a hub id")
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"id_or_folder: got {str(folder)!r}, without model_index.json, expected a diffusers folder")
    file = folder / "visalign.json"
    if not file.is_file():
        return {}
    try:
        defaults = json.loads(file.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: got {error}, expected JSON") from error
    if not isinstance(defaults, dict):
        raise ValueError(f"{file}: got {type(defaults).__name__}, expected an object")
    for key in defaults:
        if key not in _FOLDER_KEYS:
            raise unknown_name(str(file), key, _FOLDER_KEYS)
    return defaults


def absent_components(id_or_folder: str | Path) -> dict[str, None]:
    """The components that a model folder names as absent ([null, null]), e.g. SD3 without its T5, as None each.

    diffusers wants them named at loading where the pipeline class does not count them as optional.
    """
    file = Path(id_or_folder) / "model_index.json"
    if not file.is_file():
        return {}
    index = json.loads(file.read_text())
    return {name: None for name, value in index.items() if value == [None, None]}
