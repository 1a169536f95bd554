"""What can be said of a registered reward without loading its weights, for `visalign rewards list` and `show`."""

import inspect
import math
from dataclasses import dataclass
from typing import Any

from .base import KINDS, reward_factory, reward_names


@dataclass(frozen=True)
class Description:
    """A reward as its class states it; None or empty where it does not, e.g. because an option decides."""

    name: str
    kind: str | None
    differentiable: bool | None
    range: tuple[float, float] | None
    needs: tuple[str, ...]
    media: str
    checkpoints: tuple[str, ...]
    licence: str
    source: str
    options: dict[str, Any]  # by name: the default, or inspect.Parameter.empty where one must be given
    about: str  # first paragraph of the docstring, on one line


def describe(name: str) -> Description:
    """Read a reward's class attributes, signature and docstring; imports its module, loads no weights.

    Raises:
        ValueError: the name is not known, or the module that has it cannot be imported.
    """
    try:
        factory = reward_factory(name)
    except ImportError as error:
        raise ValueError(f"reward {name!r}: could not import it: {' '.join(str(error).split())}") from error

    def get(attribute: str, default: Any) -> Any:
        """A class attribute; a property, whose value only an instance knows, counts as not stated."""
        value = getattr(factory, attribute, default)
        return default if isinstance(value, property) else value

    parameters = inspect.signature(factory).parameters.values()
    return Description(
        name,
        get("kind", None),
        get("differentiable", None),
        get("range", None),
        tuple(get("needs", ())),
        get("media", "images"),
        tuple(get("checkpoints", ())),
        get("licence", ""),
        get("source", ""),
        {p.name: p.default for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)},
        " ".join((inspect.getdoc(factory) or "").split("\n\n")[0].split()),
    )


def table() -> list[str]:
    """Lines of `visalign rewards list`: every name; a reward that cannot be imported says so in its own line."""
    rows = [("name", "kind", "media", "gradient", "range", "needs")]
    for name in reward_names():
        try:
            d = describe(name)
        except ValueError as error:
            rows.append((name, f"({error})", "", "", "", ""))
            continue
        rows.append((name, d.kind or "?", d.media, _yes_no(d.differentiable), _interval(d), ", ".join(d.needs) or "-"))
    whole = [row for row in rows if row[2]]
    widths = [max(len(row[k]) for row in whole) for k in range(len(rows[0]))]
    widths[0] = max(len(row[0]) for row in rows)
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def card(name: str) -> list[str]:
    """Lines of `visalign rewards show NAME`."""
    d = describe(name)
    lines = [d.name, f"  {d.about or '(no description)'}", ""]
    facts = {
        "kind": d.kind if d.kind in KINDS else "not stated",
        "media": d.media,
        "gradient": _yes_no(d.differentiable),
        "range": _interval(d),
        "needs": ", ".join(d.needs) or "-",
        "checkpoints": ", ".join(d.checkpoints) or "-",
        "licence": d.licence or "not stated",
        "source": d.source or "not stated",
    }
    lines += [f"  {key:<12}{value}" for key, value in facts.items()]
    lines.append(f"  options     {'none' if not d.options else ''}".rstrip())
    for option, value in d.options.items():
        lines.append(
            f"    {option} = {value!r}" if value is not inspect.Parameter.empty else f"    {option} (required)"
        )
    return lines


def _yes_no(value: bool | None) -> str:
    return {True: "yes", False: "no", None: "by option"}[value]


def _interval(d: Description) -> str:
    if d.range is None:
        return "by option"
    low, high = d.range
    return f"{'(' if math.isinf(low) else '['}{low:g}, {high:g}{')' if math.isinf(high) else ']'}"
