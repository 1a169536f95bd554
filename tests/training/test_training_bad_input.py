"""Mistakes end with one line and exit status 2 before a model loads, and leave nothing behind."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from visalign.pipeline.generator import Generator
from visalign.trainers import flow_grpo
from visalign.trainers.flow_grpo import Config
from visalign.training.before import preflight
from visalign.training.before.config import parse_config
from visalign.training.run.checkpoint import save_checkpoint
from visalign.worlds import MODELS


@pytest.fixture
def cli(options, tmp_path, monkeypatch, capsys):
    """Run the trainer's command line with changed options where it must fail before loading; returns the line."""
    monkeypatch.setattr(Generator, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    work = tmp_path / "work"
    work.mkdir()

    def run(*argv, **changes):
        before = sorted(str(p) for p in tmp_path.rglob("*"))
        monkeypatch.chdir(work)
        given = {**options, **changes}
        with pytest.raises(SystemExit) as caught:
            flow_grpo.cli([*(f"--{k}={v}" for k, v in given.items() if v is not None), *argv])
        assert caught.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("flow_grpo: ") and error.count("\n") == 1, error
        assert "Traceback" not in error and len(error) < 600
        assert sorted(str(p) for p in tmp_path.rglob("*")) == before, "something was written"
        return error

    return run


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(model="./none"), f"model: got './none', expected one of {sorted(MODELS)}"),
        (dict(model="/none/model"), "model: got '/none/model'"),
        (dict(model="shapes-flo"), f"model: got 'shapes-flo', expected one of {sorted(MODELS)}"),
        (dict(reward="clipp"), "got 'clipp', expected one of"),
        (dict(reward="clipp"), "did you mean 'clip'?"),
        (dict(reward="none.py:score"), "there is no file 'none.py'"),
        (dict(reward="gold:nan"), "weight: got nan"),
        (dict(judges="golden"), "did you mean 'gold'?"),
        (dict(prompts="none.txt"), "prompts: got 'none.txt', which does not exist"),
        (dict(group_size=1), "group_size: got 1, expected >= 2"),
        (dict(prompts_per_step=3, updates_per_step=2), "prompts_per_step: got 3, expected a multiple of"),
        (dict(eta=0), "eta: got 0"),
        (dict(steps=0), "steps: got 0, expected > 0"),
        (dict(ema_decay=1.0), "ema_decay: got 1.0, expected within [0, 1)"),
        (dict(learning_rate="fast"), "learning_rate: got 'fast', expected float"),
        (dict(sampler="flow_sdee"), "sampler: got 'flow_sdee', expected one of"),
        (dict(sampler="cps", eta=2), "eta: got 2"),
        (dict(attention="fast"), "attention: got 'fast', expected one of"),
        (dict(group_sizes=4), "unknown option --group_sizes; did you mean 'group_size'?"),
        (dict(window="random"), "size: got None"),
        (dict(window_size=2), "size: got 2, expected None for 'all'"),
        (dict(window="random", window_size=9), "size: got 9, expected at most 3"),
        (dict(window="random", window_size=2, window_iterations=3), "option of 'random': got 'iterations'"),
        (dict(timestep_fraction=1.5), "timestep_fraction: got 1.5"),
        (dict(timestep_fraction=0.2), "timestep_fraction: got 0.2 of 4 steps"),
        (dict(post_ratio=0.4), "post_ratio: got 0.4 with window 'all'"),
        (dict(solver="dpm2m"), "solver: got 'dpm2m' with window 'all'"),
        (dict(lora="none", lora_rank=0), "lora: got 'none' with lora_rank 0"),
        (dict(lora="none"), "lora: got 'none', which holds no .safetensors file"),
        (dict(resume="none"), "resume: got 'none', which holds no checkpoint"),
        (dict(height=-1), "height: got -1, expected within 8 .. 16384"),
        (dict(width=0), "width: got 0, expected within 8 .. 16384"),
        (dict(height=10**20), f"height: got {10**20}, expected at most 1,000,000,000"),
        (dict(lora_alpha=".inf"), "lora_alpha: got inf, expected a finite number"),
        (dict(lora_alpha=0), "lora_alpha: got 0"),
        (dict(lora_rank=10**20), f"lora_rank: got {10**20}, expected at most"),
        (dict(lora_rank=9000), "lora_rank: got 9000, expected 0 .. 8192"),
        (dict(guidance_scale=".nan"), "guidance_scale: got nan, expected a finite number"),
        (dict(guidance_scale=-1), "guidance_scale: got -1"),
        (dict(kl_weight=".nan"), "kl_weight: got nan, expected a finite number"),
        (dict(learning_rate=".inf"), "learning_rate: got inf, expected a finite number"),
        (dict(eval_count=10**20), f"eval_count: got {10**20}, expected at most"),
        (dict(kl_weight="nan"), "kl_weight: got 'nan', expected float"),
        (dict(lora_alpha="inf"), "lora_alpha: got 'inf', expected float or null"),
        (dict(steps="1:30"), "steps: got '1:30', expected int"),
        (dict(seed=10**20), f"seed: got {10**20}, expected a number of 64 bits"),
        (dict(run_dir="/proc/none/run"), "run_dir: got '/proc/none/run', which cannot be written"),
    ],
)
def test_wrong_values(cli, changes, message):
    assert message in cli(**changes)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("steps: 3\nsteps: 4", "the key 'steps' stands twice"),
        ("steps: 1:30", "steps: got '1:30', expected"),
        ("steps: " + "[" * 3000, "is nested too deep"),
        ("reward: clip\nreward: clip\n", "stands twice"),
    ],
)
def test_a_config_file_that_says_something_twice_or_otherwise_than_it_seems(cli, tmp_path, text, says):
    (tmp_path / "odd.yaml").write_text(text)
    assert says in cli(config=str(tmp_path / "odd.yaml"))


def test_numbers_of_a_config_file_are_those_of_yaml_1_2(tmp_path):
    (tmp_path / "a.yaml").write_text("steps: 010\nlearning_rate: 3e-4\nreward: no\n")
    argv = ["--config", str(tmp_path / "a.yaml"), "--seed", "3"]
    cfg = parse_config(Config, argv, prog="flow_grpo", description="")
    assert (cfg.steps, cfg.learning_rate, cfg.reward, cfg.seed) == (10, 3e-4, "no", 3)


def test_unusable_prompt_files(cli, tmp_path, world_files):
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    (tmp_path / "one.txt").write_text("a red circle\n")
    for name, message in {
        "empty.txt": "which holds no prompt",
        "work": "a folder, expected a text file",
        "one.txt": "got 1 prompt",
    }.items():
        eval_prompts = None
        assert message in cli(prompts=str(tmp_path / name), eval_prompts=eval_prompts)
        if name != "one.txt":
            assert message in cli(eval_prompts=str(tmp_path / name))


def test_a_folder_that_is_no_model(cli, tmp_path):
    assert "a folder without model_index.json" in cli(model=str(tmp_path))


def test_a_run_folder_that_cannot_be_written(cli, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert "a file, expected a folder" in cli(run_dir=str(tmp_path / "file"))
    assert "which cannot be written (Not a directory)" in cli(run_dir=str(tmp_path / "file" / "run"))

    def read_only(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "touch", read_only)
    assert "which cannot be written (Permission denied)" in cli(run_dir=str(tmp_path / "work" / "run"))


def checkpoint(folder):
    tensors = {name: {"w": torch.ones(2)} for name in ("trained", "ema", "optimizer")}
    state = dict(config={}, skipped=0, train_seconds=0.0, images_sampled=0, best=None, ema_updates=0, before_prompts=[])
    return save_checkpoint(folder / "checkpoints", 3, tensors, state)


def test_a_corrupted_checkpoint(cli, tmp_path):
    path = checkpoint(tmp_path / "run")
    os.truncate(path / "ema.safetensors", 30)
    assert f"resume: {path} is damaged" in cli(resume=str(tmp_path / "run"))
    (path / "ema.safetensors").unlink()
    assert "lacks ema.safetensors" in cli(resume=str(path))
    (path / "state.json").write_text("{")
    assert "is damaged" in cli(resume=str(path))
    shutil.rmtree(path)
    assert "holds no checkpoint" in cli(resume=str(tmp_path / "run"))


LAYER = "transformer.transformer_blocks.0.attn.to_q"


def lora_file(folder, rank=4, width=128, layer=LAYER):
    folder.mkdir(exist_ok=True)
    tensors = {f"{layer}.lora_A.weight": torch.zeros(rank, width), f"{layer}.lora_B.weight": torch.zeros(width, rank)}
    save_file(tensors, str(folder / "pytorch_lora_weights.safetensors"))
    return str(folder)


def test_a_lora_of_another_model_or_rank(cli, tmp_path):
    assert MODELS["shapes-flow"].is_dir()
    assert "does not fit" in cli(lora=lora_file(tmp_path / "a", width=64))
    assert "does not fit" in cli(lora=lora_file(tmp_path / "a", layer="transformer.blocks.7.to_q"))
    assert "has rank 8, expected lora_rank, 4" in cli(lora=lora_file(tmp_path / "a", rank=8))
    assert "has alpha 4, expected lora_alpha, 8" in cli(lora=lora_file(tmp_path / "a"))
    (tmp_path / "a" / "pytorch_lora_weights.safetensors").write_bytes(b"not safetensors")
    assert "damaged" in cli(lora=str(tmp_path / "a"))
    save_file({"w": torch.ones(2)}, str(tmp_path / "a" / "pytorch_lora_weights.safetensors"))
    assert "holds no LoRA layers" in cli(lora=str(tmp_path / "a"))


def test_processes_that_cannot_share_the_groups(cli, monkeypatch):
    monkeypatch.setattr("accelerate.Accelerator.num_processes", property(lambda _: 3))
    assert "got 2 prompts an update for 3 processes" in cli()


def test_a_failure_while_loading_is_one_line_too(cli, monkeypatch):
    def fail(*_, **__):
        raise OSError("no such\nmodel")

    monkeypatch.setattr(Generator, "from_pretrained", fail)
    assert cli() == "flow_grpo: no such model\n"


def test_prompts_that_stand_in_both_sets_are_told(options, world_files):
    both = {**options, "eval_prompts": options["prompts"]}
    plan = preflight.make_plan(flow_grpo.Config(**both))
    assert plan.warnings == ["4 of 4 evaluation prompts also stand in the training set"]
