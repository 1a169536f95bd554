"""What the tests of trainers ask of a whole run: resumed equals unbroken, two processes do as one, mistakes told."""

import importlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from visalign.pipeline.generator import Generator
from visalign.training.loop.batches import Batch, GatheredScores, Submitted
from visalign.training.run.checkpoint import load_checkpoint
from visalign.training.run.folder import read_metrics


def lines(folder: Path) -> list[dict]:
    """metrics.jsonl without what the clock and the machine put into it."""
    return [
        {k: v for k, v in line.items() if not k.startswith("seconds") and k != "peak_memory_bytes"}
        for line in read_metrics(folder / "metrics.jsonl")
    ]


def assert_equal_runs(one: Path, other: Path, step: int) -> None:
    """The same weights, average, optimiser, place, memory, metrics and summary, bit by bit."""
    (values, state), (others, other_state) = (load_checkpoint(r / "checkpoints" / f"step-{step}") for r in (one, other))
    assert values.keys() == others.keys() >= {"trained", "ema", "optimizer", "before"}
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


def scored(trainer, batches: Iterable[Batch]) -> tuple[Submitted, GatheredScores]:
    """Batches, sampled and handed to the trainer's reward as its iteration does, and all their scores."""
    with torch.no_grad():
        submitted = trainer.loop.submit(batches)
    return submitted, trainer.loop.collect([submitted])


def stop_in_step(monkeypatch, trainer: type, step: int) -> None:
    """Send SIGTERM before the update of a step."""
    update = trainer.update

    def stopped(self, at, *rest):
        if at == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(self, at, *rest)

    monkeypatch.setattr(trainer, "update", stopped)


def refused(module: ModuleType, argv: list[str], monkeypatch, capsys) -> str:
    """Run a trainer's command line where it must fail before loading, with one line and status 2; the line."""
    monkeypatch.setattr(Generator, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(SystemExit) as caught:
        module.cli(argv)
    error, prog = capsys.readouterr().err, module.__name__.split(".")[-1]
    assert caught.value.code == 2 and error.startswith(f"{prog}: ") and error.count("\n") == 1, error
    return error


def in_child(function: Callable[[], Any], errors: Path, **environment: str) -> int:
    """Fork this process, which has all libraries loaded already, and call the function there; the child's pid."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        with open(errors, "w") as file:
            os.dup2(file.fileno(), 2)
            sys.stderr = file
            os.environ |= environment
            AcceleratorState._reset_state(reset_partial_state=True)  # the child joins its processes anew
            try:
                function()
                status = 0
            except BaseException:
                traceback.print_exc(file=file)
    finally:
        os._exit(status)


def exit_codes(pids: Sequence[int], seconds: float = 300) -> list[int]:
    """Of children, negative where a signal ended one; those that wait for one that failed are killed."""
    codes: dict[int, int] = {}
    ends = time.monotonic() + seconds
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes and (done := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(done[1])
        if any(codes.values()) or time.monotonic() > ends:
            for pid in pids:
                if pid not in codes:
                    os.kill(pid, signal.SIGKILL)
                    codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        time.sleep(0.05)
    return [codes[pid] for pid in pids]


def run_on_two_processes(runs: dict[str, tuple[str, dict[str, Any]]], folder: Path) -> Path:
    """Run trainers, by name (module, options), by two processes: folder / name, and the scores in name.scores."""
    free = [socket.create_server(("127.0.0.1", 0)) for _ in runs]  # one each: they are not given back at once
    ports = [server.getsockname()[1] for server in free]
    for server in free:
        server.close()

    def run_all() -> None:
        for (name, (module, options)), port in zip(runs.items(), ports):
            os.environ |= {"TEST_SCORES": str(folder / f"{name}.scores"), "MASTER_PORT": str(port)}
            trainer = importlib.import_module(module)
            trainer.main(trainer.Config(**options, run_dir=str(folder / name)))
            AcceleratorState._reset_state(reset_partial_state=True)  # the next run joins its processes anew

    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
    pids = [in_child(run_all, folder / f"errors-{r}", **world, RANK=r, LOCAL_RANK=r) for r in ("0", "1")]
    assert exit_codes(pids, 500) == [0, 0], "\n".join((folder / f"errors-{r}").read_text()[-3000:] for r in (0, 1))
    return folder


def assert_same_on_two_processes(one: Path, one_scores: Path, two: Path, two_scores: Path) -> None:
    """The runs of one step have the same scores, weights and metrics within 1e-5."""
    told = [[line.split(" ", 1) for line in path.read_text().splitlines()] for path in (one_scores, two_scores)]
    single, both = (sorted((prompt, float(score)) for score, prompt in scores) for scores in told)
    assert len(single) and [p for p, _ in single] == [p for p, _ in both]
    assert max(abs(a - b) for (_, a), (_, b) in zip(single, both)) < 1e-5
    (values, state), (others, other) = (load_checkpoint(r / "checkpoints" / "step-1") for r in (one, two))
    for name in ("trained", "ema", "before"):
        for key, value in values[name].items():
            torch.testing.assert_close(others[name][key], value, rtol=0, atol=1e-5)
    assert flat(state["extra"]) == pytest.approx(flat(other["extra"]), abs=1e-5)
    for line, same in zip(lines(one), lines(two), strict=True):
        numbers = {k: v for k, v in line.items() if isinstance(v, int | float) and not k.startswith("monitor_")}
        assert numbers == pytest.approx({k: same.get(k) for k in numbers}, rel=1e-3, abs=1e-5)  # it watches a share


def flat(value: Any) -> list:
    """What is in nested lists and dictionaries, texts left out."""
    if isinstance(value, dict):
        return [x for key in sorted(value) for x in flat(value[key])]
    if isinstance(value, list):
        return [x for entry in value for x in flat(entry)]
    return [] if isinstance(value, str) else [value]
