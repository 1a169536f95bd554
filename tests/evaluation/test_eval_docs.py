"""The commands and the code of docs/eval.md run as written, with less work."""

import json
import re
import shlex
from pathlib import Path

import torch

from visalign.commands import cli
from visalign.evaluation.contestants import TYPES
from visalign.pipeline.generator import Generator
from visalign.training.policy import Policy
from visalign.worlds import resolve_model

PAGE = (Path(__file__).parents[2] / "docs/eval.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.M | re.S)


def test_commands_and_code_of_the_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    policy = Policy(Generator.from_pretrained(resolve_model("shapes-flow"), num_steps=2), 2, 2)
    policy.export(Path("runs/NAME/lora"), {k: torch.full_like(v, 0.01) for k, v in policy.tensors().items()})
    lines = [line for block in blocks("bash") for line in block.splitlines() if line]
    assert len(lines) == 3
    for line in lines:
        words = shlex.split(re.sub(r"=shapes-flow", "=shapes-flow,steps=2", line).replace("budget=100", "budget=8"))
        cli.main([*words[1:], "--prompts", "1", "--seeds", "1"])
        out = Path(words[words.index("--out") + 1])
        told = json.loads((out / "eval.json").read_text())
        assert len(told["pictures"]) == len(told["contestants"]) == line.count("--contestant")
        assert (out / "report.html").is_file()
    [code] = blocks("python")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    exec(compile(code.replace("budget=20", "budget=10").replace('"3"', '"1"'), "docs/eval.md", "exec"), {})


def test_the_page_names_every_setting_and_option():
    parser = cli._parser()._subparsers._group_actions[0].choices["eval"]
    left_out = {"-h", "--help", "--batch-size", "--device", "--out"}
    for option in parser._option_string_actions:
        assert option in left_out or f"`{option}" in PAGE or f", `{option}`" in PAGE, option
    assert all(f"{name}=" in PAGE or f"`{name}" in PAGE for name in TYPES)
