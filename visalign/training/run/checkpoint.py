"""Checkpoints that are whole or absent: written beside, then renamed; the newest whole one is found at resume."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

STATE: dict[str, Any] = {
    "step": int,
    "config": dict,
    "skipped": int,
    "train_seconds": (int, float),
    "images_sampled": int,
    "best": (list, type(None)),
    "ema_updates": int,
    "before_prompts": list,
}  # what state.json holds
_NAME = re.compile(r"step-(\d+)$")


def save_checkpoint(folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> Path:
    """Write `folder/step-N` atomically: one safetensors file a name of `tensors`, and `state` as JSON.

    A kill at any moment leaves either the old set of checkpoints or the old set and this one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final, partial = folder / f"step-{step}", folder / f".partial-{step}-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        for name, values in tensors.items():
            save_file(
                {k: v.detach().cpu().contiguous() for k, v in values.items()}, str(partial / f"{name}.safetensors")
            )
        (partial / "state.json").write_text(json.dumps({"step": step, **state}))
        for file in partial.iterdir():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        if final.exists():  # of a branch that is done again: out of the way in one move, then the new one in
            os.replace(final, folder / f".partial-{step}-{os.getpid()}-old")
        os.replace(partial, final)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"checkpoint: could not write {final} ({error}); the earlier checkpoints are whole. Free some room, then "
            "run again with --resume"
        ) from error
    return final


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints under a folder, by step."""
    paths = [p for p in folder.glob("step-*") if _NAME.search(p.name) and (p / "state.json").is_file()]
    return sorted(paths, key=lambda p: int(_NAME.search(p.name)[1]))  # type: ignore[index]


def prune(folder: Path, keep: int, always: set[int], newest: int | None = None) -> None:
    """Delete all but the newest `keep` checkpoints and those of the steps in `always`; and what a kill left behind.

    Args:
        newest: the step just saved. Checkpoints beyond it are of a branch given up by resuming from before, and go.
    """
    steps = {int(_NAME.search(p.name)[1]): p for p in checkpoints(folder)}  # type: ignore[index]
    beyond = [step for step in steps if newest is not None and step > newest]
    newest_steps = [step for step in steps if step not in beyond][-keep:]
    for step, path in steps.items():
        if step in beyond or step not in newest_steps and step not in always:
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(".partial-*"):
        shutil.rmtree(path, ignore_errors=True)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint a `--resume` path means: itself, or the newest of a run folder.

    Raises:
        ValueError: there is none.
    """
    if (path / "state.json").is_file():
        return path
    for folder in (path / "checkpoints", path):
        if paths := checkpoints(folder):
            return paths[-1]
    raise ValueError(
        f"resume: got {str(path)!r}, which holds no checkpoint, expected a run folder or a step-N folder (a run that "
        "ended before its first checkpoint starts anew without --resume)"
    )


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read a checkpoint back: (tensors by file name, state).

    Raises:
        ValueError: a file is missing, truncated or not what it should be.
    """
    try:
        state = json.loads((path / "state.json").read_text())
        tensors = {f.stem: load_file(str(f)) for f in sorted(path.glob("*.safetensors"))}
    except (OSError, json.JSONDecodeError, SafetensorError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"resume: {path} is damaged ({reason}); use an earlier step-N folder beside it") from None
    for name in ("trained", "ema", "optimizer"):
        if name not in tensors:
            raise ValueError(f"resume: {path} lacks {name}.safetensors, expected a checkpoint of this trainer")
    for name, kind in STATE.items():
        if not isinstance(state, dict) or not isinstance(state.get(name), kind):
            raise ValueError(f"resume: {path / 'state.json'} lacks {name!r}, expected a checkpoint of this trainer")
    return tensors, state


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimiser's state as named tensors: "<parameter index>.<name>"."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{k}": torch.as_tensor(v) for i, entry in state.items() for k, v in entry.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put `optimizer_tensors` back, exactly."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
