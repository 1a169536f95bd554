"""What people prefer, kept on disk: an append-only log beside the pictures, which is itself a dataset.

    FOLDER/metadata.jsonl      a line a vote
    FOLDER/images/SHA256.png   the pictures, each once

Columns as in the common preference layout: `prompt`, `image_0_file_name` and `image_1_file_name` (the pictures shown
left and right; `datasets` turns them into columns of images `image_0`, `image_1`), `label` (one of LABELS), `label_0`
and `label_1` (1 and 0, or 0.5 each without a winner), `seed_0`, `seed_1`, `model_0`, `model_1`, `rewards_0` and
`rewards_1` (JSON by name), `swapped` (whether the first of the two models was on the right), `blind`, `pair`, `time`.

A vote is on disk before `add` returns. A line that a crash cut short was never acknowledged; readers skip it.
"""

import fcntl
import hashlib
import io
import json
import os
import shutil
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from PIL import Image

from visalign.files import write_whole

LABELS = ("image_0", "image_1", "tie", "both_bad")
SHARES = {"image_0": (1.0, 0.0), "image_1": (0.0, 1.0), "tie": (0.5, 0.5), "both_bad": (0.5, 0.5)}
LOG = "metadata.jsonl"


@dataclass(frozen=True)
class Pair:
    """Two pictures shown side by side, and how they came about; `_0` is the one on the left."""

    name: str  # of this showing; a second vote on it is refused
    prompt: str
    images: tuple[Image.Image, Image.Image]
    seeds: tuple[int, int]
    models: tuple[str, str]
    rewards: tuple[Mapping[str, float], Mapping[str, float]] = field(default_factory=lambda: ({}, {}))
    swapped: bool = False
    blind: bool = True


class VoteStore:
    """The votes of a folder. Any number of threads and processes may add to it."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._lock = threading.Lock()
        self._seen: set[str] = set()

    def add(self, pair: Pair, label: str) -> dict[str, Any]:
        """Store a vote; it is on disk when this returns.

        Raises:
            ValueError: an unknown label, or a second vote on a pair.
            OSError: it could not be written, and is not stored.
        """
        if label not in LABELS:
            raise ValueError(f"label: got {label!r}, expected one of {LABELS}")
        with self._lock:
            if pair.name in self._seen:
                raise ValueError("pair: got a vote before, expected one vote on each pair")
            (self.folder / "images").mkdir(parents=True, exist_ok=True)
            row = _row(pair, label, [self._keep(image) for image in pair.images])
            self._append(json.dumps(row, ensure_ascii=False))
            self._seen.add(pair.name)
            return row

    def rows(self) -> list[dict[str, Any]]:
        """All votes in order; lines that are not whole are left out."""
        try:
            lines = (self.folder / LOG).read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        rows = []
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:  # cut short, or empty
                continue
            if isinstance(row, dict) and row.get("label") in LABELS:
                rows.append(row)
        return rows

    def export(self, folder: str | Path) -> Path:
        """Write the dataset as a folder that `datasets.load_dataset("imagefolder", data_dir=folder)` reads.

        Only whole votes and their pictures go into it. Built beside its place, so that it is whole or absent.

        Raises:
            ValueError: there is no vote yet, or the folder exists.
        """
        folder, rows = Path(folder), self.rows()
        if not rows:
            raise ValueError("votes: got none, expected at least one to export")
        if folder.exists():
            raise ValueError(f"folder: got {str(folder)!r}, which exists, expected a new one")
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "images").mkdir(parents=True)
        for name in dict.fromkeys(row[f"image_{k}_file_name"] for row in rows for k in (0, 1)):
            shutil.copy(self.folder / name, partial / name)
        (partial / LOG).write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )
        os.replace(partial, folder)
        return folder

    def _keep(self, image: Image.Image) -> str:
        """The picture on disk, once, under the digest of its pixels; its path in the folder."""
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        name = f"images/{hashlib.sha256(image.tobytes() + repr(image.size).encode()).hexdigest()}.png"
        path = self.folder / name
        if not path.exists():
            write_whole(path, buffer.getvalue())
            _sync_folder(path.parent)
        return name

    def _append(self, line: str) -> None:
        path = self.folder / LOG
        fresh = not path.exists()
        with open(path, "ab+") as file, _locked(file):
            end = file.seek(0, os.SEEK_END)
            torn = False
            if end:
                file.seek(end - 1)
                torn = file.read(1) != b"\n"
            try:
                file.write((b"\n" if torn else b"") + line.encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                os.ftruncate(file.fileno(), end)  # half a line is no vote
                raise
        if fresh:
            _sync_folder(self.folder)


def zipped(folder: Path) -> Path:
    """A folder as one file beside it, FOLDER.zip, whole or absent."""
    path = folder.with_name(f"{folder.name}.zip")
    partial = path.with_name(f".{path.name}.partial")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(folder.parent))
    os.replace(partial, path)
    return path


def _row(pair: Pair, label: str, files: list[str]) -> dict[str, Any]:
    row: dict[str, Any] = {"prompt": pair.prompt}
    for k in (0, 1):
        row[f"image_{k}_file_name"] = files[k]
    row["label"] = label
    for k in (0, 1):
        row |= {f"label_{k}": SHARES[label][k], f"seed_{k}": pair.seeds[k], f"model_{k}": pair.models[k]}
        row[f"rewards_{k}"] = json.dumps(dict(pair.rewards[k]), ensure_ascii=False)
    row |= {"swapped": pair.swapped, "blind": pair.blind, "pair": pair.name}
    return row | {"time": datetime.now(UTC).isoformat(timespec="milliseconds")}


@contextmanager
def _locked(file: Any) -> Iterator[None]:
    """Within, no other process appends."""
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


def _sync_folder(folder: Path) -> None:
    """Names of new files are on disk too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
