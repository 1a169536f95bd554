"""Files that are whole, or as they were before: written beside their place, then moved into it; and text as it is."""

import errno
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

MOST_NODES = 100_000  # of a YAML text
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of OSError: no room, no quota left, larger than a file may be


def write_whole(path: Path, content: str | bytes) -> None:
    """Put `content`, text as UTF-8, at `path`, which a kill at any moment leaves as it was or as it is to be."""

    def write(partial: Path) -> None:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)

    write_beside(path, write)


def write_beside(path: Path, write: Callable[[Path], object]) -> None:
    """As `write_whole`, of what `write` puts at the path it is given. What it wrote is gone where it fails."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
    try:
        write(partial)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def is_full(error: BaseException) -> bool:
    """Whether an error, of a library too, says that there was no room."""
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    return any(f"os error {code}" in str(error).lower() for code in FULL) or "no space left" in str(error).lower()


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text, as editors show them: they end with \\n or \\r\\n alone; without a byte order mark.

    `str.splitlines` would also cut at what stands within a prompt (U+2028, U+0085, vertical tabs).

    Raises:
        UnicodeDecodeError: it is no UTF-8.
    """
    text = path.read_bytes().decode("utf-8-sig")
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines[:-1] if lines[-1] == "" else lines


class StrictLoader(yaml.SafeLoader):
    """YAML 1.2's core: 010 is ten, 1:30, yes and 2026-12-01 are texts; a key that comes twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (str, int, float, bool, type(None))):
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key!r} stands twice", key_node.start_mark
                    )
                seen.add(key)
        return super().construct_mapping(node, deep)


StrictLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
):
    StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def _int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = node.value
    return int(text, 8) if text.startswith("0o") else int(text, 16) if text.startswith("0x") else int(text)


StrictLoader.add_constructor("tag:yaml.org,2002:int", _int)


def load_text(text: str) -> Any:
    """What the text of one option says, as it would in a YAML file."""
    return parse_yaml(text, "value")


def parse_yaml(text: str, where: str) -> Any:
    """What a YAML text says, by `StrictLoader`.

    Raises:
        ValueError: it is no YAML, says something twice, or is nested or repeated beyond reason; begins with `where`.
    """
    try:
        loader = StrictLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}) > MOST_NODES:
            raise ValueError(f"{where}: its anchors repeat it to more than {MOST_NODES:,} values")
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: is not YAML ({' '.join(str(error).split())})") from None
    except RecursionError:
        raise ValueError(f"{where}: is nested too deep, or holds itself") from None


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Values that a node holds, each as often as it is repeated."""
    if id(node) not in known:
        known[id(node)] = MOST_NODES + 1  # while it is counted: one that holds itself
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        known[id(node)] = 1 + (0 if isinstance(node, yaml.ScalarNode) else sum(_size(part, known) for part in parts))
    return known[id(node)]


def read_yaml(path: Path, argument: str) -> Any:
    """What a YAML file says; see `parse_yaml`.

    Raises:
        ValueError: there is no such file, or it is no text; names the argument.
    """
    try:
        return parse_yaml(path.read_text(encoding="utf-8-sig"), f"{argument}: {str(path)!r}")
    except OSError as error:
        raise ValueError(f"{argument}: got {str(path)!r}, which cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ValueError(f"{argument}: got {str(path)!r}, which is not UTF-8 text") from None
