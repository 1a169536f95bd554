"""A user's part of a reward (a detector, a text reader), given as a callable or by where it is found."""

from collections.abc import Callable
from typing import Any

from .spec import import_location


def load_callable(argument: str, spec: Any) -> Callable:
    """`spec` itself if callable; else what "module:attribute" or "path/to/file.py:attribute" names; a class is made.

    Raises:
        ValueError: nothing callable is found there; names the argument.
    """
    if isinstance(spec, str):
        location, colon, attribute = spec.rpartition(":")
        if not colon:
            raise ValueError(f"{argument}: got {spec!r}, expected 'module:attribute' or 'path/to/file.py:attribute'")
        try:
            spec = getattr(import_location(location), attribute)
        except Exception as error:  # a user's file may fail in any way
            raise ValueError(f"{argument}: could not import {spec!r}: {type(error).__name__}: {error}") from error
    if isinstance(spec, type):
        spec = spec()
    if not callable(spec):
        raise ValueError(f"{argument}: got {spec!r}, expected something callable")
    return spec
