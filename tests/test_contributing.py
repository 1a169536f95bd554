"""CONTRIBUTING.md: what it says to add is added as it says, and runs."""

import re
import shlex
from pathlib import Path

from visalign.commands import cli

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text()


def test_each_way_in_works_as_written(tmp_path, monkeypatch, options):
    """Its files, then its commands, on smaller runs."""
    monkeypatch.chdir(tmp_path)
    for code in re.findall(r"^```python\n(# (\w+\.py)\n.*?)^```", PAGE, re.M | re.S):
        Path(code[1]).write_text(code[0])
    commands = [line for block in re.findall(r"^```bash\n(.*?)^```", PAGE, re.M | re.S) for line in block.splitlines()]
    assert len(commands) == 4
    smaller = [f"--{k}={v}" for k, v in options.items() if k not in ("steps", "reward")]
    for number, line in enumerate(commands):
        _, command, *rest = shlex.split(line)
        if command == "train":
            reward = [] if "--reward" in rest else [f"--reward={options['reward']}"]
            cli.main([command, *rest, *smaller, *reward, "--run_dir", f"run-{number}"])
            assert Path(f"run-{number}", "report.html").exists()
        else:
            cli.main([command, *rest, "--steps", "2"])
            assert Path("pictures", "0000-best.png").exists()


def test_the_commands_it_names_are_those_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}: " in makefile for target in re.findall(r"^make (\w+)", PAGE, re.M))


def test_files_that_pages_name_are_there():
    rooms = "visalign|rewards|trainers|demos|tests|docs|benchmarks"
    for page in ("CONTRIBUTING.md", "docs/architecture.md", "docs/glossary.md", "docs/releasing.md", "README.md"):
        for name in set(re.findall(rf"`((?:{rooms})/[\w/.]+)`", (ROOT / page).read_text())):
            assert (ROOT / name).exists(), f"{page}: {name}"
    for name in set(re.findall(r"`([a-z]+/[\w/.]*)`", (ROOT / "docs/glossary.md").read_text())):
        assert any((top / name).exists() for top in (ROOT, ROOT / "visalign")), name
