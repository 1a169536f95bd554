"""Reading what language models write: JSON in prose, numbers after labels, digits among tokens. No model code.

Every reader returns a value or raises `Unreadable` with a reason in a few words; none guesses a number.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .chat import Token

NUMBER = r"[-+]?\d+(?:\.\d+)?"
MAX_DEPTH = 20  # of nested brackets
MAX_STARTS = 50  # places in a text at which JSON is looked for, the last ones first

_SCALAR = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|\w+")
_KEY = re.compile(r"[A-Za-z_][\w -]*?(?=\s*:)")
_WORDS = {"true": True, "false": False, "null": None, "none": None}


class Unreadable(ValueError):
    """An answer that does not hold what was asked for."""


def read_json(text: str, keys: Sequence[str] = ()) -> dict[str, Any]:
    """The last JSON object in `text` that has all `keys`, whatever stands around it.

    Also read: single quotes, bare keys, trailing commas, Python's True, False and None, quotes and line breaks inside
    strings. Not read: an object cut off in the middle, as the number it breaks off in may have had more digits.

    Raises:
        Unreadable: there is none.
    """
    latest, end = None, 0
    starts = [match.start() for match in re.finditer(r"\{", text)]
    for start in starts[-MAX_STARTS:]:
        if start < end:
            continue  # inside an object already read
        try:
            value, end_of_value = _read_object(text, start)
        except (Unreadable, RecursionError):
            continue
        if all(key in value for key in keys):
            latest, end = value, end_of_value
    if latest is None:
        raise Unreadable(f"no JSON object with {list(keys)} in it" if keys else "no JSON object in it")
    return latest


def as_numbers(value: Any, count: int, low: float, high: float, name: str = "score") -> list[float]:
    """`value` as `count` numbers within [low, high]; numbers may be written as strings ("20", "20/25").

    Raises:
        Unreadable: another type or count, no number, or out of range.
    """
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    if len(items) != count:
        raise Unreadable(f"{name}: got {len(items)} numbers, expected {count}")
    numbers = [_as_number(item, name) for item in items]
    for number in numbers:
        if not low <= number <= high:
            raise Unreadable(f"{name}: got {number:g}, expected within [{low:g}, {high:g}]")
    return numbers


def labelled_number(text: str, label: str, low: float, high: float) -> float:
    """The number after the last "label:" in `text` that a number follows; letters' case does not matter.

    Raises:
        Unreadable: there is none, or it is out of range.
    """
    matches = list(re.finditer(rf"{re.escape(label)}\s*:\s*\**\s*({NUMBER})(?!\w)", text, re.IGNORECASE))
    if not matches:
        raise Unreadable(f"no number after {label!r}")
    return as_numbers(float(matches[-1][1]), 1, low, high, label)[0]


def leading_number(text: str) -> float | None:
    """The number that `text` begins with ("3.5 (good)" is 3.5); None for "N/A".

    Raises:
        Unreadable: it begins with something else.
    """
    text = text.strip(" \t*[]()`_")
    if re.match(r"n/?a\b", text, re.IGNORECASE):
        return None
    match = re.match(r"\d+(?:\.\d+)?", text)
    if match is None:
        raise Unreadable(f"no number in {text[:30]!r}")
    return float(match[0])


def token_after_label(tokens: Sequence[Token], label: str) -> tuple[int, int]:
    """Which token holds the digit after the last "label:" that a digit follows, and that digit.

    Found by offsets in the tokens' joined texts, so digits elsewhere in the answer are not taken for it.

    Raises:
        Unreadable: no such digit, or no tokens at all.
    """
    if not tokens:
        raise Unreadable("no tokens with log-probabilities came with the answer")
    text = "".join(token.text for token in tokens)
    matches = list(re.finditer(rf"{re.escape(label)}\s*:\s*\**\s*(\d)(?!\d|\.\d)", text, re.IGNORECASE))
    if not matches:
        raise Unreadable(f"no single digit after {label!r}")
    place, offset = matches[-1].start(1), 0
    for index, token in enumerate(tokens):
        offset += len(token.text)
        if place < offset:
            return index, int(matches[-1][1])
    raise AssertionError("a place in the joined text lies in one of the tokens")


def digit_probabilities(token: Token, digits: Sequence[int]) -> list[float]:
    """Probabilities of the digits at a token's place, spellings with spaces added up, scaled to sum to 1.

    A digit that is not among the likeliest tokens counts as 0.

    Raises:
        Unreadable: none of the digits is among them.
    """
    log_probs = {**token.top, token.text: token.log_prob}
    mass: Mapping[int, float] = {
        digit: math.fsum(math.exp(lp) for text, lp in log_probs.items() if text.strip() == str(digit))
        for digit in digits
    }
    total = math.fsum(mass.values())
    if not (math.isfinite(total) and total > 0):
        raise Unreadable(f"none of {list(digits)} among the likeliest tokens")
    return [mass[digit] / total for digit in digits]


def _as_number(item: Any, name: str) -> float:
    if isinstance(item, str) and re.fullmatch(rf"\s*{NUMBER}\s*(/\s*\d+\s*)?", item):
        item = float(item.split("/")[0])
    if isinstance(item, bool) or not isinstance(item, (int, float)) or not math.isfinite(item):
        raise Unreadable(f"{name}: got {item!r}, expected a number")
    return float(item)


def _read_object(text: str, start: int) -> tuple[dict[str, Any], int]:
    try:
        return json.JSONDecoder(parse_constant=_no_constant).raw_decode(text, start)
    except (ValueError, RecursionError):  # Unreadable is a ValueError too
        return _lenient_value(text, start, 0)


def _no_constant(name: str) -> Any:
    raise Unreadable(f"{name} is no number")


def _lenient_value(text: str, at: int, depth: int) -> tuple[Any, int]:
    """A value of almost-JSON at `at`, and where it ends."""
    if depth > MAX_DEPTH:
        raise Unreadable("nested too deep")
    at = _skip(text, at)
    if text[at : at + 1] in ("{", "["):
        return _lenient_container(text, at, depth)
    if text[at : at + 1] in ('"', "'"):
        return _lenient_string(text, at, ",]}")
    match = _SCALAR.match(text, at)
    if match is None:
        raise Unreadable(f"no value at {text[at : at + 20]!r}")
    word = match[0]
    if word.lower() in _WORDS:
        return _WORDS[word.lower()], match.end()
    try:
        return float(word), match.end()
    except ValueError as error:
        raise Unreadable(f"no value at {word!r}") from error


def _lenient_container(text: str, at: int, depth: int) -> tuple[Any, int]:
    closing = "}" if text[at] == "{" else "]"
    items: dict[str, Any] | list[Any] = {} if closing == "}" else []
    at = _skip(text, at + 1)
    while text[at : at + 1] != closing:
        key = ""
        if isinstance(items, dict):
            key, at = _lenient_key(text, at)
        value, at = _lenient_value(text, at, depth + 1)
        if isinstance(items, dict):
            items[key] = value
        else:
            items.append(value)
        at = _skip(text, at)
        if text[at : at + 1] == ",":
            at = _skip(text, at + 1)
        elif text[at : at + 1] != closing:
            raise Unreadable(f"expected ',' or {closing!r} at {text[at : at + 20]!r}")
    return items, at + 1


def _lenient_key(text: str, at: int) -> tuple[str, int]:
    if text[at : at + 1] in ('"', "'"):
        key, at = _lenient_string(text, at, ":")
    else:
        match = _KEY.match(text, at)
        if match is None:
            raise Unreadable(f"no key at {text[at : at + 20]!r}")
        key, at = match[0].strip(), match.end()
    at = _skip(text, at)
    if text[at : at + 1] != ":":
        raise Unreadable(f"expected ':' at {text[at : at + 20]!r}")
    return key, at + 1


def _lenient_string(text: str, at: int, followers: str) -> tuple[str, int]:
    """A quoted string: the first quote of its kind ends it after which one of `followers` comes."""
    for place in _places(text, text[at], at + 1):
        after = _skip(text, place + 1)
        if text[place - 1] != "\\" and text[after : after + 1] in tuple(followers):
            return text[at + 1 : place], place + 1
    raise Unreadable("a string without an end")


def _places(text: str, character: str, start: int) -> Iterator[int]:
    while (start := text.find(character, start)) >= 0:
        yield start
        start += 1


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at
