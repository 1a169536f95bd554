"""Files that come in and go out: uploads decoded with care, run folders read and nothing else, results written."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from visalign.images import read_picture as read_any
from visalign.search.session import write_json

from .settings import MAX_PIXELS, MAX_UPLOAD

FORMATS = ("PNG", "JPEG", "WEBP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MOST_UPLOADS = 32


def decode_upload(path: str | Path) -> Image.Image:
    """An uploaded picture as RGB, upright, on white where it was transparent; the first frame of several.

    Raises:
        ValueError: too many bytes or pixels, no picture of FORMATS, or one that is broken. Nothing of it is decoded
            before its size is known.
    """
    path = Path(path)
    name = path.name[-80:]
    if path.stat().st_size > MAX_UPLOAD:
        raise ValueError(f"{name}: got {path.stat().st_size:,} bytes, expected at most {MAX_UPLOAD:,}")
    try:
        return read_any(path, FORMATS, MAX_PIXELS)
    except ValueError as error:  # a file's name alone: where the server keeps it is nobody's business
        raise ValueError(f"{name}: {str(error).partition(': ')[2]}") from None


# Run folders ----------------------------------------------------------------------------------------------------------


def run_names(root: Path) -> list[str]:
    """The run folders of a folder: those with metrics.jsonl, newest first."""
    if not root.is_dir():
        return []
    paths = [path for path in root.iterdir() if (path / "metrics.jsonl").is_file() and _inside(path, root)]
    return [path.name for path in sorted(paths, key=lambda p: (p / "metrics.jsonl").stat().st_mtime, reverse=True)]


def run_folder(root: Path, name: str) -> Path:
    """The folder of a run that `run_names` lists.

    Raises:
        ValueError: any other name, however written.
    """
    if name not in run_names(root):
        raise ValueError(f"run: got {name!r}, expected one of the runs in {str(root)!r}")
    return root / name


def sample_files(folder: Path) -> list[Path]:
    """The sample grids of a run in the order of its steps: before, step by step, after."""
    places = {"before": -1.0, "after": float("inf")}

    def place(path: Path) -> tuple[float, str]:
        digits = "".join(c for c in path.stem if c.isdigit())
        return places.get(path.stem, float(digits) if digits else 0.0), path.name

    return sorted((p for p in (folder / "samples").glob("*.png") if _inside(p, folder)), key=place)


def read_picture(path: Path, most: int = 1600) -> Image.Image:
    """A picture of a run, at most so many pixels wide.

    Raises:
        ValueError: it cannot be read, perhaps as it is being written.
    """
    try:
        with Image.open(path, formats=("PNG",)) as image:
            picture = image.convert("RGB")
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path.name}: cannot be read just now ({error})") from None
    picture.thumbnail((most, 10 * most))
    return picture


def _inside(path: Path, root: Path) -> bool:
    """Whether a path, its links followed, lies in the folder."""
    return path.resolve().is_relative_to(root.resolve())


# Results --------------------------------------------------------------------------------------------------------------


def save_comparison(
    out: Path, left: Sequence[Image.Image], right: Sequence[Image.Image], facts: Mapping[str, Any]
) -> list[Path]:
    """Write a comparison into a new folder under `out`: comparison.png, comparison.json, and each picture by itself.

    Every PNG has the prompt, its seed and the settings in its text; the JSON holds the same.

    Args:
        facts: "prompt", "seeds", "left" and "right" among them, as JSON can hold them.

    Returns:
        The paths, the first two as named above.
    """
    folder = new_folder(out / "comparisons")
    pictures: list[Path] = []
    for side, images in (("left", left), ("right", right)):
        for seed, picture in zip(facts["seeds"], images):
            path = folder / f"{side}-seed{seed}.png"
            own = {key: facts[key] for key in facts if key not in ("left", "right", "rewards")}
            picture.save(
                path, pnginfo=png_info({**own, "seeds": [seed], "made_by": facts[side]}, facts["prompt"], seed)
            )
            pictures.append(path)
    sheet = folder / "comparison.png"
    side_by_side(left, right).save(sheet, pnginfo=png_info(facts, facts["prompt"], facts["seeds"][0]))
    notes = folder / "comparison.json"
    write_json(notes, facts)
    return [sheet, notes, *pictures]


def side_by_side(left: Sequence[Image.Image], right: Sequence[Image.Image]) -> Image.Image:
    """A row for each seed, left beside right; tiny pictures enlarged without blur."""
    first = (*left, *right)[0]
    factor = max(1, 256 // max(first.size))
    width, height = first.width * factor, first.height * factor
    rows = max(len(left), len(right))
    sheet = Image.new("RGB", (2 * width + 8, rows * (height + 8) - 8), "white")
    for column, images in enumerate((left, right)):
        for row, picture in enumerate(images):
            enlarged = picture.resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (column * (width + 8), row * (height + 8)))
    return sheet


def png_info(facts: Mapping[str, Any], prompt: str, seed: int) -> PngInfo:
    """The text of a PNG: prompt, seed, and all facts as JSON under "visalign"."""
    info = PngInfo()
    info.add_itxt("prompt", prompt)
    info.add_text("seed", str(seed))
    info.add_itxt("visalign", json.dumps(facts, ensure_ascii=False))
    return info


def new_folder(parent: Path) -> Path:
    """A new folder named by the time."""
    parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=datetime.now(UTC).strftime("%Y%m%d-%H%M%S-"), dir=parent))


def to_download(path: Path) -> str:
    """A copy that the page may hand out: under the cache folder, at a place that nobody can guess."""
    folder = Path(tempfile.mkdtemp(dir=os.environ["GRADIO_TEMP_DIR"]))
    return str(shutil.copy(path, folder / path.name))
