"""Prompts: reading sets, and the sampler of groups, which is the same for any number of processes."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from visalign.files import read_lines
from visalign.sampling.seeds import derived_seed

from .prompt_context import read_entries

COLUMNS = ("prompt", "caption", "text")
G = TypeVar("G")


@dataclass(frozen=True)
class Group:
    """The samples of one prompt in one iteration.

    `index` is the group's place in the iteration (its id: duplicate prompts stay apart). `seeds` give each member's
    initial noise (all equal with same_latents), `noise_seeds` the noise of its stochastic steps.
    """

    index: int
    prompt: str
    seeds: tuple[int, ...]
    noise_seeds: tuple[int, ...]


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a text file, one a line; empty lines and lines that begin with # are left out.

    A .jsonl file holds one object a line, a .json file a list of them, with metadata and references beside the prompt;
    see `read_entries`. A .csv or .tsv file has a column "prompt", "caption" or "text".

    Raises:
        ValueError: no such file, a folder, not text, or no prompt in it.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"prompts: got {str(path)!r}, a folder, expected a text file with one prompt a line")
    if not path.is_file():
        raise ValueError(f"prompts: got {str(path)!r}, which does not exist, expected a text file")
    try:
        if path.suffix in (".jsonl", ".json"):
            prompts = [entry["prompt"] for entry in read_entries(path)]
        elif path.suffix in (".csv", ".tsv"):
            prompts = _column(path)
        else:
            lines = [line.strip() for line in read_lines(path)]
            prompts = [line for line in lines if line and not line.startswith("#")]
    except UnicodeDecodeError:
        raise ValueError(f"prompts: got {str(path)!r}, which is not UTF-8 text") from None
    if not prompts:
        raise ValueError(f"prompts: got {str(path)!r}, which holds no prompt, expected one a line")
    return prompts


def _column(path: Path) -> list[str]:
    """The prompts of a table with a header."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        table = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        names = [name for name in table.fieldnames or () if name and name.strip().lower() in COLUMNS]
        if len(names) != 1:
            got = [name for name in table.fieldnames or ()]
            raise ValueError(f"prompts: got {str(path)!r} with columns {got}, expected one of them called {COLUMNS}")
        return [text for row in table if (text := " ".join((row[names[0]] or "").split()))]


def overlap(train: Sequence[str], test: Sequence[str]) -> list[str]:
    """Prompts of `test` that also stand in `train`, compared without case and spacing."""
    known = {" ".join(p.lower().split()) for p in train}
    return [p for p in test if " ".join(p.lower().split()) in known]


def iteration_groups(
    prompts: Sequence[str], iteration: int, count: int, group_size: int, seed: int, same_latents: bool = False
) -> list[Group]:
    """The groups of one iteration: a function of its arguments alone.

    Prompts are visited in random order, each once before any is visited again (a new order every pass).
    """
    groups = []
    for index in range(count):
        place = iteration * count + index
        order = torch.Generator().manual_seed(derived_seed(seed, 1, place // len(prompts)))
        prompt = prompts[int(torch.randperm(len(prompts), generator=order)[place % len(prompts)])]
        noise = tuple(derived_seed(seed, 2, place, member) for member in range(group_size))
        first = (derived_seed(seed, 3, place),) * group_size
        groups.append(Group(index, prompt, first if same_latents else noise, noise))
    return groups


def share_of(groups: Sequence[G], process: int, processes: int) -> list[G]:
    """The groups of one process, whole groups, dealt in turn, so that any prefix is shared evenly.

    Raises:
        ValueError: the groups cannot be shared evenly.
    """
    if len(groups) % processes:
        raise ValueError(
            f"groups: got {len(groups)} prompts an update for {processes} processes, expected a multiple, so that each "
            "process holds whole groups"
        )
    return list(groups[process::processes])
