"""Who takes part: a model, a LoRA of some strength on it, a search, each written as LABEL=MODEL,NAME=VALUE,..."""

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from visalign.names import unknown_name
from visalign.pipeline.calls import folder_defaults
from visalign.rewards import parse_spec
from visalign.search import METHODS, find_method
from visalign.training.policy import check_lora_fits
from visalign.transitions import make_transition
from visalign.worlds import resolve_model

EXPECTED = "expected LABEL=MODEL[,NAME=VALUE...], e.g. tuned=shapes-flow,lora=runs/NAME/lora"
TYPES = {
    **{"lora": str, "strength": float, "steps": int, "guidance": float, "transition": str},
    **{"search": str, "budget": int, "reward": str},
}
SEARCHING = ("budget", "reward")  # of a search only
_LABEL = re.compile(r"[A-Za-z0-9][\w.+-]{0,39}", re.ASCII)
_WHOLE = 64 * 2**20  # bytes: larger files are known by size and time of change
_FORMAT = 1  # of the pictures kept; another one draws all anew


@dataclass(frozen=True)
class Contestant:
    """What draws the pictures of one row of the table.

    Attributes:
        label: its name in the table: letters, digits and ._+-, at most 40.
        model: a shipped model, a folder or a hub id.
        lora: a LoRA folder or file; strength: of its change of the model, in [0, 1]; 0 is the model itself.
        steps, guidance: None: the model's own.
        transition: the step by name, "ode" for the plain ODE; None: the model's usual sampler, or the search's.
        search: one of `visalign.search.METHODS`; None: plain draws.
        budget: denoiser calls (NFE) a picture, of a search.
        reward: what the search is for.
        options: the search's own.
    """

    label: str
    model: str
    lora: str | None = None
    strength: float = 1.0
    steps: int | None = None
    guidance: float | None = None
    transition: str | None = None
    search: str | None = None
    budget: int | None = None
    reward: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """All that was said of it, without the label; what was left open is left out."""
        settings = {key: value for key, value in asdict(self).items() if key != "label" and value not in (None, {})}
        return settings if self.lora else {key: value for key, value in settings.items() if key != "strength"}

    @property
    def weights(self) -> tuple[Any, ...]:
        """Contestants that agree in this can be drawn with one loaded pipeline."""
        return self.model, self.lora, self.strength if self.lora else 1.0, self.steps, self.guidance


def parse_contestant(text: str, reward: str) -> Contestant:
    """A contestant of the command line. A comma separates only where NAME= follows, so values may hold others.

    Args:
        reward: what a search is for that does not say it.

    Raises:
        ValueError: names the contestant and what is wrong: no label, an unknown name, a value of another type.
    """
    head, *rest = re.split(r",(?=[A-Za-z_]\w*=)", text)
    label, _, model = head.partition("=")
    if not model or not _LABEL.fullmatch(label):
        raise ValueError(f"contestant: got {text!r}, {EXPECTED}")
    given: dict[str, Any] = {}
    options: dict[str, Any] = {}
    try:
        for name, _, value in (part.partition("=") for part in rest):
            if name in given or name in options:
                raise ValueError(f"{name}: got it twice, expected once")
            if name in TYPES:
                given[name] = _typed(name, value)
            else:
                options[name] = _value(value)
        if "search" in given:
            given.setdefault("reward", reward)
        contestant = Contestant(label, model, **given, options=options)
        _check_settings(contestant, given)
    except ValueError as error:
        raise ValueError(f"contestant {label!r}: {error}") from None
    return contestant


def _typed(name: str, text: str) -> Any:
    kind = TYPES[name]
    try:
        value = kind(text)
    except ValueError:
        raise ValueError(f"{name}: got {text!r}, expected a {'whole ' if kind is int else ''}number") from None
    if value == "" or (kind is float and not math.isfinite(value)):
        raise ValueError(f"{name}: got {text!r}, expected {'a value' if value == '' else 'a finite number'}")
    return value


def _value(text: str) -> Any:
    """As JSON where it is that (numbers, true, null, lists), else as it stands."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _check_settings(contestant: Contestant, given: dict[str, Any]) -> None:
    for name in ("steps", "budget"):
        if name in given and given[name] < 1:
            raise ValueError(f"{name}: got {given[name]}, expected >= 1")
    if not 0 <= contestant.strength <= 1:
        raise ValueError(f"strength: got {contestant.strength:g}, expected within [0, 1]")
    if "strength" in given and contestant.lora is None:
        raise ValueError(f"strength: got {contestant.strength:g} without lora=FOLDER, whose strength it would be")
    if contestant.search is None:
        for name in (name for name in SEARCHING if name in given):
            raise ValueError(f"{name}: got {given[name]!r} without search=METHOD, expected one of {sorted(METHODS)}")
        for name in contestant.options:
            raise unknown_name("name", name, TYPES)
        return
    method = find_method(contestant.search)
    if contestant.budget is None:
        raise ValueError("budget: got none with a search, expected denoiser calls a picture, e.g. budget=100")
    if "folder" in contestant.options:
        raise ValueError("folder: got one, expected none: one folder cannot hold the searches of all prompts")
    for name in contestant.options:
        if name not in method.options:
            raise unknown_name("name", name, [*TYPES, *method.options])
    method.check(contestant.search, contestant.options)


def check_contestant(contestant: Contestant) -> None:
    """Refuse what can be seen to fail without loading a model: the files, the step, the reward, the budget.

    Raises:
        ValueError: names the contestant.
    """
    try:
        model = resolve_model(contestant.model)
        defaults = folder_defaults(model)
        if contestant.lora is not None:
            check_lora_fits(Path(contestant.lora), Path(model))
        if contestant.transition not in (None, "ode"):
            make_transition(contestant.transition)
        if contestant.search is None:
            return
        assert contestant.reward is not None and contestant.budget is not None
        parse_spec(contestant.reward)
        method = find_method(contestant.search)
        if method.noisy and contestant.transition == "ode":
            raise ValueError(f"transition: got 'ode', expected one that draws noise, which {contestant.search!r} needs")
        steps = contestant.steps or defaults.get("num_steps", 10)
        least = method.least(steps, contestant.options)
        if contestant.budget < least:
            raise ValueError(
                f"budget: got {contestant.budget} denoiser calls, expected >= {least}, the smallest run of "
                f"{contestant.search!r} with {steps} steps a sample"
            )
    except ValueError as error:
        raise ValueError(f"contestant {contestant.label!r}: {error}") from None


def picture_key(contestant: Contestant, dtype: str, context: str) -> str:
    """A short name for all that decides a contestant's pictures; the label does not.

    Files go in by content, so that a LoRA trained anew is another one; a hub id only by name.

    Args:
        dtype: that the model computes in.
        context: the digest of what a search's reward is told beside the prompt.
    """
    identity = contestant.settings() | {"format": _FORMAT, "dtype": dtype}
    identity["model"] = path_digest(Path(resolve_model(contestant.model))) or contestant.model
    if contestant.lora is not None:
        identity["lora"] = path_digest(Path(contestant.lora))
    if contestant.reward is not None:
        identity["reward"] = reward_key(contestant.reward, context)
    return digest(json.dumps(identity, sort_keys=True).encode())


def reward_key(spec: str, context: str, **options: Any) -> str:
    """A short name for a reward: its words, the content of the files they name, its options, the prompts' context."""
    files = [Path(term.name.rpartition(":")[0]).expanduser() for term in parse_spec(spec, **options)]
    files += [Path(spec)] if spec.endswith((".yaml", ".yml")) else []
    identity = [spec, options, context, *(path_digest(file) for file in files if file.suffix)]
    return digest(json.dumps(identity, sort_keys=True).encode())


def digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def path_digest(path: Path) -> str:
    """Of a file or of all in a folder, names and contents; "" where there is nothing."""
    if not path.exists():
        return ""
    entries = []
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        size = file.stat().st_size
        what = digest(file.read_bytes()) if size <= _WHOLE else f"{size} {file.stat().st_mtime_ns}"
        entries.append(f"{file.relative_to(path) if path.is_dir() else file.name} {what}")
    return digest("\n".join(entries).encode())
