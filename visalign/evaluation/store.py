"""What an evaluation has finished, in files: a picture or a score that stands there is never made again.

A record is one line of a .jsonl file of the process that made it, written once its pictures are whole; a line cut short
by a kill is none. Processes read each other's lines, never write to each other's files.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from .contestants import digest

Score = dict[str, Any]  # {"score": number or None, "parts": {label: number}, "why": what failed}


@dataclass(frozen=True)
class Drawn:
    """A picture that was drawn, or could not be.

    Attributes:
        file: within the store's folder; "" if it could not be drawn.
        pixels: a name for its content; equal pictures have the same.
        size: (height, width).
        nfe: denoiser calls it took; seconds: of wall time, a batch's shared evenly.
        why: what failed.
    """

    name: str
    file: str = ""
    pixels: str = ""
    size: tuple[int, int] = (0, 0)
    nfe: int = 0
    seconds: float = 0.0
    why: str = ""


class Store:
    """The pictures and scores under a folder; see the module.

    Args:
        process: the number of this process, which names the files it writes.
    """

    def __init__(self, folder: Path, process: int = 0) -> None:
        self.folder, self.process = folder, process

    def drawn(self, key: str) -> dict[str, Drawn]:
        """The pictures of a contestant by name; of those that failed and were drawn later, the picture."""
        pictures: dict[str, Drawn] = {}
        for record in self._lines(self.folder / "pictures" / key, "drawn"):
            for entry in record:
                picture = Drawn(**{**entry, "size": tuple(entry.get("size", (0, 0)))})
                if picture.file and not (self.folder / picture.file).is_file():
                    continue  # somebody deleted it: it is drawn again
                if picture.file or picture.name not in pictures:
                    pictures[picture.name] = picture
        return pictures

    def keep(
        self,
        key: str,
        names: Sequence[str],
        pictures: Sequence[np.ndarray | str],
        nfe: Sequence[int],
        seconds: float,
        texts: Sequence[dict[str, str]],
    ) -> None:
        """Write pictures (uint8 (H, W, 3) each; a text is the reason why there is none), then that they are there.

        Args:
            texts: what each file shall say of itself.
        """
        folder = self.folder / "pictures" / key
        folder.mkdir(parents=True, exist_ok=True)
        records = []
        for name, picture, calls, text in zip(names, pictures, nfe, texts, strict=True):
            if isinstance(picture, str):
                records.append({"name": name, "why": picture, "nfe": calls})
                continue
            info = PngInfo()
            for label, words in text.items():
                info.add_itxt(label, words)
            path = folder / f"{name}.png"
            with open(path, "wb") as file:
                Image.fromarray(picture).save(file, format="PNG", pnginfo=info)
                os.fsync(file.fileno())
            entry = {"name": name, "file": str(path.relative_to(self.folder)), "pixels": pixels_digest(picture)}
            records.append(entry | {"size": picture.shape[:2], "nfe": calls, "seconds": seconds / len(names)})
        self._append(folder, "drawn", records)

    def picture(self, stored: Drawn) -> np.ndarray:
        """Its pixels, uint8 (H, W, 3).

        Raises:
            ValueError: the file is not the picture that was drawn.
        """
        try:
            with Image.open(self.folder / stored.file) as image:
                pixels = np.asarray(image.convert("RGB"))
        except (OSError, UnidentifiedImageError, SyntaxError) as error:
            raise ValueError(f"out: could not read {self.folder / stored.file} ({error}); {_AGAIN}") from None
        if pixels_digest(pixels) != stored.pixels:
            raise ValueError(f"out: {self.folder / stored.file} has changed since it was drawn; {_AGAIN}")
        return pixels

    def scores(self, key: str) -> dict[tuple[str, str], Score]:
        """Scores of a reward by (pixels, prompt); of those that failed and were scored later, the score."""
        results: dict[tuple[str, str], Score] = {}
        for record in self._lines(self.folder / "scores", key):
            for pixels, prompt, score in record:
                if (pixels, prompt) not in results or results[pixels, prompt]["score"] is None:
                    results[pixels, prompt] = score
        return results

    def keep_scores(self, key: str, scores: dict[tuple[str, str], Score]) -> None:
        """Keep scores by (pixels, prompt), all or none of them."""
        self._append(self.folder / "scores", key, [[pixels, prompt, one] for (pixels, prompt), one in scores.items()])

    def _append(self, folder: Path, kind: str, record: list[Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"{kind}-{self.process}.jsonl", "a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(record, allow_nan=False) + "\n")  # the first ends a line cut short
            file.flush()
            os.fsync(file.fileno())

    def _lines(self, folder: Path, kind: str) -> Iterator[list[Any]]:
        for file in sorted(folder.glob(f"{kind}-*.jsonl")):
            for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    yield json.loads(line)
                except ValueError:
                    continue


_AGAIN = "delete it, and it is drawn again"


def pixels_digest(pixels: np.ndarray) -> str:
    """A name for a picture's size and content."""
    return digest(str(pixels.shape).encode() + np.ascontiguousarray(pixels).tobytes())
