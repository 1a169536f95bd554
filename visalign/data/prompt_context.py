"""What a prompt set knows of its prompts beside the words: metadata and reference pictures, handed to rewards."""

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from visalign import images
from visalign.files import read_lines
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
        """Of the .jsonl and .json files among some prompt sets; others know nothing."""
        files = [Path(path) for path in paths if path is not None and path.endswith((".jsonl", ".json"))]
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
    """The entries of a .jsonl file, one a line, or of a .json file, a list: objects, or texts, prompts by themselves.

    An object has "prompt", and if wanted "metadata" (a mapping) and "references" (paths of pictures, from the file's
    folder). Other keys are put into the metadata.

    Raises:
        ValueError: a line that is no such object, a picture that is not there or cannot be read, or one prompt with
            two different contexts; names the line.
    """
    entries: list[Any] = []
    known: dict[str, Any] = {}
    for where, entry in _items(path):
        entry, line = {"prompt": entry} if isinstance(entry, str) else entry, str(entry)
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
            if not all(isinstance(reference, str) for reference in references):
                raise ValueError(f"{where}: got {references!r} as 'references', expected a list of paths")
            read["references"] = tuple(_checked(path.parent / reference, where) for reference in references)
        if known.setdefault(read["prompt"], read) != read:
            raise ValueError(f"{where}: the prompt {read['prompt']!r} stands there twice, with another context")
        entries.append(read)
    return entries


def _items(path: Path) -> Iterator[tuple[str, Any]]:
    """Where each entry stands, and what it is."""
    try:
        if path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8-sig"))
            if not isinstance(content, list):
                raise ValueError(f"prompts: got {str(path)!r}, which holds a {type(content).__name__}, expected a list")
            yield from ((f"prompts: entry {n} of {str(path)!r}", entry) for n, entry in enumerate(content, 1))
            return
        for number, line in enumerate(read_lines(path), 1):
            where = f"prompts: line {number} of {str(path)!r}"
            if line.strip():
                yield where, json.loads(line)
    except json.JSONDecodeError as error:
        where = f"prompts: {str(path)!r}" if path.suffix == ".json" else where
        raise ValueError(f"{where} is not JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"prompts: {str(path)!r} is nested too deep") from None


@lru_cache(maxsize=4096)
def read_picture(path: Path) -> Tensor:
    """A picture file as (3, H, W) in [0, 1], read once."""
    return pil_to_images([images.read_picture(path)])[0]


def _checked(path: Path, where: str) -> Path:
    try:
        images.read_picture(path)
    except ValueError as error:
        raise ValueError(f"{where}: could not read the picture {str(path)!r}: {error}") from None
    return path
