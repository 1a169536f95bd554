"""What training on a reward does to the truth: Flow-GRPO on the shapes world with each of some rewards, as one table.

    python benchmarks/reward_runs.py --steps 60 clip_match trainers/recipes/rewards/shapes_*.yaml
    python benchmarks/reward_runs.py --steps 40 --learning_rate 1e-4 --eval_every 4 jpeg_compressibility clip_match

Every run starts from the same model, prompts and seed; evaluations are on the same held-out prompts. The strict gold
judge is never trained on. "At the alarm" is its mean at the first evaluation at or after the watch's first alarm, which
is later than the alarm itself. Finished runs in --out are read, not run again.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from visalign.training.run.folder import read_metrics

TRAINER = Path(__file__).resolve().parent.parent / "trainers" / "flow_grpo.py"


def train(reward: str, folder: Path, arguments: argparse.Namespace) -> None:
    """One run of the trainer, its words passed on; one that was cut off goes on."""
    command = [sys.executable, str(TRAINER), "--reward", reward, "--run_dir", str(folder)]
    command += ["--steps", str(arguments.steps), "--seed", str(arguments.seed), "--eval_during", str(arguments.prompts)]
    command += ["--eval_count", str(arguments.prompts), "--eval_every", str(arguments.eval_every)]
    command += ["--learning_rate", str(arguments.learning_rate)]
    if (folder / "checkpoints").is_dir() and any((folder / "checkpoints").iterdir()):
        command = [*command[:2], "--resume", str(folder)]
    threads = os.environ.get("OMP_NUM_THREADS") or str(len(os.sched_getaffinity(0)))
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": threads})


def alarm(metrics: list[dict[str, Any]]) -> tuple[int, str, float | None] | None:
    """Step and words of the first alarm, and the strict gold at the first evaluation from then on."""
    for row in metrics:
        words = [finding for finding in row.get("findings", ()) if finding.startswith("alarm")]
        if words:
            later = [r["eval_gold_strict"] for r in metrics if r["step"] >= row["step"] and "eval_gold_strict" in r]
            return row["step"], words[0].removeprefix("alarm: "), later[0] if later else None
    return None


def change(summary: dict[str, Any], name: str) -> str:
    """Before, after, and the interval of the gain."""
    low, high = summary[f"{name}_gain_interval"]
    return f"{summary[f'{name}_before']:.3f} -> {summary[f'{name}_after']:.3f} ({low:+.3f} to {high:+.3f})"


def row_of(reward: str, folder: Path) -> list[str]:
    summary = json.loads((folder / "summary.json").read_text())
    metrics = read_metrics(folder / "metrics.jsonl")
    raised = alarm(metrics)
    golds = [r["eval_gold_strict"] for r in metrics if "eval_gold_strict" in r]
    told = "none"
    if raised:
        told = f"step {raised[0]}: {raised[1]}" + ("" if raised[2] is None else f"; strict gold then {raised[2]:.3f}")
    name = Path(reward).stem if reward.endswith(".yaml") else reward
    seconds = f"{summary['train_seconds']:.0f}"
    return [name, change(summary, "reward"), change(summary, "gold_strict"), f"{min(golds):.3f}", told, seconds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rewards", nargs="+", help="names, or YAML files")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--prompts", type=int, default=200, help="held-out prompts of each evaluation")
    parser.add_argument("--eval_every", type=int, default=10)
    parser.add_argument("--learning_rate", type=float, default=4e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/rewards"))
    arguments = parser.parse_args()
    rows = []
    for reward in arguments.rewards:
        folder = arguments.out / f"{Path(reward).stem}-{arguments.learning_rate}-{arguments.steps}-{arguments.seed}"
        if not (folder / "summary.json").is_file():
            train(reward, folder, arguments)
        rows.append(row_of(reward, folder))
    head = ["reward", "of itself", "strict gold", "lowest strict gold", "first alarm", "seconds"]
    for cells in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
