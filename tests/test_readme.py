"""Every command and code block of README and docs runs as written (with a smaller amount of work)."""

import importlib
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from visalign.commands import cli
from visalign.trainers import TRAINERS

ROOT = Path(__file__).parent.parent
SMALL = ["--steps", "1", "--prompts_per_step", "1", "--group_size", "2", "--num_steps", "4"]
SMALL += ["--eval_count", "2", "--eval_during", "2"]


def blocks(file: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / file).read_text(), re.M | re.S)


def commands() -> list[str]:
    lines = [line for block in blocks("README.md", "bash") for line in block.splitlines()]
    return [line.split("#")[0].strip() for line in lines if line.strip()]


def test_the_two_main_commands_are_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    mains = [c for c in commands() if c.startswith("make ")]
    assert mains == ["make train", "make test"]
    assert all(f"\n{c.split()[1]}: .venv/ready" in makefile for c in mains)


def test_visalign_commands_of_the_readme_run_in_their_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    lines = [c for c in commands() if c.startswith("visalign ")]
    assert len(lines) >= 6
    for line in lines:
        words = [str(ROOT / word) if word.startswith("trainers/") else word for word in shlex.split(line)[1:]]
        if words[0] == "serve":  # goes on for ever; tests/serving/test_serving.py has it
            continue
        if words[0] == "train":
            words += SMALL if "--resume" not in words else ["--steps", "2"]
            name = "runs/OTHER" if Path("runs/NAME").exists() else "runs/NAME"
            shutil.rmtree("runs/OTHER", ignore_errors=True)
            words += [] if "--resume" in words else ["--run_dir", name]
        if words[0] == "doctor":
            words += SMALL
        if words[0] == "generate":
            words += ["--steps", "2"]
        if words[0] == "eval":
            words += ["--prompts", "1"]
        if words[0] == "score":
            shutil.copy(next(Path("pictures").glob("*.png")), "picture.png")
        try:
            cli.main(words)
        except SystemExit as stop:
            assert stop.code == 0, (line, capsys.readouterr().err)
    assert (tmp_path / "runs/NAME/report.html").is_file()
    assert (tmp_path / "runs/NAME/checkpoints/step-2").is_dir()


def test_python_blocks_of_the_readme_run():
    found = blocks("README.md", "python")
    assert len(found) == 2
    for block in found:
        exec(compile(block, "README.md", "exec"), {})


# Those of other trainers name theirs, and stand in its tests.
RECIPES = [p for p in sorted((ROOT / "trainers/recipes").glob("*.yaml")) if "trainers/" not in p.read_text()]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_recipes_resolve_to_a_configuration(recipe):
    from visalign.training.before.config import parse_config

    [trainer] = set(re.findall(r"trainers/(\w+)\.py", recipe.read_text())) or {"flow_grpo"}
    config = importlib.import_module(f"visalign.trainers.{trainer}").Config
    cfg = parse_config(config, ["--config", str(recipe)], prog=trainer, description="")
    assert cfg.model.count("/") == 1
    assert trainer != "flow_grpo" or cfg.make_window()(0)


GUIDES = sorted((ROOT / "docs/methods").glob("*.md"))


@pytest.mark.parametrize("guide", GUIDES, ids=lambda p: p.stem)
def test_commands_of_the_guides_to_methods_resolve_to_a_configuration(guide, tmp_path, monkeypatch):
    """Those that start a training; what resuming does is tested with every trainer."""
    from visalign.training.before.config import parse_config

    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "trainers" / "recipes", tmp_path / "trainers" / "recipes")
    Path("my_reward.py").write_text("def score(images, prompts):\n    return images.mean(dim=(1, 2, 3))\n")
    Path("prompts.txt").write_text("a dog\na cat\n")
    lines = [line.split("#")[0] for line in guide.read_text().splitlines()]
    found = [line for line in lines if line.startswith(("accelerate launch ", "visalign train "))]
    assert found and "--config" in "".join(found)
    for line in found:
        _, _, script, *options = shlex.split(line)
        trainer = Path(script).stem
        assert trainer == guide.stem and trainer in TRAINERS
        if "--resume" not in options:
            parse_config(
                importlib.import_module(f"visalign.trainers.{trainer}").Config, options, prog="x", description=""
            )


def test_commands_and_code_of_the_search_page_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = [line for block in blocks("docs/search.md", "bash") for line in block.splitlines() if line]
    assert len(lines) >= 3
    for line in lines:
        cli.main([*shlex.split(line)[1:], "--steps", "2"])
    found = {path.name for path in Path("pictures").iterdir()}
    assert {"0000-best.png", "search.json", "search.png", "0000-tree.png"} <= found
    [code] = blocks("docs/search.md", "python")
    exec(compile(code.replace("budget=500", "budget=20"), "docs/search.md", "exec"), {})


def test_the_readme_names_every_trainer_and_the_guides_are_of_trainers():
    readme = (ROOT / "README.md").read_text()
    assert all(f"`{name}.py`" in readme for name in TRAINERS)
    assert {guide.stem for guide in GUIDES} <= set(TRAINERS)


def test_the_search_page_names_every_search():
    from visalign.search import METHODS

    page = (ROOT / "docs/search.md").read_text()
    assert all(f"`{name}`" in page for name in METHODS)
