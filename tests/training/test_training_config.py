"""Options come from YAML and the command line, strictly; and each is used."""

import ast
import importlib
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import pytest

from visalign.trainers import flow_grpo
from visalign.trainers.flow_grpo import Config
from visalign.training.before import doctor, options, preflight
from visalign.training.before.config import parse_config, save_config
from visalign.training.loop import setup
from visalign.training.loop import training_loop as loop
from visalign.training.run import outcome


@dataclass(frozen=True)
class Small:
    learning_rate: float = 1e-3
    steps: int = 4
    kind: Literal["one", "two"] = "one"
    span: tuple[int, int] | None = None
    names: list[str] | None = None
    on: bool = False
    run_dir: str | None = None
    resume: str | None = None


def read(*argv, config_class=Small):
    return parse_config(config_class, [str(a) for a in argv], prog="train", description="x")


@pytest.fixture
def yaml_file(tmp_path):
    def write(text):
        (tmp_path / "c.yaml").write_text(text)
        return tmp_path / "c.yaml"

    return write


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(yaml_file):
    cfg = read("--config", yaml_file("steps: 7\nlearning_rate: 0.5\nspan: [1, 3]"), "--steps", 9)
    assert cfg == Small(steps=9, learning_rate=0.5, span=(1, 3))


@pytest.mark.parametrize("text", ["3e-4", '"3e-4"', "0.0003", "3.0e-4"])
def test_a_number_in_exponent_form_is_a_float_however_yaml_reads_it(yaml_file, text):
    rate = read("--config", yaml_file(f"learning_rate: {text}")).learning_rate
    assert isinstance(rate, float) and rate == 3e-4
    assert read("--learning_rate", "3e-4").learning_rate == 3e-4


MISTAKES = [
    (["--stepz", "3"], "unknown option --stepz; did you mean 'steps'?"),
    (["--learning-rte=3"], "did you mean 'learning_rate'?"),
    (["--learn", "3"], "unknown option --learn"),  # no abbreviations
    (["stray"], "unknown option --stray"),
    (["--steps", "many"], "steps: got 'many', expected int"),
    (["--steps", "2.5"], "steps: got '2.5', expected int"),
    (["--on", "perhaps"], "on: got 'perhaps', expected bool"),
    (["--kind", "three"], "kind: got 'three', expected Literal['one', 'two']"),
    (["--steps"], "--steps"),
    (["--config", "none.yaml"], "config: got 'none.yaml', which is no file"),
]


def refused(capsys, *argv, **options):
    with pytest.raises(SystemExit) as caught:
        read(*argv, **options)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("train: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize("argv, message", MISTAKES)
def test_mistakes_are_one_line_that_names_the_option(capsys, argv, message):
    assert message in refused(capsys, *argv)


@pytest.mark.parametrize(
    "text, message",
    [
        ("stpes: 3", "unknown key 'stpes'; did you mean 'steps'?"),
        ("steps: many", "steps: got 'many', expected int"),
        ("steps: 2.5", "steps: got '2.5', expected int"),
        ("names: [a", "not YAML"),
        ("- 1", "holds a list"),
        ("", "holds nothing"),
    ],
)
def test_mistakes_in_files_are_one_line(capsys, yaml_file, text, message):
    assert message in refused(capsys, "--config", yaml_file(text))


def test_what_is_printed_and_what_is_saved_read_back_as_the_same(capsys, tmp_path):
    argv = ["--learning_rate", "3e-5", "--window", "random", "--window_size", "2", "--window_span", "[0, 3]"]
    cfg = read(*argv, config_class=Config)
    with pytest.raises(SystemExit) as caught:
        read(*argv, "--print_config", config_class=Config)
    assert caught.value.code in (0, None)
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    save_config(cfg, tmp_path / "saved.yaml")
    for name in ("printed", "saved"):
        assert read("--config", tmp_path / f"{name}.yaml", config_class=Config) == cfg


def test_resume_alone_takes_the_options_of_the_run_and_stays_in_its_folder(tmp_path, monkeypatch):
    run, step = tmp_path / "moved", tmp_path / "moved" / "checkpoints" / "step-3"
    step.mkdir(parents=True)
    save_config(Small(steps=8, run_dir="where/it/was"), run / "config.yaml")
    for path in (run, step):
        cfg = read("--resume", path, "--learning_rate", "0.1")
        assert cfg == Small(steps=8, learning_rate=0.1, run_dir=str(run), resume=str(path))
        assert read(f"--resume={path}", "--run_dir", "other").run_dir == "other"
    save_config(Small(steps=99), tmp_path / "config.yaml")  # a bystander
    monkeypatch.chdir(tmp_path)
    assert read("--resume", "nothing").steps == 4


RECIPES = sorted((Path(flow_grpo.__file__).parent / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_recipes_are_valid(recipe):
    """A recipe of another trainer than flow_grpo says so in its text: trainers/NAME.py."""
    named = re.search(r"trainers/(\w+)\.py", recipe.read_text())
    trainer = importlib.import_module(f"visalign.trainers.{named[1] if named else 'flow_grpo'}")
    cfg = read("--config", recipe, config_class=trainer.Config)
    assert asdict(cfg) != asdict(trainer.Config(model=cfg.model))


def test_every_option_is_read_by_the_trainer():
    used = set()
    for module in (flow_grpo, loop, options, preflight, setup, outcome, doctor):
        tree = ast.parse(Path(module.__file__).read_text())
        checks = [
            n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name in ("__post_init__", "_check_window")
        ]
        skipped = {id(inner) for check in checks for inner in ast.walk(check)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, (ast.Name, ast.Attribute)):
                owner = node.value.id if isinstance(node.value, ast.Name) else node.value.attr
                if owner == "cfg" or owner == "self" and id(node) not in skipped:
                    used.add(node.attr)
            if isinstance(node, ast.FunctionDef) and node.name == "build":  # names given to getattr
                used |= {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    assert {f.name for f in fields(Config)} - used == set()
