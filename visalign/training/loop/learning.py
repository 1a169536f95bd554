"""Gradients from recorded steps, by one pipeline call with a backward pass inside each; and the updates with them."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

from visalign.pipeline.generator import Generator
from visalign.sampling.rollout import Trajectory

from .optimization import mean_over_processes
from .setup import TrainState

StepLoss = Callable[[int, Tensor, Mapping[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]


def add_gradients(
    generator: Generator,
    prompts: Sequence[str],
    seeds: Sequence[int],
    states: Mapping[int, Tensor],
    loss: StepLoss,
    scale: float,
    references: Mapping[str, Callable[[], AbstractContextManager[Any]]] | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Add the gradient of `scale` times the sum of all losses to the weights'.

    Args:
        states: {step: (N, ...)}, the recorded states to predict at.
        loss: (step, prediction, predictions of the references) to the losses (any number,) of the step and
            statistics, means over them.
        references: within each of these the generator is another model (`Policy.reference`: the base), which predicts
            too, without gradient.
        inputs: arguments of the pipeline for these calls.

    Returns:
        Sums of the statistics over all losses, and their number as "count".
    """
    others: dict[int, dict[str, Tensor]] = {i: {} for i in states}
    sums: dict[str, Tensor] = {}
    call = dict(inputs or {})
    for name, using in (references or {}).items():

        def keep(i: int, _latents: Tensor, prediction: Tensor, name: str = name) -> None:
            others[i][name] = prediction

        with torch.no_grad(), using():
            generator.denoise(prompts, seeds, keep, latents=states, **call)

    def learn(i: int, _latents: Tensor, prediction: Tensor) -> None:
        losses, stats = loss(i, prediction, others[i])
        (losses.sum() * scale).backward()
        count = torch.tensor(float(len(losses)), device=losses.device)
        for name, value in {**stats, "count": torch.ones_like(count)}.items():
            sums[name] = sums.get(name, torch.zeros_like(count)) + value * count

    generator.denoise(prompts, seeds, learn, latents=states, **call)
    return sums


def add_sums(total: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    """Add each entry of `more` to that of `total`."""
    for name, value in more.items():
        total[name] = total[name] + value if name in total else value


class Record(Protocol):
    """What was sampled: a `Trajectory`, or a `Tree`."""

    fresh: bool
    gaps: list[Tensor]


def rows_with_signal(trajectory: Trajectory, advantages: Tensor, exact: bool) -> list[int]:
    """Places of the samples whose advantages (N,) are not 0; the others need no forward.

    All, if some have signal, where leaving others out would change what rounding makes of these: not in float32
    (`exact`), nor where log-probabilities are recorded in the pass itself, see `old_log_probs`.
    """
    rows = advantages.nonzero().flatten().tolist()
    return rows if not rows or exact or trajectory.fresh or trajectory.gaps else list(range(len(advantages)))


class Updates:
    """The optimiser updates of one iteration, and what they have to tell.

    updates = Updates(state, accelerator, step, [batch.trajectory for batch in batches])
    for batch in batches:
        updates.add(add_gradients(...))
    updates.apply()

    `records`, what was sampled by the weights as they are, is `fresh` until the first update.
    """

    def __init__(self, state: TrainState, accelerator: Accelerator, step: int, records: Sequence[Record] = ()) -> None:
        self.state, self.accelerator, self.step, self.records = state, accelerator, step, records
        for record in records:
            record.fresh = True
        self.sums: dict[str, Tensor] = {}
        self.norms: list[float] = []

    def add(self, sums: Mapping[str, Tensor]) -> None:
        """Take in what a micro-batch's gradients gave to log."""
        add_sums(self.sums, sums)

    def apply(self) -> None:
        """Update by the gradients of all processes, unless they are not finite."""
        self.norms.append(self.state.apply_gradients(self.accelerator, self.step))
        for record in self.records:
            record.fresh = False

    def values(self, names: Sequence[str]) -> dict[str, float]:
        """What to log: means of these statistics over all processes, the largest gradient norm, updates left out."""
        means = mean_over_processes(self.accelerator, self.sums, names)
        norm = max((n for n in self.norms if math.isfinite(n)), default=math.nan)
        values = {**means, "grad_norm": norm, "skipped_updates": self.state.skipped}
        if self.records:  # on each process, whether or not it has trained on any
            gaps = [gap for record in self.records for gap in record.gaps]
            most = torch.stack(gaps).max() if gaps else torch.zeros((), device=self.accelerator.device)
            values["log_prob_rounding"] = float(self.accelerator.gather(most[None]).max())
        return values
