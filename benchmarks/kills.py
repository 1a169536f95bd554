"""Kills at random moments: does what is run again end as if nothing had happened, and is nothing left behind?

    python benchmarks/kills.py --kills 300            # about a quarter of an hour on one core
    python benchmarks/kills.py --kills 20 --only flow_grpo eval

Each program is run to its end once, then again and again in fresh folders: killed (SIGKILL, now and then SIGTERM) after
a random share of the time it took, then started by the same command, until it ends by itself. Compared with the
unbroken run: of a training the last checkpoint's weights, average and optimiser, the metrics but for times, and the
exported LoRA; of an evaluation all scores and pictures; of a search its tree and the picture. Children
are forks of one process that has imported everything, so that most of a run is the run, and a kill lands anywhere.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from safetensors.torch import load_file

from visalign.commands import cli
from visalign.trainers import ddpo, flow_grpo, reward_backprop
from visalign.training.run.checkpoint import checkpoints

TINY = dict(
    num_steps=3, steps=3, prompts_per_step=2, eval_count=2, eval_during=2, batch_size=4, lora_rank=2, monitor="off"
)
TIMES = ("seconds", "peak_memory", "time")
GOING = (None, 128 + signal.SIGTERM)  # still running, or saved and unfinished: it is started again
LEFT = (".partial", ".new", ".tmp", "-old", "-gone")


@dataclass
class Program:
    """What is run in a folder, and what of the folder must be equal in the end."""

    run: Callable[[Path], object]
    outcome: Callable[[Path], dict[str, object]]
    seconds: float = 0.0
    wanted: dict[str, object] = field(default_factory=dict)


def training(module, **options) -> Program:
    def run(folder: Path) -> None:
        resume = str(folder) if checkpoints(folder / "checkpoints") else None
        module.main(module.Config(**TINY, **options, run_dir=str(folder), resume=resume))
        if not (folder / "summary.json").exists():  # told to end, and saved: as the command does
            raise SystemExit(128 + signal.SIGTERM)

    def outcome(folder: Path) -> dict[str, object]:
        last = checkpoints(folder / "checkpoints")[-1]
        tensors = {f"{f.name}.{k}": v for f in sorted(last.glob("*.safetensors")) for k, v in load_file(f).items()}
        tensors |= {f"lora.{k}": v for f in (folder / "lora").glob("*.safetensors") for k, v in load_file(f).items()}
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return tensors | {
            "metrics": without_times(lines),
            "summary": without_times(json.loads((folder / "summary.json").read_text())),
        }

    return Program(run, outcome)


def evaluation() -> Program:
    contestants = ["--contestant", "base=shapes-flow,steps=3", "--contestant", "more=shapes-flow,steps=4"]

    def run(folder: Path) -> None:
        cli.main(
            [
                "eval",
                *contestants,
                "--prompts",
                "4",
                "--reward",
                "jpeg_compressibility",
                "--batch-size",
                "2",
                "--out",
                str(folder),
            ]
        )

    def outcome(folder: Path) -> dict[str, object]:
        pictures = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.png"))}
        return pictures | {"eval": without_times(json.loads((folder / "eval.json").read_text()))}

    return Program(run, outcome)


def search() -> Program:
    def run(folder: Path) -> None:
        argv = ["generate", "a red circle", "--search", "dts", "--reward", "jpeg_compressibility", "--budget", "60"]
        cli.main([*argv, "--steps", "4", "--option", f'folder="{folder / "tree"}"', "--out", str(folder)])

    def outcome(folder: Path) -> dict[str, object]:
        tree = without_times(json.loads((folder / "tree" / "tree.json").read_text()))
        pictures = {
            p.name: p.read_bytes() for p in folder.glob("*.png") if p.name not in ("search.png", "0000-tree.png")
        }
        return pictures | {"tree": tree}  # search.json and the plots are of the last start

    return Program(run, outcome)


def without_times(value):
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if not any(word in k for word in TIMES)}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def child(program: Program, folder: Path, log: Path) -> int:
    """Start a run in a fork; returns its process."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1), os.dup2(handle, 2)
        program.run(folder)
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def finished(pid: int, within: float | None) -> int | None:
    """The exit status of a child, or None where it is still running after so many seconds."""
    end = None if within is None else time.monotonic() + within
    while end is None or time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def differences(found: dict[str, object], wanted: dict[str, object]) -> list[str]:
    def equal(a: object, b: object) -> bool:
        return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b

    return [
        k
        for k in sorted(found.keys() | wanted.keys())
        if k not in found or k not in wanted or not equal(found[k], wanted[k])
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--out", type=Path, default=Path("runs/kills"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    programs = {
        "flow_grpo": training(flow_grpo, group_size=2, window="all", reward="jpeg_compressibility"),
        "ddpo": training(ddpo, model="shapes-diffusion", group_size=2, reward="jpeg_compressibility"),
        "reward_backprop": training(reward_backprop, method="draft", reward="clip_match"),
        "eval": evaluation(),
        "generate --search": search(),
    }
    programs = {n: p for n, p in programs.items() if not arguments.only or n.split()[0] in arguments.only}
    shutil.rmtree(arguments.out, ignore_errors=True)
    arguments.out.mkdir(parents=True)
    log, rng = arguments.out / "log.txt", random.Random(arguments.seed)
    for name, program in programs.items():
        folder, started = arguments.out / f"{name.split()[0]}-unbroken", time.monotonic()
        status = finished(child(program, folder, log), None)
        assert status == 0, f"{name}: {status}, see {log}"
        program.seconds, program.wanted = time.monotonic() - started, program.outcome(folder)
        print(f"{name}: {program.seconds:.1f} s unbroken", flush=True)
    counts = {name: dict(kills=0, runs=0, equal=0, refused=0, left=0) for name in programs}
    total = 0
    while total < arguments.kills:
        name = list(programs)[sum(c["runs"] for c in counts.values()) % len(programs)]
        program, count = programs[name], counts[name]
        folder = arguments.out / f"{name.split()[0]}-{count['runs']}"
        while (status := finished(pid := child(program, folder, log), rng.uniform(0, 1.2) * program.seconds)) in GOING:
            if status is not None:
                continue
            os.kill(pid, signal.SIGTERM if rng.random() < 0.15 else signal.SIGKILL)
            status = finished(pid, None)
            count["kills"], total = count["kills"] + 1, total + 1
            if status == 0:
                break  # it had just ended
        count["runs"] += 1
        if status not in (0, 128 + signal.SIGTERM):
            count["refused"] += 1
            print(f"{folder}: could not go on, status {status}", flush=True)
            continue
        wrong = differences(program.outcome(folder), program.wanted)
        left = [str(p) for p in folder.rglob("*") if any(mark in p.name for mark in LEFT)]
        count["equal"] += not wrong
        count["left"] += len(left)
        if wrong or left:
            print(f"{folder}: differs in {wrong[:5]}, left {left[:5]}", flush=True)
        else:
            shutil.rmtree(folder)
    print(
        "| program | kills | runs | equal to the bit | could not go on | files left behind |\n|---|---|---|---|---|---|"
    )
    for name, c in counts.items():
        print(f"| {name} | {c['kills']} | {c['runs']} | {c['equal']} | {c['refused']} | {c['left']} |")


if __name__ == "__main__":
    main()
