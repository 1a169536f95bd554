"""Everything that can be refused before a model loads: contestants, prompts, rewards, the folder."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from visalign.data.prompt_context import PromptContext
from visalign.data.prompts import read_prompts
from visalign.rewards import parse_spec
from visalign.sampling.seeds import derived_seed
from visalign.training.run.folder import check_writable
from visalign.worlds import all_captions, world

from .contestants import Contestant, check_contestant, digest, parse_contestant, path_digest, picture_key, reward_key

GOLD = "gold_strict"  # the column of the world's exact judge
_COLUMN = re.compile(r"([A-Za-z][\w.-]*)=(.+)", re.ASCII | re.DOTALL)


@dataclass(frozen=True)
class Column:
    """A reward of the table: its label, what `make_reward` takes, and a name for all that decides its scores."""

    label: str
    spec: str
    key: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """A picture to be: of the prompt at a place in the set; `copy` counts the same words before it."""

    place: int
    prompt: str
    copy: int
    seed: int

    @property
    def name(self) -> str:
        """Of its file: some of its words, and a name for the prompt; not its place, so sets may grow."""
        words = "-".join(re.findall(r"[a-z0-9]+", self.prompt.lower()))[:40].strip("-")
        return f"{words or 'prompt'}-{digest(self.prompt.encode())}-{self.copy}-{self.seed}"

    @property
    def chain_seed(self) -> int:
        """The seed of a search for it; the first of equal prompts has the seed itself, as `visalign generate` has."""
        return self.seed if self.copy == 0 else derived_seed(self.seed, 6, self.copy)


@dataclass(frozen=True)
class Plan:
    """What is to be drawn and scored. `keys`: a name for all that decides each contestant's pictures."""

    contestants: tuple[Contestant, ...]
    keys: tuple[str, ...]
    columns: tuple[Column, ...]
    prompts: list[str]
    seeds: list[int]
    out: Path
    batch_size: int
    dtype: str
    context: PromptContext = field(default_factory=PromptContext)

    @property
    def tasks(self) -> list[Task]:
        """The pictures of a contestant, prompt by prompt: P prompts times S seeds."""
        seen: Counter[str] = Counter()
        tasks = []
        for place, prompt in enumerate(self.prompts):
            tasks += [Task(place, prompt, seen[prompt], seed) for seed in self.seeds]
            seen[prompt] += 1
        return tasks


def make_plan(
    contestants: Sequence[str],
    prompts: str,
    rewards: Sequence[str],
    out: Path,
    *,
    seeds: int = 1,
    seed: int = 0,
    gold: bool = True,
    batch_size: int = 16,
    dtype: str = "float32",
) -> Plan:
    """Check everything that can be checked before a model loads.

    Args:
        contestants: LABEL=MODEL[,NAME=VALUE...] each; see `parse_contestant`.
        prompts: a file; or a number, so many captions of the shapes world's test split; or SPLIT:NUMBER.
        rewards: [LABEL=]SPEC each, as `make_reward` takes it. A search is for the first unless it says another.
        seeds: pictures a prompt; their seeds count up from `seed`.
        gold: also the exact judge, where every prompt is a caption of the shapes world.

    Raises:
        ValueError: one line that names the option, what was given and what is expected.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, expected >= 1")
    if seeds < 1:
        raise ValueError(f"seeds: got {seeds}, expected >= 1, pictures a prompt")
    if seed < 0:
        raise ValueError(f"seed: got {seed}, expected >= 0")
    if not contestants:
        raise ValueError("contestant: got none, expected at least one LABEL=MODEL")
    words, set_key = read_set(prompts)
    of_world = gold and all_captions("shapes", words)
    if not rewards and not of_world:
        raise ValueError("reward: got none, expected at least one, e.g. --reward clip")
    columns = [_column(text, set_key) for text in rewards]
    if of_world:
        columns.append(Column(GOLD, "gold", reward_key("gold", set_key, strict=True), {"strict": True}))
    first = columns[0].spec if rewards else "gold"
    read = [parse_contestant(text, first) for text in contestants]
    for argument, labels in (("contestant", [c.label for c in read]), ("reward", [c.label for c in columns])):
        if twice := [label for label, count in Counter(labels).items() if count > 1]:
            raise ValueError(f"{argument}: got the label {twice[0]!r} twice, expected different ones: LABEL=...")
    for contestant in read:
        check_contestant(contestant)
    check_writable(out, resume=True, argument="out")
    keys = tuple(picture_key(contestant, dtype, set_key) for contestant in read)
    context = PromptContext.of_files(prompts)
    return Plan(
        tuple(read), keys, tuple(columns), words, list(range(seed, seed + seeds)), out, batch_size, dtype, context
    )


def read_set(text: str) -> tuple[list[str], str]:
    """The prompts that an option names, and a name for what is known of them beside the words ("" for nothing)."""
    split, _, number = text.rpartition(":")
    if number.isdecimal() and (split or "test") in world("shapes").SPLITS and not Path(text).exists():
        if int(number) < 1:
            raise ValueError(f"prompts: got {text!r}, expected at least one")
        return world("shapes").world_prompts(split or "test", int(number)), ""
    try:
        return read_prompts(text), path_digest(Path(text)) if text.endswith(".jsonl") else ""
    except ValueError as error:
        splits = ", ".join(world("shapes").SPLITS)
        hint = f", or a number of the shapes world's captions, or one of {splits} with it, as in test:50"
        raise ValueError(f"{error}{hint if 'does not exist' in str(error) else ''}") from None


def _column(text: str, context: str) -> Column:
    named = _COLUMN.fullmatch(text)
    label, spec = (named[1], named[2]) if named else (None, text)
    terms = parse_spec(spec)
    if label is None:
        label = terms[0].label if len(terms) == 1 and not spec.endswith((".yaml", ".yml")) else Path(spec).name
    return Column(label, spec, reward_key(spec, context))
