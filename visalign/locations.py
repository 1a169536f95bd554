"""What users add by where it is: an attribute of a module or of a file, "module:attribute" or "path/to/file.py:name".

Rewards, transitions, advantages, searches and trainers all come through here, checked before anything is run.
"""

import ast
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from visalign.names import unknown_name


def check_location(argument: str, location: str) -> None:
    """Refuse a location that is not there, as far as that can be told without running it.

    Raises:
        ValueError: no such file or module, not Python, or no such attribute (names the nearest).
    """
    where, _, attribute = location.rpartition(":")
    if not where:
        raise ValueError(f"{argument}: got {location!r}, expected 'module:attribute' or 'path/to/file.py:attribute'")
    names = (
        _names_in_file(argument, Path(where), location)
        if where.endswith(".py")
        else _names_in_module(argument, where, location)
    )
    if names is not None and attribute not in names:
        raise unknown_name(f"attribute of {where!r}", attribute, (n for n in names if not n.startswith("_")))


def load_location(argument: str, location: str) -> Any:
    """What stands at a location; a file is imported once a process, under a name of its own.

    Raises:
        ValueError: as `check_location`, or importing it failed; names the argument.
    """
    where, _, attribute = location.rpartition(":")
    if not where:
        raise ValueError(f"{argument}: got {location!r}, expected 'module:attribute' or 'path/to/file.py:attribute'")
    try:
        module = _import_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
        return getattr(module, attribute)
    except Exception as error:  # a user's file may fail in any way
        raise ValueError(f"{argument}: could not import {location!r}: {type(error).__name__}: {error}") from error


def load_callable(argument: str, given: Any) -> Callable:
    """`given` itself if callable, else what stands at that location; a class is made.

    Raises:
        ValueError: nothing callable is found there; names the argument.
    """
    value = load_location(argument, given) if isinstance(given, str) else given
    value = value() if isinstance(value, type) else value
    if not callable(value):
        raise ValueError(f"{argument}: got {given!r}, expected something callable")
    return value


def module_files(module: str) -> list[Path]:
    """The file of a module that is no installed package's: a user's own."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return []
    file = Path((spec.origin if spec is not None else None) or "")
    return [file] if file.suffix == ".py" and not {"site-packages", "dist-packages"} & set(file.parts) else []


def _names_in_file(argument: str, path: Path, location: str) -> set[str] | None:
    """Names that a Python file defines at its top level, read without running it; None where that cannot be told."""
    if not path.expanduser().is_file():
        raise ValueError(f"{argument}: got {location!r}, but there is no file {str(path)!r} (looked from {Path.cwd()})")
    try:
        tree = ast.parse(path.expanduser().read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise ValueError(f"{argument}: got {location!r}, but {str(path)!r} is not valid Python: {error}") from error
    names: set[str] = set()
    todo: list[ast.AST] = list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names.update((alias.asname or alias.name).partition(".")[0] for alias in node.names)
        else:
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            todo.extend(ast.iter_child_nodes(node))
    return None if names & {"*", "__getattr__"} else names


def _names_in_module(argument: str, module: str, location: str) -> set[str] | None:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise ValueError(
            f"{argument}: got {location!r}, but there is no module {module!r} to import; put its folder on PYTHONPATH, "
            "or name the file: 'path/to/file.py:attribute'"
        )
    origin = spec.origin or ""
    return _names_in_file(argument, Path(origin), location) if origin.endswith(".py") else None


def _import_file(path: Path) -> ModuleType:
    """Import a file once per process, under a name of its own, without touching sys.path."""
    path = path.expanduser().resolve()
    name = f"visalign_user_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # a path ending in .py always has a loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
