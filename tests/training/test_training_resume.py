"""A run stopped, killed or extended equals the unbroken one: weights, average, optimiser, metrics, bit by bit."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from trainer_checks import assert_equal_runs, exit_codes, in_child, lines, stop_in_step

from visalign.pipeline.generator import Generator
from visalign.rewards.spec import spec_files
from visalign.trainers.flow_grpo import Config, FlowGRPO, main
from visalign.training.before.config import parse_config
from visalign.training.before.preflight import make_plan
from visalign.training.loop.trainer import launch
from visalign.training.run.checkpoint import load_checkpoint
from visalign.training.run.folder import Claim, new_folder, read_metrics

EVERY = dict(steps=4, eval_every=2, eval_during=2, updates_per_step=2, kl_weight=0.1, warmup_steps=2, keep=9)


@pytest.fixture(scope="module")
def unbroken(options, tmp_path_factory):
    """A run of four steps, never to be written to."""
    return main(Config(**{**options, **EVERY, "run_dir": str(tmp_path_factory.mktemp("unbroken") / "run")}))


def config(options, folder: Path, **changes) -> Config:
    return Config(**{**options, **EVERY, "run_dir": str(folder), **changes})


def test_the_run_moved_its_weights_and_wrote_all_it_should(unbroken):
    first, last = (load_checkpoint(unbroken / "checkpoints" / f"step-{k}")[0] for k in (1, 4))
    for name in ("trained", "ema"):
        assert any(not torch.equal(first[name][k], last[name][k]) for k in first[name])
    steps = [line["step"] for line in lines(unbroken)]
    assert steps == [0, 1, 2, 3, 4, 4]
    whole = read_metrics(unbroken / "metrics.jsonl")[2]
    assert {f"seconds_{s}" for s in ("rollout", "score", "train")} <= whole.keys() and whole["peak_memory_bytes"] > 0
    assert whole["eval_gold_strict"] is not None and whole["skipped_updates"] == 0
    for name in ("report.html", "summary.json", "config.yaml", "samples/before.png", "samples/after.png", "lora"):
        assert (unbroken / name).exists()
    summary = json.loads((unbroken / "summary.json").read_text())
    for name in ("gold_strict", "reward"):
        low, high = summary[f"{name}_before_interval"]
        assert low <= summary[f"{name}_before"] <= high and f"{name}_after" in summary
    assert (summary["num_prompts"], summary["images_sampled"]) == (4, 4 * 4)


def test_stopped_by_a_signal_and_resumed_equals_unbroken(options, unbroken, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_in_step(patch, FlowGRPO, 1)
        folder = main(config(options, tmp_path / "run"))
    assert [line["step"] for line in lines(folder)] == [0, 1, 2], "the step under way is finished and kept"
    assert not (folder / "summary.json").exists()
    assert_equal_runs(unbroken, main(config(options, folder, resume=str(folder))), 4)


def test_a_finished_run_extended_equals_unbroken(options, unbroken, tmp_path):
    folder = main(config(options, tmp_path / "run", steps=2))
    assert_equal_runs(unbroken, main(config(options, folder, resume=str(folder))), 4)


def test_resumed_from_an_earlier_checkpoint_the_later_branch_is_gone_and_the_end_is_equal(options, unbroken, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    (folder / "checkpoints" / "step-7").mkdir()
    for file in (folder / "checkpoints" / "step-4").iterdir():
        shutil.copy(file, folder / "checkpoints" / "step-7")
    main(config(options, folder, resume=str(folder / "checkpoints" / "step-3")))
    assert_equal_runs(unbroken, folder, 4)
    assert not (folder / "checkpoints" / "step-7").exists()


@pytest.mark.slow
def test_killed_in_mid_step_and_resumed_equals_unbroken(options, unbroken, tmp_path):
    folder = tmp_path / "run"
    # Scoring calls: 2 before (4 prompts in batches of 3), then 2 a step (two shares) and 1 in evaluations under way.
    third = in_child(lambda: main(config(options, folder)), tmp_path / "errors", TEST_KILL_AT="9")  # in its middle
    assert exit_codes([third]) == [-signal.SIGKILL], (tmp_path / "errors").read_text()
    assert max(line["step"] for line in lines(folder)) == 2
    # What else a kill can leave behind: a checkpoint and a line half written.
    (folder / "checkpoints" / ".partial-3-1").mkdir()
    (folder / "checkpoints" / ".partial-3-1" / "trained.safetensors").write_bytes(b"half")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "reward_mean": 0.1}\n{"step": 3, "rew')
    assert_equal_runs(unbroken, main(config(options, folder, resume=str(folder))), 4)
    assert not list((folder / "checkpoints").glob(".partial*"))


def test_a_run_that_ended_before_its_first_checkpoint_starts_anew(options, unbroken, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    monkeypatch.setenv("TEST_FAIL_AT", "4")
    with pytest.raises(ValueError, match="the lamp is broken"):
        main(config(options, folder))
    monkeypatch.delenv("TEST_FAIL_AT")
    assert [line["step"] for line in lines(folder)] == [0]
    with pytest.raises(ValueError, match="starts anew without --resume"):
        main(config(options, folder, resume=str(folder)))
    assert_equal_runs(unbroken, main(config(options, folder)), 4)


def test_a_failing_reward_ends_the_run_with_its_name_and_leaves_the_checkpoint(
    options, unbroken, tmp_path, monkeypatch
):
    monkeypatch.setenv("TEST_FAIL_AT", "6")  # in the second step, after its first scores
    with pytest.raises(ValueError, match="reward 'brightness', .*prompt '.*lamp is broken"):
        main(config(options, tmp_path / "run"))
    kept = [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()]
    assert kept == ["step-1"]
    one, other = (load_checkpoint(r / "checkpoints" / "step-1")[0] for r in (unbroken, tmp_path / "run"))
    assert all(torch.equal(one["trained"][k], other["trained"][k]) for k in one["trained"])
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "handlers are given back"


def test_a_change_of_what_is_learnt_is_refused_at_resume_before_loading(options, unbroken, world_files, monkeypatch):
    monkeypatch.setattr("visalign.pipeline.generator.Generator.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    for change in (dict(lora_rank=8), dict(group_size=4), dict(learning_rate=1.0), dict(reward="gold"), dict(eta=0.5)):
        name = next(iter(change))
        with pytest.raises(ValueError, match=f"^{name}: got .* as in the run that is resumed"):
            main(config(options, unbroken, resume=str(unbroken), **change))
    train = world_files / "train.txt"
    text = train.read_text()
    try:
        train.write_text(text.replace("circle", "square"))
        with pytest.raises(ValueError, match="^prompts: .* does not hold the prompts"):
            main(config(options, unbroken, resume=str(unbroken)))
    finally:
        train.write_text(text)


def test_other_base_weights_under_the_same_name_are_refused_at_resume(options, unbroken, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    load = Generator.from_pretrained

    def altered(*args, **kwargs):
        generator = load(*args, **kwargs)
        next(generator.pipeline.transformer.parameters()).data.mul_(1.01)
        return generator

    monkeypatch.setattr(Generator, "from_pretrained", altered)
    with pytest.raises(ValueError, match="^model: its weights are not those that the resumed run was training"):
        main(config(options, folder, resume=str(folder), steps=5))


def test_another_run_in_the_folder_is_not_overwritten(options, unbroken):
    before = (unbroken / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="already holds a run; add --resume"):
        main(config(options, unbroken))
    assert (unbroken / "metrics.jsonl").read_bytes() == before


def test_a_reward_file_that_has_changed_is_refused_at_resume(options, tmp_path):
    mix = tmp_path / "mix.yaml"
    mix.write_text("rewards: [jpeg_compressibility, gold]\n")
    more = {**options, "reward": str(mix), "steps": 1}
    folder = main(Config(**more, run_dir=str(tmp_path / "run")))
    mix.write_text("rewards: [jpeg_compressibility, 'gold:0.5']\n")
    with pytest.raises(ValueError, match=r"^reward: .*mix.yaml' or a judge \(.*\) has changed since the run"):
        main(Config(**{**more, "steps": 2}, resume=str(folder)))
    main(Config(**{**more, "steps": 2}, resume=str(folder), allow_changes=True))


def test_python_and_texts_that_a_reward_or_a_judge_is_made_of_are_among_its_files(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("mine.py", "other.py", "spare.py"):
        (tmp_path / name).write_text("def red(images):\n    return images[:, 0].mean(dim=(1, 2))\n")
    (tmp_path / "words.txt").write_text("{prompt}")
    mix = tmp_path / "mix.yaml"
    mix.write_text(f"rewards: ['{tmp_path / 'mine.py'}:red', 'other:red', {{name: gold}}]\n")
    with pytest.raises(ValueError, match="names 'other:red', an attribute of a module; a file is data"):
        spec_files(str(mix))
    monkeypatch.setenv("VISALIGN_YAML_MODULES", "1")
    assert [f.name for f in spec_files(str(mix))] == ["mix.yaml", "mine.py", "other.py"]
    assert [f.name for f in spec_files(f"{tmp_path / 'mine.py'}:red:0.5+gold")] == ["mine.py"]
    assert spec_files("clip_match+gold:0.1") == []
    options = {"name": "videoscore2", "template": str(tmp_path / "words.txt"), "url": "http://127.0.0.1:9"}
    assert [f.name for f in spec_files(options)] == ["words.txt"]


def test_a_changed_python_file_of_a_judge_is_refused_at_resume(options, tmp_path, monkeypatch):
    file = tmp_path / "judge.py"
    file.write_text("def grey(images):\n    return images.mean(dim=(1, 2, 3))\n")
    more = {**options, "judges": f"{file}:grey", "steps": 1}
    folder = main(Config(**more, run_dir=str(tmp_path / "run")))
    file.write_text("def grey(images):\n    return -images.mean(dim=(1, 2, 3))\n")
    with pytest.raises(ValueError, match="has changed since the run that is resumed"):
        main(Config(**{**more, "steps": 2}, resume=str(folder)))


@pytest.mark.parametrize("harm", ["missing", "empty", "binary"])
def test_a_run_whose_config_is_lost_goes_on_with_the_checkpoints_own(options, unbroken, tmp_path, harm):
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    if harm == "missing":
        (folder / "config.yaml").unlink()
    else:
        (folder / "config.yaml").write_bytes(b"" if harm == "empty" else b"\xff\x00")
    cfg = parse_config(Config, ["--resume", str(folder)], prog="flow_grpo", description="")
    assert replace(cfg, resume=None, run_dir=str(unbroken)) == replace(config(options, unbroken))


def test_a_run_at_work_is_not_joined_and_two_of_one_second_get_two_folders(options, unbroken, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    claim = Claim(folder)
    with pytest.raises(ValueError, match="^run_dir: got .*, where another process is training"):
        main(config(options, folder, resume=str(folder), steps=5))
    claim.release()
    assert (folder / "summary.json").exists()
    monkeypatch.chdir(tmp_path)
    first, second = new_folder(Path("runs/x-1")), new_folder(Path("runs/x-1"))
    assert (first.name, second.name) == ("x-1", "x-1-2") and first.is_dir() and second.is_dir()


def test_a_run_that_is_refused_leaves_no_folder_behind(options, tmp_path):
    with pytest.raises(ValueError, match="lora_targets"):
        main(config(options, tmp_path / "run", lora_targets=["nothing"]))
    assert not (tmp_path / "run").exists()


def test_other_steps_under_a_falling_schedule_are_said_at_resume(options, unbroken, tmp_path):
    plan = make_plan(config(options, unbroken, resume=str(unbroken), steps=9, schedule="cosine"))
    assert any(w.startswith("steps 4 -> 9: the cosine schedule") for w in plan.warnings)
    assert not make_plan(config(options, unbroken, resume=str(unbroken), schedule="cosine")).warnings


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_a_signal_ends_early_says_so_by_its_exit_status(options, tmp_path, monkeypatch, number):
    class Early(FlowGRPO):
        def iteration(self, step):
            os.kill(os.getpid(), number)
            return super().iteration(step)

    given = [f"--{name}={value}" for name, value in {**options, "steps": 2}.items() if not isinstance(value, list)]
    with pytest.raises(SystemExit) as ended:
        launch(Early, [*given, "--run_dir", str(tmp_path / "run")])
    assert ended.value.code == 128 + number
    with pytest.raises(SystemExit) as ended:  # the step under way is the last: nothing is missing
        launch(Early, ["--resume", str(tmp_path / "run")])
        raise SystemExit(0)
    assert ended.value.code == 0 and (tmp_path / "run" / "summary.json").exists()


def test_lines_of_metrics_that_are_no_steps_are_left_out(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1, "a": 2}\n5\n{}\n[]\n{"step": true}\n\xff\n{"step": 2}\n{"st')
    assert [line["step"] for line in read_metrics(file)] == [1, 2]
