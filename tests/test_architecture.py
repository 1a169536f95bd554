"""Who may import whom, as docs/architecture.md says; no circles, no overfull folders, a word at every door."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOPS = {
    "visalign": "visalign",
    "rewards": "visalign.rewards",
    "trainers": "visalign.trainers",
    "demos": "visalign.demos",
}
LEAVES = {"files", "images", "names", "lazy", "locations"}
MOST = 18  # modules in a folder


@cache
def modules() -> dict[str, Path]:
    """Files by the name of the module."""
    found = {}
    for top, package in TOPS.items():
        for path in (ROOT / top).rglob("*.py"):
            parts = path.relative_to(ROOT / top).with_suffix("").parts
            found[".".join([package, *(parts[:-1] if parts[-1] == "__init__" else parts)])] = path
    return found


def imports(module: str) -> set[str]:
    """All modules of the project that a module imports anywhere in it, also for types alone."""
    path, names = modules()[module], set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{source}.{a.name}" if f"{source}.{a.name}" in modules() else source for a in node.names}
    return {name for name in names if name in modules()} - {module}


@cache
def arrows() -> dict[str, set[str]]:
    return {module: imports(module) for module in modules()}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def table() -> dict[str, set[str]]:
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\|([^|]*)\|$", (ROOT / "docs/architecture.md").read_text(), re.M)
    return {name: {other.strip() for other in others.split(",") if other.strip()} for name, others in rows}


def test_the_table_has_every_room_and_no_other():
    folders = {p.name for p in (ROOT / "visalign").iterdir() if (p / "__init__.py").exists()}
    assert set(table()) == folders | {"rewards", "trainers", "demos"}
    assert all(others <= set(table()) for others in table().values())


@pytest.mark.parametrize("name", sorted(table()))
def test_a_room_imports_what_the_table_lets_it(name):
    allowed = table()[name] | {name} | LEAVES | {""}
    wrong = {
        f"{m} -> {other}" for m in modules() if room(m) == name for other in arrows()[m] if room(other) not in allowed
    }
    assert not wrong
    used = {room(other) for m in modules() if room(m) == name for other in arrows()[m]}
    assert table()[name] <= used | {"statistics"}, "the table lets it import what it does not"


def test_leaves_import_leaves_alone():
    assert all(room(other) in LEAVES for m in modules() if room(m) in LEAVES for other in arrows()[m])


def test_there_are_no_circles():
    done: dict[str, bool] = {}

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join([*trail[trail.index(module) :], module])
        if module not in done:
            for other in sorted(arrows()[module]):
                visit(other, (*trail, module))
            done[module] = True

    for module in sorted(modules()):
        visit(module, ())


def test_the_toy_worlds_are_reached_by_their_door_alone():
    toys = ("visalign.worlds.shapes", "visalign.worlds.digits")
    wrong = {
        f"{m} -> {other}"
        for m in modules()
        if room(m) != "worlds" and m != "visalign.commands.world"
        for other in arrows()[m]
        if other.startswith(toys)
    }
    assert not wrong


def test_no_folder_is_overfull():
    counts: dict[Path, int] = {}
    for path in [*modules().values(), *(ROOT / "tests").rglob("*.py")]:
        counts[path.parent] = counts.get(path.parent, 0) + 1
    assert {str(folder): count for folder, count in counts.items() if count > MOST} == {}


def test_every_room_says_what_lives_there():
    inits = [path for path in modules().values() if path.name == "__init__.py"]
    mute = [str(path) for path in inits if not ast.get_docstring(ast.parse(path.read_text()))]
    assert not mute


def test_what_is_installed_is_what_there_is():
    import tomllib

    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {name for name, path in modules().items() if path.name == "__init__.py"}
    assert set(tools["packages"]) == packages
