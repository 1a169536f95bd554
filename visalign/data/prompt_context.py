"""What a prompt set knows of its prompts beside the words: metadata and reference pictures, handed to rewards."""

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from torch import Tensor

from visalign.images import pil_to_images

KEYS = ("prompt", "metadata", "references")


class PromptContext:
    """Metadata and references by prompt; `context(prompts)` is what rewards take as their context.

    A set of plain prompts has neither, and its context is empty.
    """

    def __init__(self, entries: dict[str, dict[str, Any]] | None = None) -> None:
        self._entries = entries or {}
        self._keys = [key for key in KEYS[1:] if any(key in entry for entry in self._entries.values())]

    @classmethod
    def of_files(cls, *paths: str | None) -> "PromptContext":
        """Of the .jsonl files among some prompt sets; others know nothing."""
        files = [Path(path) for path in paths if path is not None and path.endswith(".jsonl")]
        return cls({entry["prompt"]: entry for file in files for entry in read_entries(file)})

    def __call__(self, prompts: Sequence[str]) -> dict[str, Any]:
        """`metadata`: N mappings; `references`: N lists of pictures (3, H, W) in [0, 1]; only those the set has."""
        context: dict[str, Any] = {}
        if "metadata" in self._keys:
            context["metadata"] = [self._entries.get(prompt, {}).get("metadata", {}) for prompt in prompts]
        if "references" in self._keys:
            paths = [self._entries.get(prompt, {}).get("references", ()) for prompt in prompts]
            context["references"] = [[read_picture(path) for path in own] for own in paths]
        return context


def read_entries(path: Path) -> list[dict[str, Any]]:
    """The entries of a .jsonl file: one object a line with "prompt", and if wanted "metadata" (a mapping) and
    "references" (paths of pictures, from the file's folder). Other keys are put into the metadata.

    Raises:
        ValueError: a line that is no such object, a picture that is not there or cannot be read, or one prompt with
            two different contexts; names the line.
    """
    entries: list[Any] = []
    known: dict[str, Any] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"prompts: line {number} of {str(path)!r}"
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where} is not JSON: {error}") from None
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str) or not entry["prompt"].strip():
            raise ValueError(f"{where}: got {line[:80]!r}, expected an object with a text 'prompt'")
        metadata, references = entry.get("metadata", {}), entry.get("references", [])
        if not isinstance(metadata, dict) or not isinstance(references, list):
            raise ValueError(f"{where}: expected a mapping as 'metadata' and a list of paths as 'references'")
        other = {key: value for key, value in entry.items() if key not in KEYS}
        read: dict[str, Any] = {"prompt": entry["prompt"].strip()}
        if metadata or other:
            read["metadata"] = {**other, **metadata}
        if references:
            read["references"] = tuple(_checked(path.parent / reference, where) for reference in references)
        if known.setdefault(read["prompt"], read) != read:
            raise ValueError(f"{where}: the prompt {read['prompt']!r} stands there twice, with another context")
        entries.append(read)
    return entries


@lru_cache(maxsize=4096)
def read_picture(path: Path) -> Tensor:
    """A picture file as (3, H, W) in [0, 1], read once."""
    with Image.open(path) as picture:
        return pil_to_images([picture.convert("RGB")])[0]


def _checked(path: Path, where: str) -> Path:
    try:
        with Image.open(path) as picture:
            picture.load()
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise ValueError(f"{where}: could not read the picture {str(path)!r}: {error}") from None
    return path
