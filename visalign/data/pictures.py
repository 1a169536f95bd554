"""Pictures with captions to train on: a folder of them, or a world's, drawn as they are asked for."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from visalign.files import read_lines
from visalign.images import numpy_to_images, picture_files, read_picture
from visalign.worlds import WORLDS, world

KEYS = ("file_name", "text", "condition", "labels")


@dataclass(frozen=True)
class Drawn:
    """Some pictures (N, 3, H, W), or videos (N, F, 3, H, W), with what else is known of them."""

    pictures: Tensor
    conditions: Tensor  # (N, 3, H, W): what a ControlNet is shown
    context: dict[str, Any]  # for rewards: references, and condition where there are maps (N, H, W)

    def to(self, device: torch.device) -> "Drawn":
        """On a device, but for the context: rewards look to that."""
        return replace(self, pictures=self.pictures.to(device), conditions=self.conditions.to(device))


class Pictures(Protocol):
    """Pictures by caption."""

    @property
    def conditioned(self) -> bool:
        """Whether every picture has its condition."""
        ...

    def captions(self) -> tuple[list[str], list[str]] | None:
        """For training, and held out; None: any that `check` lets pass."""
        ...

    def check(self, captions: Sequence[str]) -> None:
        """Raise ValueError for a caption without a picture; names it."""
        ...

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], size: tuple[int, int]) -> Drawn:
        """One picture of each caption, of `size` (height, width)."""
        ...


class PictureFolder:
    """A folder with `metadata.jsonl`, one object a line, paths relative to the folder.

    `file_name` is a picture, or a folder of frames; `text` its caption; `condition`, where the model needs one, a
    picture of the edges, depth or segments; `labels` a grey picture whose pixel values are classes, for rewards.

    Raises:
        ValueError: no such folder or file, an unknown key, a missing one; names the line.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        file = self.folder / "metadata.jsonl"
        if not file.is_file():
            raise ValueError(f"data: got {str(folder)!r}, expected 'shapes' or a folder with metadata.jsonl")
        self.rows: list[dict[str, str]] = []
        for number, line in enumerate(read_lines(file), 1):
            if line.strip():
                self.rows.append(self._read(line, f"{file}, line {number}"))
        if len(self.rows) < 2:
            raise ValueError(f"data: got {len(self.rows)} pictures in {str(file)!r}, expected at least 2")
        self.by_text: dict[str, list[dict[str, str]]] = {}
        for row in self.rows:
            self.by_text.setdefault(row["text"], []).append(row)

    def _read(self, line: str, where: str) -> dict[str, str]:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"data: {where} is no JSON ({error})") from None
        if not isinstance(row, dict) or not {"file_name", "text"} <= row.keys() <= set(KEYS):
            raise ValueError(f"data: {where} holds {str(row)[:80]}, expected file_name and text, and of {KEYS} alone")
        for key in set(row) - {"text"}:
            if not (self.folder / row[key]).exists():
                raise ValueError(f"data: {where} names {row[key]!r}, which does not exist")
        return row

    def captions(self) -> tuple[list[str], list[str]]:
        """For training, and held out: the last tenth of the distinct ones."""
        texts = list(self.by_text)
        cut = max(1, len(texts) // 10)
        if len(texts) < 2:
            raise ValueError(f"data: got one caption in {str(self.folder)!r}, expected more, some to be held out")
        return texts[:-cut], texts[-cut:]

    def check(self, captions: Sequence[str]) -> None:
        """The captions are its own."""

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], size: tuple[int, int]) -> Drawn:
        """One picture of each caption, of `size` (height, width); `seeds` choose among several of one caption."""
        rows = [self.by_text[p][s % len(self.by_text[p])] for p, s in zip(prompts, seeds)]
        pictures = torch.stack([self._picture(row["file_name"], size) for row in rows])
        conditions = pictures if pictures.ndim == 4 else pictures[:, 0]
        context: dict[str, Any] = {"references": [[picture] for picture in pictures]}
        if all("condition" in row for row in rows):
            conditions = torch.stack([self._picture(row["condition"], size) for row in rows])
            context["condition"] = conditions.mean(1)
        if all("labels" in row for row in rows):
            context["condition"] = torch.stack([self._labels(row["labels"], size) for row in rows])
        return Drawn(pictures, conditions, context)

    @property
    def conditioned(self) -> bool:
        """Whether every picture has its condition."""
        return all("condition" in row for row in self.rows)

    def _picture(self, name: str, size: tuple[int, int]) -> Tensor:
        path = self.folder / name
        if path.is_dir():
            frames = picture_files(path)
            if not frames:
                raise ValueError(f"data: got no pictures in {str(path)!r}, expected the frames of a video")
            return torch.stack([_read_image(p, size) for p in frames])
        return _read_image(path, size)

    def _labels(self, name: str, size: tuple[int, int]) -> Tensor:
        with Image.open(self.folder / name) as image:
            resized = _crop(ImageOps.exif_transpose(image).convert("L"), size, Image.Resampling.NEAREST)
        return torch.from_numpy(np.asarray(resized).copy()).long()


def open_pictures(data: str) -> Pictures:
    """A `PictureFolder`, or what a world draws: "shapes"."""
    return world(data).DrawnPictures() if data in WORLDS else PictureFolder(data)


def _read_image(path: Path, size: tuple[int, int]) -> Tensor:
    try:
        picture = _crop(read_picture(path), size, Image.Resampling.BICUBIC)
    except ValueError as error:
        raise ValueError(f"data: could not read {str(path)!r} ({error})") from None
    return numpy_to_images(np.asarray(picture)[None])[0]


def _crop(image: Image.Image, size: tuple[int, int], filter: Image.Resampling) -> Image.Image:
    """Scaled to cover (height, width), then its middle."""
    scale = max(size[0] / image.height, size[1] / image.width)
    width, height = max(size[1], round(image.width * scale)), max(size[0], round(image.height * scale))
    left, top = (width - size[1]) // 2, (height - size[0]) // 2
    return image.resize((width, height), filter).crop((left, top, left + size[1], top + size[0]))
