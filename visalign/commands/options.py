"""What options of several commands have in common."""

import argparse
import json


def check_count(arguments: argparse.Namespace) -> None:
    """Raise ValueError for a count below 1."""
    if arguments.count < 1:
        raise ValueError(f"count: got {arguments.count}, expected >= 1")


def read_option(text: str) -> tuple[str, object]:
    """NAME=VALUE; the value as JSON where it is that (numbers, true, null, lists), else as it stands."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f"option: got {text!r}, expected NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
