"""Errors for misspelt names, and building a dataclass from named options without swallowing any of them."""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

MOST_NAMES = 20  # in one error


def unknown_name(argument: str, got: str, valid: Iterable[str]) -> ValueError:
    """The error to raise when `got` is not one of `valid`: it names the nearest, and all of them if they are few."""
    names = sorted(valid)
    close = difflib.get_close_matches(got, names, n=6, cutoff=0.5)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    listed = names if len(names) <= MOST_NAMES else sorted(close or names[:6])
    more = f" or {len(names) - len(listed)} more" if len(listed) < len(names) else ""
    return ValueError(f"{argument}: got {got!r}, expected one of {listed}{more}{hint}")


def build(name: str, makers: Mapping[str, type], argument: str, **options: Any) -> Any:
    """Make the dataclass registered as `name`, with `options` as its fields.

    Raises:
        ValueError: an unknown name, or an option that this dataclass does not have; both name the nearest valid one.
    """
    if name not in makers:
        raise unknown_name(argument, name, makers)
    fields = [field.name for field in dataclasses.fields(makers[name]) if field.init]
    for option in options:
        if option not in fields:
            raise unknown_name(f"option of {name!r}", option, fields)
    return makers[name](**options)
