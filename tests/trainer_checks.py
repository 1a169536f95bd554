"""What the tests of several trainers ask of a whole run: resumed equals unbroken, two processes do as one."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from visalign.training.checkpoint import load_checkpoint
from visalign.training.run import read_metrics


def lines(folder: Path) -> list[dict]:
    """metrics.jsonl without what the clock and the machine put into it."""
    return [
        {k: v for k, v in line.items() if not k.startswith("seconds") and k != "peak_memory_bytes"}
        for line in read_metrics(folder / "metrics.jsonl")
    ]


def assert_equal_runs(one: Path, other: Path, step: int) -> None:
    """The same weights, average, optimiser, place, memory, metrics and summary, bit by bit."""
    (values, state), (others, other_state) = (load_checkpoint(r / "checkpoints" / f"step-{step}") for r in (one, other))
    assert values.keys() == others.keys() == {"trained", "ema", "optimizer", "before"}
    for name in values:
        assert values[name].keys() == others[name].keys()
        assert all(torch.equal(values[name][k], others[name][k]) for k in values[name]), name
    for key in set(state) - {"train_seconds", "config"}:
        assert state[key] == other_state[key], key
    assert lines(one) == lines(other)
    summaries = [json.loads((r / "summary.json").read_text()) for r in (one, other)]
    for summary in summaries:
        del summary["train_seconds"], summary["peak_memory_bytes"]
    assert summaries[0] == summaries[1]


def stop_in_step(monkeypatch, trainer: type, step: int) -> None:
    """Send SIGTERM before the update of a step."""
    update = trainer.update

    def stopped(self, at, *rest):
        if at == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(self, at, *rest)

    monkeypatch.setattr(trainer, "update", stopped)


def assert_two_processes_do_as_one(script: Path, options: dict, folder: Path, keys: tuple[str, ...]) -> None:
    """Run a trainer of one step by one process and by two: the same scores, weights and metrics within 1e-5."""
    launch = ["--cpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    one = [sys.executable, str(script)]
    two = [sys.executable, "-m", "accelerate.commands.launch", *launch, str(script)]
    values, logged, metrics = [], [], []
    for name, command in (("one", one), ("two", two)):
        environment = {**os.environ, "TEST_SCORES": str(folder / name), "ACCELERATE_USE_CPU": "true"}
        argv = [f"--{k}={v}" for k, v in {**options, "run_dir": folder / f"{name}-run"}.items()]
        done = subprocess.run([*command, *argv], env=environment, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr[-3000:]
        values.append(load_checkpoint(folder / f"{name}-run" / "checkpoints" / "step-1"))
        scored = [line.split(" ", 1) for line in (folder / name).read_text().splitlines()]
        logged.append(sorted((prompt, float(score)) for score, prompt in scored))
        metrics.append(read_metrics(folder / f"{name}-run" / "metrics.jsonl"))
    single, both = logged
    assert len(single) and [p for p, _ in single] == [p for p, _ in both]
    assert max(abs(a - b) for (_, a), (_, b) in zip(single, both)) < 1e-5
    for name in ("trained", "ema", "before"):
        for key, value in values[0][0][name].items():
            torch.testing.assert_close(values[1][0][name][key], value, rtol=0, atol=1e-5)
    assert values[0][1]["extra"].keys() == values[1][1]["extra"].keys()
    for key in keys:
        for line, other in zip(*metrics):
            assert line.get(key) == pytest.approx(other.get(key), abs=1e-5), key
