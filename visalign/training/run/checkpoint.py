"""Checkpoints that are whole or absent: written beside, then renamed; the newest whole one is found at resume."""

import json
import math
import os
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from visalign.files import is_full

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
OWN = ("trained", "ema", "optimizer")  # files that every checkpoint has
_NAME = re.compile(r"step-(\d+)$")


def save_checkpoint(folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> Path:
    """Write `folder/step-N` atomically: one safetensors file a name of `tensors`, and `state` as JSON.

    A kill at any moment leaves either the old set of checkpoints or the old set and this one.

    Raises:
        OSError: it could not be written; nothing of it is left behind.
    """
    final, partial = folder / f"step-{step}", folder / f".partial-{step}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        clean(folder)
        partial.mkdir()
        for name, values in tensors.items():
            save_file(
                {k: v.detach().cpu().contiguous() for k, v in values.items()}, str(partial / f"{name}.safetensors")
            )
        sums = {file.name: checksum(file) for file in partial.iterdir()}
        (partial / "state.json").write_text(json.dumps({"step": step, "checksums": sums, **state}))
        for file in partial.iterdir():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        if final.exists():  # of a branch that is done again: out of the way in one move, then the new one in
            os.replace(final, folder / f".partial-{step}-{os.getpid()}-old")
        os.replace(partial, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        size = sum(v.numel() * v.element_size() for values in tensors.values() for v in values.values())
        why = "no room" if is_full(error) else " ".join(str(error).split())
        raise OSError(
            f"checkpoint: could not write {final}, {size:,} bytes ({why}); the earlier checkpoints are whole. Make "
            "room, then run again with --resume"
        ) from error
    return final


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def is_whole(path: Path) -> bool:
    """Whether all files of a checkpoint are there."""
    return all((path / name).is_file() for name in ("state.json", *(f"{name}.safetensors" for name in OWN)))


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints under a folder, by step."""
    paths = [p for p in folder.glob("step-*") if _NAME.search(p.name) and is_whole(p)]
    return sorted(paths, key=lambda p: int(_NAME.search(p.name)[1]))  # type: ignore[index]


def clean(folder: Path) -> None:
    """Delete what a kill left of a checkpoint that was being written or deleted."""
    for path in [*folder.glob(".partial-*"), *(p for p in folder.glob("step-*") if p.is_dir() and not is_whole(p))]:
        shutil.rmtree(path, ignore_errors=True)


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
            os.replace(path, folder / f".partial-{step}-{os.getpid()}-gone")  # half-deleted it is no checkpoint
    clean(folder)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint a `--resume` path means: itself, or the newest whole one of a run folder.

    Raises:
        ValueError: there is none.
    """
    if (path / "state.json").is_file():
        return path
    for folder in (path / "checkpoints", path):
        if paths := checkpoints(folder):
            return paths[-1]
    raise ValueError(
        f"resume: got {str(path)!r}, which holds no checkpoint, expected a run folder or a step-N folder (a run "
        "that ended before its first checkpoint starts anew without --resume)"
    )


def load_state(path: Path) -> dict[str, Any]:
    """A checkpoint's state.json.

    Raises:
        ValueError: it is missing, or not what it should be.
    """
    try:
        state = json.loads((path / "state.json").read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(_damaged(path, error)) from None
    for name, kind in STATE.items():
        value = state.get(name) if isinstance(state, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"resume: {path / 'state.json'} lacks {name!r}, expected a checkpoint of this trainer")
    named = _NAME.search(path.resolve().name)
    if named and int(named[1]) != state["step"]:
        raise ValueError(_damaged(path, f"it holds step {state['step']}"))
    return state


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read a checkpoint back: (tensors by file name, state).

    Raises:
        ValueError: a file is missing, truncated, not as it was written, or holds what no training does.
    """
    state = load_state(path)
    for name in OWN:
        if not (path / f"{name}.safetensors").is_file():
            raise ValueError(f"resume: {path} lacks {name}.safetensors, expected a checkpoint of this trainer")
    try:
        tensors = {f.stem: load_file(str(f)) for f in sorted(path.glob("*.safetensors"))}
        for name, wanted in state.get("checksums", {}).items():  # checkpoints of earlier versions have none
            if checksum(path / name) != wanted:
                raise OSError(f"{name} is not as it was written")
    except (OSError, SafetensorError) as error:
        raise ValueError(_damaged(path, error)) from None
    for group in ("trained", "ema"):
        if bad := [name for name, value in tensors[group].items() if not bool(value.isfinite().all())]:
            raise ValueError(_damaged(path, f"{group}.safetensors has values of {bad[0]} that are not finite"))
    if not math.isfinite(state["train_seconds"]) or min(state["step"], state["skipped"], state["ema_updates"]) < 0:
        raise ValueError(_damaged(path, "state.json holds numbers out of range"))
    return tensors, state


def _damaged(path: Path, reason: object) -> str:
    return f"resume: {path} is damaged ({' '.join(str(reason).split())}); use an earlier step-N folder beside it"


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimiser's state as named tensors: "<parameter index>.<name>"."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{k}": torch.as_tensor(v) for i, entry in state.items() for k, v in entry.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put `optimizer_tensors` back, exactly.

    Raises:
        ValueError: entries are missing, or of another shape than the parameter they belong to.
    """
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    shapes = [tuple(p.shape) for group in optimizer.param_groups for p in group["params"]]
    names = {name for entry in state.values() for name in entry}
    for place, entry in state.items():
        if not 0 <= place < len(shapes):
            raise ValueError(f"resume: optimizer.safetensors has an entry {place}, expected 0 .. {len(shapes) - 1}")
        for name in names:
            shape = tuple(entry[name].shape) if name in entry else None
            if shape is None or shape not in ((), shapes[place]):
                got = f"{name} of shape {shape}" if shape is not None else f"no {name}"
                wanted = f"expected {shapes[place]}"
                raise ValueError(f"resume: optimizer.safetensors has {got} for parameter {place}, {wanted}")
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
