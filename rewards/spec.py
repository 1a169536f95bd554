"""Rewards by name: from what a config or a command line says to a reward, checked before anything heavy is loaded."""

import inspect
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from visalign.files import read_yaml
from visalign.locations import check_location, load_location, module_files
from visalign.names import unknown_name

from .base import Reward, as_reward, reward_factory, reward_names
from .combine import Combine, check_members, read_combine
from .scoring import CombinedReward, Member
from .shaping import Transform, read_transforms

# remote:URL[:WEIGHT]; a number straight after the host is the port
REMOTE = re.compile(r"remote:(?P<url>https?://(\[[^]]*\]|[^:/\s]+)(:\d+(?![\d.]))?(/[^:\s]*)?)(:(?P<weight>[^:]+))?")
TEXTS = (".py", ".yaml", ".yml", ".json", ".jsonl", ".txt")  # of files that say what a reward is; no weights
MODULES = "VISALIGN_YAML_MODULES"  # 1: YAML files may name attributes of modules, which are called with their options
RewardSpec = str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]]


@dataclass(frozen=True)
class Term:
    """One reward of a spec."""

    name: str  # registered name, "module:attribute" or "path/to/file.py:attribute"
    weight: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""  # name in logs: the name, or the attribute; numbered where one comes twice
    transform: tuple[Transform, ...] = ()  # of its scores, before they are combined


def parse_spec(spec: RewardSpec, **options: Any) -> tuple[Term, ...]:
    """Read a spec and check that what it names exists, without loading a model or running a user's file.

    Args:
        spec: "clip", "my_module:attribute", "my_file.py:attribute", a weighted sum "clip:0.7+my_file.py:sharp:0.3",
            "remote:http://host:port" of a reward served elsewhere (with a weight: "remote:http://host:port:0.5"),
            a mapping {"name": ..., "weight": ..., "transform": ..., further keys are options}, a list of names and
            mappings, or {"rewards": such a list, "combine": one of COMBINERS, further keys are its options}.
            "mix.yaml" is a file that holds any of these. A path with a "+" in it needs the mapping.
        options: of the reward, where the spec names only one.

    Raises:
        ValueError: an unknown name, file, module, attribute or option (with the nearest valid one), a bad weight.
    """
    return _read_spec(spec, options)[0]


def _read_spec(spec: RewardSpec, options: Mapping[str, Any]) -> tuple[tuple[Term, ...], Combine]:
    file = spec if isinstance(spec, str) and spec.endswith((".yaml", ".yml")) else None
    spec = _read_yaml(file) if file else spec
    combine = Combine()
    if isinstance(spec, Mapping) and "rewards" in spec:
        combine = read_combine({key: value for key, value in spec.items() if key != "rewards"})
        spec = spec["rewards"]
    if not isinstance(spec, (str, Mapping, Sequence)):
        raise ValueError(f"spec: got {spec!r}, expected a string, a mapping or a list of them")
    items = [spec] if isinstance(spec, (str, Mapping)) else list(spec)
    terms = [term for item in items for term in (_read_sum(item) if isinstance(item, str) else [_read_mapping(item)])]
    if not terms:
        raise ValueError("spec: got an empty list, expected at least one reward")
    if options and len(terms) > 1:
        raise ValueError(
            f"spec: got {spec!r} with options {sorted(options)}, expected one reward; give options by mapping"
        )
    if options:
        terms = [replace(terms[0], options={**terms[0].options, **options})]
    seen: dict[str, int] = {}
    for k, term in enumerate(terms):
        where = term.name.rpartition(":")[0]
        if file and where and not where.endswith(".py") and os.environ.get(MODULES) != "1":
            raise ValueError(
                f"spec: {file!r} names {term.name!r}, an attribute of a module; a file is data, and may name your own "
                f"path/to/file.py:attribute. Give it on the command line, or set {MODULES}=1"
            )
        _check_term(term)
        label = term.name.rpartition(":")[2]
        seen[label] = seen.get(label, 0) + 1
        terms[k] = replace(term, label=label if seen[label] == 1 else f"{label}_{seen[label]}")
    check_members(combine, [term.label for term in terms], [term.weight for term in terms])
    return tuple(terms), combine


def make_reward(spec: RewardSpec, **options: Any) -> Reward:
    """Build the reward that `parse_spec(spec, **options)` describes.

    Several rewards, a weight, a transform or a way to combine give a CombinedReward.

    A file's or module's attribute is the reward itself if it is a function whose first argument is `images`; any other
    callable, such as a class, is called with the options and gives the reward.
    """
    terms, combine = _read_spec(spec, options)
    members = [Member(term.label, term.weight, _make_term(term), term.transform) for term in terms]
    if len(members) == 1 and members[0].weight == 1 and not members[0].transform and combine == Combine():
        return members[0].reward
    return CombinedReward(members, combine)


def spec_files(spec: RewardSpec) -> list[Path]:
    """The user's files that a spec is made of, by name: its YAML, Python files of rewards, texts that options name."""
    files = [Path(spec).expanduser()] if isinstance(spec, str) and spec.endswith((".yaml", ".yml")) else []
    for term in parse_spec(spec):
        where = term.name.rpartition(":")[0]
        files += [Path(where).expanduser()] if where.endswith(".py") else [] if not where else module_files(where)
        files += [Path(v).expanduser() for v in _texts(term.options) if v.endswith(TEXTS)]
    return [file for file in dict.fromkeys(files) if file.is_file()]


def _texts(value: Any) -> list[str]:
    if isinstance(value, (str, Path)):
        return [str(value)]
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, Sequence) else ()
    return [text for item in values for text in _texts(item)]


def _read_yaml(path: str) -> RewardSpec:
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"spec: got {path!r}, but there is no such file (looked from {Path.cwd()})")
    return read_yaml(file, "spec")


def _read_sum(text: str) -> list[Term]:
    terms = []
    for part in (part.strip() for part in text.split("+")):
        if part.startswith("remote:"):
            terms.append(_read_remote(part))
            continue
        head, colon, tail = part.rpartition(":")
        weight = _number(tail) if colon else None
        terms.append(Term(part) if weight is None else Term(head, _checked_weight(weight)))
    return terms


def _read_remote(text: str) -> Term:
    match = REMOTE.fullmatch(text)
    weight = _number(match["weight"] or "1") if match else None
    if match is None or weight is None:
        raise ValueError(f"spec: got {text!r}, expected 'remote:http://host:port' or 'remote:http://host:port:WEIGHT'")
    return Term("remote", _checked_weight(weight), {"url": match["url"]})


def _read_mapping(item: Mapping[str, Any]) -> Term:
    if not isinstance(item, Mapping) or not isinstance(item.get("name"), str):
        raise ValueError(f"spec: got {item!r}, expected a string or a mapping with 'name'")
    options = {key: value for key, value in item.items() if key not in ("name", "weight", "transform")}
    transform = read_transforms(item.get("transform", ()))
    return Term(item["name"], _checked_weight(item.get("weight", 1.0)), options, transform=transform)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _checked_weight(weight: Any) -> float:
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
        raise ValueError(f"weight: got {weight!r}, expected a finite number")
    return float(weight)


def _check_term(term: Term) -> None:
    location, colon, _ = term.name.rpartition(":")
    if not colon:
        if term.name.endswith(".py") or "/" in term.name:
            raise ValueError(f"spec: got {term.name!r}, expected 'path/to/file.py:attribute'")
        if term.name not in reward_names():
            raise unknown_name("spec", term.name, [*reward_names(), "module:attribute", "file.py:attribute"])
        factory = reward_factory(term.name)
        _check_options(term, factory)
        preflight = getattr(factory, "preflight", None)  # what can be said of the options without loading anything
        if preflight is not None:
            preflight(term.options)
        return
    if location in reward_names():
        raise ValueError(f"spec: got {term.name!r}, expected '{location}:WEIGHT' with a number")
    check_location("spec", term.name)


def _check_options(term: Term, factory: Callable) -> None:
    """Raise ValueError unless the factory takes these options and misses none."""
    signature = inspect.signature(factory)
    if not any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        for option in term.options:
            if option not in signature.parameters:
                raise unknown_name(f"option of reward {term.name!r}", option, signature.parameters)
    try:
        signature.bind(**term.options)
    except TypeError as error:
        raise ValueError(f"options of reward {term.name!r}: {error}; it takes {signature}") from error


def _make_term(term: Term) -> Reward:
    if ":" not in term.name:
        return as_reward(reward_factory(term.name)(**term.options), term.label)
    target = load_location("spec", term.name)
    if not callable(target):
        raise ValueError(f"spec: got {term.name!r}, which is a {type(target).__name__}, expected a function or a class")
    if not isinstance(target, type) and next(iter(inspect.signature(target).parameters), None) == "images":
        if term.options:
            raise ValueError(
                f"options of reward {term.name!r}: got {sorted(term.options)}, expected none for a function of images; "
                "a class or a function that returns the reward takes options"
            )
        return as_reward(target, term.label)
    required = [p.name for p in inspect.signature(target).parameters.values() if p.default is p.empty]
    if not isinstance(target, type) and required and not term.options:
        raise ValueError(
            f"spec: got {term.name!r} with arguments {inspect.signature(target)}; a reward's first argument is called "
            "'images', any other function is called with the options and returns the reward"
        )
    _check_options(term, target)
    return as_reward(target(**term.options), term.label)
