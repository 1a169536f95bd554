"""Gradients from recorded steps: one pipeline call, with a backward pass inside each step."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from visalign.generator import Generator

from .policy import Policy

StepLoss = Callable[[int, Tensor, Tensor | None], tuple[Tensor, dict[str, Tensor]]]


def add_gradients(
    generator: Generator,
    prompts: Sequence[str],
    seeds: Sequence[int],
    states: Mapping[int, Tensor],
    loss: StepLoss,
    scale: float,
    reference: Policy | None = None,
) -> dict[str, Tensor]:
    """Add the gradient of `scale` times the sum of all losses to the weights'.

    Args:
        states: {step: (N, ...)}, the recorded states to predict at.
        loss: (step, prediction, prediction of the reference or None) to the losses (any number,) of the step and
            statistics, means over them.
        reference: the policy whose base model predicts too, without gradient; None: not needed.

    Returns:
        Sums of the statistics over all losses, and their number as "count".
    """
    base: dict[int, Tensor] = {}
    sums: dict[str, Tensor] = {}
    if reference is not None:
        with reference.reference():
            generator.denoise(prompts, seeds, lambda i, _x, p: base.update({i: p}), latents=states)

    def learn(i: int, _latents: Tensor, prediction: Tensor) -> None:
        losses, stats = loss(i, prediction, base.get(i))
        (losses.sum() * scale).backward()
        count = torch.tensor(float(len(losses)), device=losses.device)
        for name, value in {**stats, "count": torch.ones_like(count)}.items():
            sums[name] = sums.get(name, torch.zeros_like(count)) + value * count

    generator.denoise(prompts, seeds, learn, latents=states)
    return sums


def add_sums(total: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    """Add each entry of `more` to that of `total`."""
    for name, value in more.items():
        total[name] = total[name] + value if name in total else value
