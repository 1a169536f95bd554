"""Configuration: one frozen dataclass a trainer, filled from a YAML file and the command line, strictly."""

import difflib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from visalign.files import load_text, read_yaml, write_whole
from visalign.training.run.checkpoint import checkpoints, find_checkpoint, load_state

T = TypeVar("T")


def parse_config(config_class: type[T], argv: Sequence[str] | None = None, *, prog: str, description: str) -> T:
    """Fill `config_class` from `--config file.yaml` and `--name value` options; later ones win.

    `--print_config` prints the resolved YAML and exits. A mistake ends the process with one line on stderr and exit
    status 2: an unknown key is answered with the nearest valid one, a value of the wrong type with the type wanted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with any of the options below")
    parser.add_class_arguments(config_class, as_group=False)
    names = [f.name for f in fields(config_class)]  # type: ignore[arg-type]
    try:
        argv = _with_files(_with_resumed(argv, names), names)
        _check_words(argv, config_class)
        values = parser.parse_args(argv).as_dict()
        values.pop("config", None)
        return config_class(**values)
    except (ArgumentError, ValueError, TypeError, OSError) as error:
        print(f"{prog}: {_one_line(str(error), names)}", file=sys.stderr)
        raise SystemExit(2) from None


def _with_resumed(argv: list[str], names: list[str]) -> list[str]:
    """`--resume RUN` alone means the options of that run, in that folder: its config.yaml, then the command line.

    Where that file is missing or damaged, the options that lie in the checkpoint hold.
    """
    for flag, value in zip(argv, [*argv[1:], ""]):
        if flag == "--resume" or flag.startswith("--resume="):
            path = Path(flag.partition("=")[2] or value)
            folder = path.parent.parent if path.name.startswith("step-") else path
            here = ["--run_dir", str(folder)] if "run_dir" in names else []  # it may have been moved since
            if _is_config(folder / "config.yaml"):
                return ["--config", str(folder / "config.yaml"), *here, *argv]
            if folder.is_dir() and checkpoints(folder / "checkpoints"):
                saved = load_state(find_checkpoint(path))["config"]
                kept = {name: given for name, given in saved.items() if name in names and name != "resume"}
                return ["--config", json.dumps(kept), *here, *argv]
    return argv


def _is_config(path: Path) -> bool:
    try:
        return isinstance(read_yaml(path, "config"), dict)
    except ValueError:
        return False


def _with_files(argv: list[str], names: list[str]) -> list[str]:
    """Each `--config FILE` with what the file says in its place, so that it is read strictly, and in one way."""
    done: list[str] = []
    flags = iter(argv)
    for flag in flags:
        if flag == "--config":
            done += ["--config", _content(next(flags, ""), names)]
        elif flag.startswith("--config="):
            done += ["--config", _content(flag.removeprefix("--config="), names)]
        else:
            done.append(flag)
    return done


def _check_words(argv: list[str], config_class: type) -> None:
    """Refuse words where no text is wanted, as YAML 1.2 tells them: the parser's own YAML takes 1:30 for 90."""
    kinds = {f.name: repr(f.type) if not isinstance(f.type, type) else f.type.__name__ for f in fields(config_class)}
    for flag, value in zip(argv, [*argv[1:], ""]):
        name, equals, text = flag.removeprefix("--").partition("=")
        given = {name: load_text(text if equals else value)} if flag.startswith("--") and name in kinds else {}
        given = json.loads(value) if flag == "--config" else given
        for key, read in given.items():
            kind = kinds[key]
            if (
                isinstance(read, str)
                and isinstance(load_text(read), str)
                and not any(word in kind for word in ("str", "Literal", "Path", "Any"))
            ):
                raise ValueError(f"{key}: got {read!r}, expected {kind.replace('None', 'null').replace(' | ', ' or ')}")


def _content(path: str, names: list[str]) -> str:
    """A YAML file's options, as JSON; unknown keys and other mistakes before the parser's own longer messages."""
    if path.startswith("{"):  # of a checkpoint, see `_with_resumed`
        return path
    if not Path(path).is_file():
        raise ValueError(f"config: got {path!r}, which is no file")
    content = read_yaml(Path(path), "config")
    if not isinstance(content, dict):
        held = "nothing" if content is None else f"a {type(content).__name__}"
        raise ValueError(f"config: got {path!r}, which holds {held}, expected lines of 'name: value'")
    for key in content:
        if key not in names:
            raise ValueError(f"{path}: unknown key {key!r}{_nearest(str(key), names)}")
    return json.dumps(content)


def _one_line(message: str, names: list[str]) -> str:
    message = re.sub(r"\s+", " ", message).strip()
    if unknown := re.search(r"[Uu]nrecognized arguments: (?:--)?([\w.-]+)", message):
        return f"unknown option --{unknown[1]}{_nearest(unknown[1], names)}; --help lists all"
    if wrong := re.match(r"Parser key [\"'](\w+)[\"']: (?:.* )?[Ee]xpected a (.+?)\. Got value: (.*)", message):
        wanted = re.sub(r"<class '(\w+)'>", r"\1", wrong[2]).replace("typing.", "")
        return f"{wrong[1]}: got {wrong[3]!r}, expected {wanted}"
    return message


def _nearest(key: str, names: list[str]) -> str:
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.4)
    return f"; did you mean {near[0]!r}?" if near else ""


def save_config(config: Any, path: Path) -> None:
    """Write the resolved configuration, loadable by `--config`."""
    write_whole(path, yaml.safe_dump(asdict(config), sort_keys=False))
