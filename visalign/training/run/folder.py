"""A run's folder and its instruments: metrics, tensorboard, pictures, stage timers, progress, being told to stop."""

import itertools
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from visalign.files import write_whole

from .checkpoint import checkpoints

WATCH = "the hacking watch"  # in Run.stopping, where a signal's name stands else


def check_writable(folder: Path, resume: bool, argument: str = "run_dir") -> None:
    """Refuse a folder that cannot be written, or that holds another run's checkpoints.

    Raises:
        ValueError: it says what to do.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{argument}: got {str(folder)!r}, a file, expected a folder")
    if not resume and checkpoints(folder / "checkpoints"):
        raise ValueError(
            f"run_dir: {str(folder)!r} already holds a run; add --resume {folder}, or choose another run_dir"
        )
    parent = next(p for p in (folder, *folder.resolve().parents) if p.exists())
    try:
        probe = parent / f".visalign-probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{argument}: got {str(folder)!r}, which cannot be written ({error.strerror})") from None


class Claim:
    """A run folder held by this process alone; the system lets go of it when the process ends.

    Args:
        folder: made if need be.
        fresh: nobody gave its name: it must be new, and where it is taken, it gets a number.

    Raises:
        ValueError: another process holds it.
    """

    def __init__(self, folder: Path, fresh: bool = False) -> None:
        self._missing = [path for path in (folder, *folder.parents) if not path.exists()]
        self.folder = new_folder(folder) if fresh else folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.folder / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"run_dir: got {str(folder)!r}, where another process is training; wait for it, or choose another "
                "run_dir"
            ) from None

    def release(self) -> None:
        """Let go; where nothing was put into the folder, it goes, with the folders above that were made for it."""
        self._lock.release()
        if not self.folder.is_dir() or [path.name for path in self.folder.iterdir()] not in ([], [".lock"]):
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        for path in self._missing:
            with suppress(OSError):
                path.rmdir()


def new_folder(folder: Path) -> Path:
    """`folder`, made; where it exists already, its name with a number."""
    for number in itertools.count(1):
        path = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            continue
    raise AssertionError("unreachable")


class Run:
    """The instruments of one process of a run; only the main process writes.

    Attributes:
        stopping: the name of the signal that asked the run to stop, or WATCH, or None. A second Ctrl-C ends at once.
    """

    def __init__(self, folder: Path, *, main: bool, total: int, done: int = 0):
        self.folder, self.main = folder, main
        self.stopping: str | None = None
        self.seconds: dict[str, float] = {}
        self.console = Console(stderr=True, quiet=not main)
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=self.console,
            disable=not main or not self.console.is_terminal,
        )
        self.task = self.progress.add_task("training", total=total, completed=done, note="")
        self.said_rounding = False
        self.board: SummaryWriter | None = None
        if main:
            (folder / "samples").mkdir(parents=True, exist_ok=True)
            self._keep_metrics_before(done)
            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1 if done else 0)
        self._handlers = {s: signal.signal(s, self._stop) for s in (signal.SIGINT, signal.SIGTERM)}

    def _stop(self, number: int, _frame: Any) -> None:
        if self.stopping:
            raise KeyboardInterrupt
        self.stopping = signal.Signals(number).name
        self.say(f"{self.stopping}: finishing the step under way, then saving; once more to stop at once")

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent within to a stage of the current step."""
        started = time.perf_counter()
        try:
            yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def log(self, step: int, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl, with the stages' seconds and the peak memory, and the same to tensorboard."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        values = {"step": step, **finite}  # JSON has no NaN
        values |= {f"seconds_{name}": round(s, 4) for name, s in self.seconds.items()}
        values["peak_memory_bytes"] = peak_memory()
        self.seconds = {}
        if not self.main:
            return
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(values) + "\n")
        assert self.board is not None
        for name, value in values.items():
            if isinstance(value, int | float) and name != "step":
                self.board.add_scalar(name, value, step)

    def advance(self, step: int, note: str) -> None:
        self.progress.update(self.task, completed=step, note=note)
        if self.progress.disable:
            self.say(f"step {step}  {note}")

    def save_grid(self, name: str, images: Tensor, columns: int = 8) -> None:
        """Write images (N, 3, H, W) in [0, 1] as one picture under samples/, enlarged if they are tiny."""
        if not self.main or not len(images):
            return
        from torchvision.utils import (  # 6 s of a processor, which a plan or a refusal can do without
            make_grid,
            save_image,
        )

        images = images[:, 0] if images.dim() == 5 else images  # first frame of a video
        scale = max(1, 128 // images.shape[-1])
        images = images.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
        save_image(make_grid(images, columns, padding=4, pad_value=1), self.folder / "samples" / name)

    def close(self) -> None:
        self.progress.stop()
        if self.board is not None:
            self.board.close()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _keep_metrics_before(self, done: int) -> None:
        """Drop what will be written again: lines of later steps, a finished run's last evaluation, a line cut short."""
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return
        latest = {line["step"]: line for line in reversed(read_metrics(path)) if done and line["step"] <= done}
        write_whole(path, "".join(json.dumps(line) + "\n" for line in reversed(latest.values())))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl: those that hold a step."""
    lines = []
    for line in path.read_text(errors="replace").split("\n"):
        try:
            values = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            continue
        if isinstance(values, dict) and type(values.get("step")) is int:
            lines.append(values)
    return lines


def peak_memory() -> int:
    """Bytes: the most this process has held on its GPU, or, without one, in main memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
