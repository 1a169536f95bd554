"""Evaluation on fixed prompts with fixed seeds, so that two policies are compared pair by pair; with intervals."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from visalign.pipeline.generator import Generator
from visalign.sampling.rollout import rollout
from visalign.sampling.seeds import derived_seed

# (places in the evaluation, prompts) -> inputs of the pipeline's call, and the judges' context
Extras = Callable[[list[int], list[str]], tuple[dict[str, Any], dict[str, Any]]]


@dataclass
class Evaluation:
    """Scores (N,) by judge, NaN where one failed, their prompts, and the first few images, (M, 3, H, W)."""

    prompts: list[str]
    scores: dict[str, Tensor]
    images: Tensor = field(default_factory=lambda: torch.empty(0))

    def known(self, name: str) -> Tensor:
        """The scores that did not fail, float64."""
        scores = self.scores[name].double()
        return scores[scores.isfinite()]

    def mean(self, name: str) -> float:
        return float(self.known(name).mean())

    def interval(self, name: str) -> tuple[float, float]:
        """95 % interval of the mean over prompts."""
        return mean_interval(self.known(name).numpy())


def mean_interval(values: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of a mean: Wilson's for values that are all 0 or 1 (a success rate), else by Student's t."""
    n = len(values)
    if n == 0:
        raise ValueError("values: got none, expected at least one")
    if np.isin(values, (0, 1)).all():
        interval = stats.binomtest(int(values.sum()), n).proportion_ci(confidence, "wilson")
        return float(interval.low), float(interval.high)
    if n == 1:
        return float("-inf"), float("inf")
    spread = float(stats.sem(values)) * float(stats.t.ppf((1 + confidence) / 2, n - 1))
    return float(values.mean()) - spread, float(values.mean()) + spread


@torch.no_grad()
def evaluate(
    generator: Generator,
    transition,
    prompts: Sequence[str],
    judges: dict[str, Callable[..., Tensor]],
    *,
    seed: int = 0,
    batch_size: int = 32,
    keep_images: int = 16,
    process: int = 0,
    processes: int = 1,
    gather: Callable[[Tensor], Tensor] = lambda t: t,
    extras: Extras | None = None,
) -> Evaluation:
    """One image a prompt, scored by every judge. A stochastic transition draws its noise from the prompt's seed.

    Prompt k always gets the same seed. Each process takes the prompts k = process, process + processes, ...; `gather`
    joins a tensor of all processes, rows in order of process. N prompts give N scores on any number of processes.
    `extras` gives further inputs of the pipeline's call and the judges' context, where some are needed.
    """
    local = list(range(process, len(prompts), processes))
    scores: dict[str, list[Tensor]] = {name: [] for name in judges}
    images: list[Tensor] = []
    for start in range(0, len(local), batch_size):
        rows = local[start : start + batch_size]
        texts = [prompts[k] for k in rows]
        seeds = [derived_seed(seed, 4, k) for k in rows]
        inputs, context = extras(rows, texts) if extras else ({}, {})
        noisy: list[int] | None = None if transition.stochastic else []
        generated = rollout(generator, texts, seeds, transition, sde_steps=noisy, **inputs).images
        assert generated is not None
        for name, judge in judges.items():
            scores[name].append(judge(generated, texts, **({"context": context} if context else {})).double().cpu())
        if sum(len(i) for i in images) * processes < keep_images:
            images.append(generated.cpu())
    joined = {}
    each = -(-len(prompts) // processes)
    for name, parts in scores.items():
        padded = torch.full((each,), float("nan"), dtype=torch.float64)
        padded[: len(local)] = torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)
        joined[name] = gather(padded).cpu().view(processes, each).T.flatten()[: len(prompts)]
    examples = torch.cat(images)[:keep_images] if images else torch.empty(0)
    return Evaluation(list(prompts), joined, examples)
