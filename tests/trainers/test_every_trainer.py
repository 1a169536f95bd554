"""What holds for every trainer: resumed runs, processes, numbers that are not finite, mistakes, alarms, signals."""

import json
import signal
from typing import Any, NamedTuple

import pytest
import tiny_pipelines
import torch
from trainer_checks import (
    assert_equal_runs,
    assert_same_on_two_processes,
    lines,
    refused,
    run_on_two_processes,
    stop_in_step,
)

from visalign.trainers import TRAINERS, adjoint_matching, ddpo, flow_grpo, reward_backprop, tree_grpo, vgpo
from visalign.training.loop import setup
from visalign.training.run.checkpoint import load_checkpoint
from visalign.training.run.folder import read_metrics
from visalign.training.watch.hacking import Finding
from visalign.training.watch.monitor import Monitor


class Case(NamedTuple):
    """A trainer, the kind of tiny model it is tried on, and its own options beside those of all."""

    module: Any
    trainer: type
    model: str
    options: dict[str, Any]


TREE = dict(method="b2_diffurl", children=3, trees=1, trained_steps=(2, 3), stages=2, keep_above=0.1, keep_below=-0.1)
BUFFER = dict(buffer_size=4, buffer_min=2, timestep_fraction=1.0)
CASES = {
    "flow_grpo": Case(flow_grpo, flow_grpo.FlowGRPO, "flow", dict(group_size=2, window="all", kl_weight=0.1)),
    "ddpo": Case(ddpo, ddpo.DDPO, "diffusion", dict(group_size=2, policy="text", updates_per_step=2, **BUFFER)),
    "ddpo rebel": Case(ddpo, ddpo.DDPO, "consistency", dict(group_size=2, objective="rebel", **BUFFER)),
    "vgpo": Case(vgpo, vgpo.VGPO, "flow", dict(group_size=2, kl_weight=0.1)),
    "tree_grpo": Case(tree_grpo, tree_grpo.TreeGRPO, "flow", dict(split_steps=(0, 2))),
    "b2_diffurl": Case(tree_grpo, tree_grpo.TreeGRPO, "diffusion", dict(sampler="ddim", eta=1.0, **TREE)),
    "adjoint_matching": Case(adjoint_matching, adjoint_matching.AdjointMatching, "flow", dict(reward_scale=10.0)),
    "reward_backprop": Case(
        reward_backprop, reward_backprop.RewardBackprop, "flow", dict(method="alignprop", lora_scale=0.5)
    ),
}
ONE_EACH = [name for name in CASES if name not in ("ddpo rebel", "b2_diffurl")]
SHARED = [name for name in CASES if name != "ddpo"]  # tried on two processes
MODELS = {"flow": "Stable Diffusion 3", "diffusion": "Stable Diffusion 1.5", "consistency": "LCM"}
REWARD = '''
"""Brightness, below 0 (or not a number, where the environment says so), with a gradient; it writes down its scores."""

import os


def dark(images, prompts):
    scores = images.flatten(1).mean(1) - 2
    if "TEST_SCORES" in os.environ:
        with open(os.environ["TEST_SCORES"], "a") as file:
            file.writelines(f"{score:.9f} {prompt}\\n" for score, prompt in zip(scores.tolist(), prompts))
    return scores * float("nan") if "TEST_NAN" in os.environ else scores


dark.differentiable = True
'''


@pytest.fixture(scope="module")
def given(world_files, tmp_path_factory):
    """Options of a run, by case, that takes seconds: two steps of two prompts on a tiny model of random weights."""
    folder = tmp_path_factory.mktemp("models")
    for kind, family in MODELS.items():
        tiny_pipelines.make(family).save_pretrained(folder / kind)
        (folder / kind / "visalign.json").write_text(json.dumps(dict(call_kwargs=dict(height=32, width=32))))
    (world_files / "dim.py").write_text(REWARD)
    every = dict(
        prompts=str(world_files / "train.txt"),
        eval_prompts=str(world_files / "test.txt"),
        reward=f"{world_files / 'dim.py'}:dark",
        judges="jpeg_compressibility",
        guidance_scale=1.0,
        steps=2,
        num_steps=3,
        prompts_per_step=2,
        batch_size=4,
        eval_count=3,
        eval_every=1,
        eval_during=2,
        lora_rank=2,
    )
    return {name: {**every, "model": str(folder / case.model), **case.options} for name, case in CASES.items()}


def run(given, name, folder, **changes):
    module = CASES[name].module
    return module.main(module.Config(**{**given[name], **changes, "run_dir": str(folder)}))


def test_every_trainer_of_the_table_is_tried_here():
    assert {case.module.__name__.rpartition(".")[2] for case in CASES.values()} == set(TRAINERS)
    assert all(case.trainer.name == case.module.__name__.rpartition(".")[2] for case in CASES.values())


# Whole runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_stopped_by_sigterm_and_resumed_equals_unbroken(given, tmp_path, monkeypatch, name):
    unbroken = run(given, name, tmp_path / "unbroken")
    with monkeypatch.context() as patch:
        stop_in_step(patch, CASES[name].trainer, 0)
        folder = run(given, name, tmp_path / "run")
    assert [line["step"] for line in lines(folder)] == [0, 1], "the step under way is finished and kept"
    assert not (folder / "summary.json").exists() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    first = load_checkpoint(folder / "checkpoints" / "step-1")[0]["trained"]
    run(given, name, folder, resume=str(folder))
    assert_equal_runs(unbroken, folder, 2)
    last = load_checkpoint(folder / "checkpoints" / "step-2")[0]["trained"]
    assert any(not torch.equal(first[k], v) for k, v in last.items())
    for file in ("report.html", "config.yaml", "samples/before.png", "samples/after.png", "samples/step-1.png", "lora"):
        assert (folder / file).exists()


@pytest.fixture(scope="module")
def two_processes(given, tmp_path_factory):
    """The folder of one step of every shared case by two processes, which run one after the other."""
    folder = tmp_path_factory.mktemp("two")
    runs = {name: (CASES[name].module.__name__, sharable(given[name])) for name in SHARED}
    return run_on_two_processes(runs, folder)


def sharable(options):
    """4 groups over 2 processes; 3 evaluation prompts, which they cannot share evenly."""
    return {**options, "steps": 1, "prompts_per_step": 4, "eval_during": 3}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARED)
def test_two_processes_sample_the_same_and_make_the_same_first_update_as_one(
    given, two_processes, tmp_path, monkeypatch, name
):
    monkeypatch.setenv("TEST_SCORES", str(tmp_path / "scores"))
    folder = run({name: sharable(given[name])}, name, tmp_path / "one")
    assert_same_on_two_processes(folder, tmp_path / "scores", two_processes / name, two_processes / f"{name}.scores")


@pytest.mark.parametrize("name", ONE_EACH)
def test_an_alarm_of_an_evaluation_stops_the_run_with_its_last_words(given, tmp_path, monkeypatch, name):
    def alarmed(self, step, before, now):
        return self._new([Finding("heldout", step, "alarm", "the held-out pictures turned garish", 2.0, 1.0)])

    monkeypatch.setattr(Monitor, "compare", alarmed)
    folder = run(given, name, tmp_path / "run", steps=3, monitor="stop")
    metrics = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [0, 1, 1]
    assert metrics[1]["findings"] == ["alarm: the held-out pictures turned garish"]
    assert "monitor_saturation" in metrics[1] and "monitor_watched_jpeg_compressibility" in metrics[1]
    assert json.loads((folder / "summary.json").read_text())["findings"] == ["heldout"]


# Numbers that are not finite -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ONE_EACH)
def test_a_gradient_that_is_not_finite_is_skipped_counted_and_logged_as_json(given, tmp_path, monkeypatch, name):
    apply, seen = setup.TrainState.apply_gradients, []

    def spoilt(self, accelerator, step):
        if step == 0:
            parameter = next(p for p in self.policy.trained.values() if p.grad is not None)
            parameter.grad.flatten()[0] = float("nan")
        before = [p.detach().clone() for p in self.policy.trained.values()]
        norm = apply(self, accelerator, step)
        seen.append((step, all(torch.equal(b, p) for b, p in zip(before, self.policy.trained.values()))))
        assert all(p.grad is None for p in self.policy.trained.values())
        return norm

    monkeypatch.setattr(setup.TrainState, "apply_gradients", spoilt)
    folder = run(given, name, tmp_path / "run", eval_every=0, keep=9)
    assert all(kept == (step == 0) for step, kept in seen) and {step for step, _ in seen} == {0, 1}
    values, state = load_checkpoint(folder / "checkpoints" / "step-1")
    assert not values["optimizer"] and state["ema_updates"] == 0
    assert state["skipped"] == len([step for step, _ in seen if step == 0])
    text = (folder / "metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line, parse_constant=lambda c: pytest.fail(f"{c} is no JSON")) for line in text]
    assert logged[1]["grad_norm"] is None and logged[2]["grad_norm"] > 0
    assert logged[1]["skipped_updates"] == logged[2]["skipped_updates"] == state["skipped"]
    last = load_checkpoint(folder / "checkpoints" / "step-2")[0]
    assert all(v.isfinite().all() for part in ("trained", "ema", "optimizer") for v in last[part].values())


@pytest.mark.parametrize("name", ONE_EACH)
def test_a_reward_that_is_not_a_number_ends_the_run_with_one_line_or_is_not_learnt_from(
    given, tmp_path, monkeypatch, capsys, name
):
    case, begin = CASES[name], CASES[name].trainer.__init__

    def built(self, *args, **kwargs):  # from the evaluation before on: that one has its scores
        begin(self, *args, **kwargs)
        self.state.judges = {"reward": lambda images, prompts: torch.zeros(len(prompts))}
        monkeypatch.setenv("TEST_NAN", "1")

    monkeypatch.setattr(case.trainer, "__init__", built)
    options = argv({**given[name], "steps": 1, "run_dir": tmp_path / "run"})
    if name in ("reward_backprop", "adjoint_matching"):  # its gradient is none, and is skipped as such
        case.module.cli(options)
        line = lines(tmp_path / "run")[1]
        assert line["skipped_updates"] == 1 and line["scored"] == 0 and line["reward_mean"] is None
        return
    with pytest.raises(SystemExit) as caught:
        case.module.cli(options)
    error = capsys.readouterr().err.splitlines()[-1]
    assert caught.value.code == 2 and error.startswith(f"{name}: ") and "dark" in error and "nan" in error, error


def argv(options):
    told = {k: "[" + ",".join(map(str, v)) + "]" if isinstance(v, tuple) else v for k, v in options.items()}
    return [f"--{k}={v}" for k, v in told.items()]


# Mistakes --------------------------------------------------------------------------------------------------------

COMMON = [
    (dict(stepz=3), "unknown option --stepz; did you mean 'steps'?"),
    (dict(steps=0), "steps: got 0, expected > 0"),
    (dict(learning_rate="fast"), "learning_rate: got 'fast', expected float"),
    (dict(ema_decay=1.0), "ema_decay: got 1.0, expected within"),
    (dict(prompts_per_step=0), "prompts_per_step: got 0"),
    (dict(model="./none"), "model: got './none', expected one of"),
    (dict(reward="clipp"), "got 'clipp', expected one of"),
    (dict(prompts="none.txt"), "prompts: got 'none.txt', which does not exist"),
    (dict(resume="none"), "resume: got 'none', which holds no checkpoint"),
    (dict(monitor="rollback", eval_every=0), "monitor: got 'rollback' with eval_every 0"),
]


@pytest.mark.parametrize("changes, message", COMMON, ids=lambda x: str(x)[:40])
@pytest.mark.parametrize("name", ONE_EACH)
def test_mistakes_are_one_line_before_loading(given, name, changes, message, monkeypatch, capsys, tmp_path):
    options = argv({**given[name], "run_dir": tmp_path / "run", **changes})
    assert message in refused(CASES[name].module, options, monkeypatch, capsys)
    assert not (tmp_path / "run").exists()


KINDS = {
    "flow_grpo": ("diffusion", {}, r"a diffusion model, expected a flow model; the trainer for it is ddpo"),
    "ddpo": ("flow", {}, "a flow model, expected a diffusion or consistency model; the trainer for it is flow_grpo"),
    "vgpo": ("consistency", {}, "a consistency model, expected a flow model; the trainer for it is ddpo"),
    "tree_grpo": ("diffusion", {}, "sampler: got 'flow_sde' on a diffusion model, expected a flow model"),
    "b2_diffurl": ("flow", {}, "sampler: got 'ddim' on a flow model, expected a diffusion model"),
    "adjoint_matching": ("consistency", {}, "a consistency model, expected a flow or diffusion model; the trainer for"),
    "reward_backprop": ("diffusion", dict(method="srpo"), "a diffusion model, expected a flow one for srpo"),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_model_of_another_kind_is_refused_before_loading(given, name, monkeypatch, capsys, tmp_path):
    kind, changes, message = KINDS[name]
    other = next(given[other]["model"] for other, case in CASES.items() if case.model == kind)
    options = argv({**given[name], "model": other, "run_dir": tmp_path / "run", **changes})
    assert message in refused(CASES[name].module, options, monkeypatch, capsys)
    assert not (tmp_path / "run").exists()
