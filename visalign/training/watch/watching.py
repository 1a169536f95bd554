"""The hacking watch at work in a training: what it is shown, what it says, what is then done."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visalign.training.loop import setup
from visalign.training.loop.evaluate import Evaluation
from visalign.training.run.folder import WATCH, Run

from .hacking import Finding
from .monitor import Monitor, first_groups


def watch(
    run: Run,
    state: setup.TrainState,
    step: int,
    batches: Sequence[tuple[Tensor, Sequence[str]]],
    group_ids: Tensor,
    rewards: Tensor,
    kl: float | None,
) -> dict[str, Any]:
    """Show the monitor an iteration; tell and log what it finds, and ask the run to stop where its action says so.

    Args:
        batches: images and prompts of this process, the main one; only the first groups are looked at and judged.
        group_ids, rewards: (N,) of all processes, this one's first.

    Returns:
        What to log.
    """
    monitor = state.monitor
    if monitor is None or not run.main:
        return {}
    with run.stage("watch"):
        images = torch.cat([images for images, _ in batches])
        prompts = [prompt for _, texts in batches for prompt in texts]
        rows = first_groups(group_ids[: len(images)], monitor.options.pictures).nonzero().flatten().tolist()
        judges = {name: judge for name, judge in state.judges.items() if name != "reward"}
        watched = {name: judge(images[rows], [prompts[r] for r in rows]) for name, judge in judges.items()}
        findings = monitor.update(step, images, group_ids, rewards, watched, kl)
    return {f"monitor_{name}": value for name, value in monitor.latest.items()} | _tell(run, monitor, findings)


def watch_evaluation(
    run: Run, state: setup.TrainState, step: int, evaluation: Evaluation, logged: dict[str, Any]
) -> None:
    """Show the monitor an evaluation under way, beside the one before; as `watch`, adding to what is logged."""
    if state.monitor is None or not run.main or state.before is None:
        return
    texts = _tell(run, state.monitor, state.monitor.compare(step, state.before.scores, evaluation.scores))
    logged |= {name: [*logged.get(name, ()), *words] for name, words in texts.items()}


def _tell(run: Run, monitor: Monitor, findings: list[Finding]) -> dict[str, list[str]]:
    """Say and log findings, and ask the run to stop where the options want it."""
    for finding in findings:
        run.say(f"step {finding.step}: {finding}")
    if monitor.action(findings) in ("stop", "rollback"):
        run.stopping = run.stopping or WATCH
    return {"findings": [str(finding) for finding in findings]} if findings else {}


def roll_back(run: Run, state: setup.TrainState) -> None:
    """Put back the best checkpoint so far, if there is one; what was spent since stays counted."""
    if state.best is None:
        return run.say("there is no evaluation before the alarm to go back to; the last weights are kept")
    spent, monitor = (state.train_seconds, state.images_sampled, state.best), state.monitor
    state.monitor = None  # it keeps what it found
    setup.restore(Path(run.folder, "checkpoints", f"step-{state.best[1]}"), state)
    (state.train_seconds, state.images_sampled, state.best), state.monitor = spent, monitor
    run.say(f"went back to step {state.step}, the best on held-out prompts")
