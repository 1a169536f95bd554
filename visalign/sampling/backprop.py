"""Sampling through which gradients pass: the last steps of a rollout, or one step and its estimate of the result.

What `rollout` is to methods that need log-probabilities, this is to those that differentiate a reward.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from visalign.transitions import Schedule, Transition

from .seeds import step_noise


class Differentiable(Protocol):
    """What is needed of a `visalign.pipeline.generator.Generator`."""

    @property
    def schedule(self) -> Schedule: ...

    def denoise(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        step_fn: Callable[[int, Tensor, Tensor], Tensor],
        *,
        latents: Tensor | None = None,
        start: int | None = None,
        stop: int | None = None,
        grad_steps: range | None = None,
        **inputs: Any,
    ) -> Any: ...


@dataclass(frozen=True)
class Path:
    """A rollout with a gradient: its result (N, ...), and the states (N, ...) at the steps that carry it, detached."""

    result: Tensor
    states: dict[int, Tensor]


def truncated_rollout(
    generator: Differentiable,
    prompts: Sequence[str],
    seeds: Sequence[int],
    transition: Transition,
    cut: int,
    *,
    noise_seeds: Sequence[int] | None = None,
    latents: Tensor | None = None,
    start: int | None = None,
    jump: bool = False,
    **inputs: Any,
) -> Path:
    """Sample; from step `cut` on the result depends differentiably on the weights (AlignProp, arXiv:2310.03739).

    Steps before `cut` run without gradient. From there on gradients pass through the sampler's linear map and the
    network's input alike: T - cut chained Jacobians. cut 0 is the whole gradient (DRaFT, arXiv:2309.17400), T - K
    DRaFT-K. It is not the gradient of the whole objective else, but of one in which earlier predictions are constants.

    Args:
        cut: the first step with gradient, start <= cut < T.
        noise_seeds: N, for the noise of stochastic steps, a function of seed and step alone; None: `seeds`.
        latents, start: begin at step `start` with this state (editing; InstructVideo); None: at the first, with noise.
        jump: stop at step `cut` with its one-step estimate of x0 as the result (ReFL, arXiv:2304.05977): gradient
            through that prediction alone, nothing through the state.
        inputs: arguments of the pipeline for this call.

    Raises:
        ValueError: a cut outside the steps that are taken, where every gradient would be 0, or lengths that differ.
    """
    noise_seeds = list(seeds if noise_seeds is None else noise_seeds)
    if len(noise_seeds) != len(prompts):
        raise ValueError(f"noise_seeds: got {len(noise_seeds)}, expected {len(prompts)}, one per prompt")
    count, first = generator.schedule.num_steps, start or 0
    if not first <= cut < count:
        raise ValueError(f"cut: got {cut}, expected {first} .. {count - 1}, a step that is taken (else no gradient)")
    states: dict[int, Tensor] = {}

    def step_fn(i: int, x: Tensor, prediction: Tensor) -> Tensor:
        if i >= cut:
            states[i] = x.detach()
        gaussian, denoised = transition(generator.schedule, i, x, prediction)
        if jump and i == cut:
            return denoised
        return gaussian.mean if gaussian.deterministic else gaussian.sample(step_noise(noise_seeds, i, gaussian.mean))

    result = generator.denoise(
        prompts,
        seeds,
        step_fn,
        latents=latents,
        start=start,
        stop=cut + 1 if jump else None,
        grad_steps=range(cut, count),
        **inputs,
    )
    return Path(result, states)


@contextmanager
def checkpointed(*methods: tuple[Any, str]) -> Iterator[None]:
    """Within, these methods (object, name) keep no activations where gradients are on: backward computes them again.

    A whole denoiser call then leaves only its inputs and output in memory. Whatever the method draws at random is drawn
    the same again. Nested or repeated use is fine; outside, the objects are as they were.
    """
    with ExitStack() as stack:
        for owner, name in methods:
            real, own = getattr(owner, name), owner.__dict__.get(name)
            owner.__dict__[name] = _recomputing(real)
            stack.callback(_put_back, owner, name, own)
        yield


def _recomputing(real: Callable) -> Callable:
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return real(*args, **kwargs)
        return checkpoint(real, *args, use_reentrant=False, **kwargs)

    return call


def _put_back(owner: Any, name: str, own: Any) -> None:
    if own is None:
        owner.__dict__.pop(name, None)
    else:
        owner.__dict__[name] = own
