"""Guidance: every step of a sample is pushed up the gradient of the reward of its own estimate of the result.

Four published forms, for any path alpha x0 + sigma noise. All take the reward of the estimate of x0 for the value of a
state, which is biased where the estimate is far from the results (Jensen), and all can drift to pictures that only the
reward likes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from visalign.names import unknown_name
from visalign.transitions import Gaussian
from visalign.transitions.interpolant import denoised_to_prediction, path_at, renoise

from .chain import Chain
from .records import Event, Role

Form = Literal["twisted", "tds", "dps", "universal"]


@dataclass(frozen=True)
class Push:
    """How a step is guided, see `guidance`."""

    form: Form
    scale: float
    clip: float | None
    backward_steps: int
    backward_lr: float


@dataclass
class Guided:
    """The samples so far: their rewards in order, and of all gradients how many were clipped, or left out as broken."""

    rewards: list[float] = field(default_factory=list)
    gradients: int = 0
    clipped: int = 0
    broken: int = 0


def guidance(
    chain: Chain,
    *,
    form: Form = "twisted",
    scale: float = 1.0,
    guidance_start: float = 0.2,
    clip: float | None = 1.0,
    recurrences: int = 1,
    backward_steps: int = 0,
    backward_lr: float = 0.01,
) -> Iterator[Event]:
    """Guided samples, a batch at a time while the budget lasts; sample i is entity i.

    A sample costs T + (recurrences - 1) * (guided steps) predictions, and a backward pass for each guided one.

    Args:
        form: "twisted": `twisted_mean`, needs a kernel with noise, and leaves its steps without noise alone. "tds":
            `twisted_denoised`. "dps": the gradient is added to the next state. "universal": as "tds", with
            recurrences and backward guidance.
        scale: of the gradient, >= 0: the tilt of "twisted" and "tds", zeta of "dps", w of "universal"; in units of
            one over the reward. 0, without backward guidance and recurrences, samples plainly, to the bit.
        guidance_start: the share of the steps that go unguided first, in [0, 1): their estimates say little.
        clip: largest push of a sample, in units of its noise: the std of the step ("twisted") or sigma (the others),
            times the root of its size. None: no bound.
        recurrences: how often a guided step is taken, with noise put back in between ("universal").
        backward_steps, backward_lr: of Adam on the estimate itself ("universal"), without the denoiser; 0: none.

    A gradient that is not finite is left out, and counted in the events' state.

    Sources: twisted: Wu et al. 2023, arXiv:2306.17775 and Kim et al. 2025, arXiv:2501.05803. tds: the code of the
    former. dps: Chung et al. 2022, arXiv:2209.14687, which it is for the reward -||y - A(x0)||; reconstructed for
    others. universal: Bansal et al. 2023, arXiv:2302.07121; its stop at a small loss is left out, as a reward has no
    least one. "tds" and "universal" are reconstructed for consistency models; a level of alpha 0 gets no gradient.

    Raises:
        ValueError: options out of range, or of another form; a reward without gradient; "twisted" without noise.
    """
    push = Push(form, scale, clip, backward_steps, backward_lr)
    _check(chain, push, guidance_start, recurrences)
    first = first_guided(chain.num_steps, guidance_start)
    cost = guidance_nfe(chain.num_steps, guidance_start, recurrences)
    state = Guided()
    while count := min(chain.batch_size, chain.ledger.left // cost):
        entities = range(len(state.rewards), len(state.rewards) + count)
        latents = chain.initial(entities)
        for i in range(chain.num_steps):
            if i < first:
                latents = chain.step(latents, i, entities)
                continue
            for k in range(recurrences - 1):
                # Each repeat draws two noises of its own, for the step and for the way back.
                there, back = ([2 * (n * recurrences + k) + way for n in entities] for way in (0, 1))
                gaussian = guided_kernel(chain, latents, i, push, state)
                latents = gaussian.sample(chain.noise(there, i, latents, Role.SEARCH))
                paths = path_at(chain.schedule, i + 1), path_at(chain.schedule, i)
                latents = renoise(latents, *paths, chain.noise(back, i, latents, Role.SEARCH))
            latents = chain.draw(guided_kernel(chain, latents, i, push, state), i, entities)
        state.rewards += chain.result(latents, entities).tolist()
        yield chain.event(state, f"{len(state.rewards)} drawn, {state.clipped} of {state.gradients} gradients clipped")


def guidance_nfe(num_steps: int, guidance_start: float = 0.2, recurrences: int = 1) -> int:
    """Guided predictions a sample: T, and the repeats of the guided steps."""
    return num_steps + (recurrences - 1) * (num_steps - first_guided(num_steps, guidance_start))


def guidance_least(num_steps: int, options: dict[str, Any]) -> int:
    """Guided predictions of the smallest run of `guidance`, one sample."""
    return guidance_nfe(num_steps, options.get("guidance_start", 0.2), options.get("recurrences", 1))


def guided_kernel(chain: Chain, latents: Tensor, step_index: int, push: Push, state: Guided) -> Gaussian:
    """The Gaussian over the next latents of a guided step: one prediction a row, a backward pass where it is pushed."""
    alpha, sigma = path_at(chain.schedule, step_index)
    prediction, denoised, gradient = _estimate(chain, latents, step_index, push, state)
    if push.form in ("twisted", "dps"):
        gaussian, _ = chain.kernel(latents, step_index, prediction)
        if gradient is None:
            return gaussian
        if push.form == "dps":
            return Gaussian(gaussian.mean + push.scale * gradient, gaussian.std, gaussian.deterministic)
        return Gaussian(twisted_mean(gaussian.mean, gaussian.std, gradient, push.scale), gaussian.std)
    guided = denoised
    if gradient is not None:
        guided = twisted_denoised(guided, gradient, push.scale, alpha, sigma)
    if push.backward_steps:
        guided = guided + climb(chain, denoised, push.backward_steps, push.backward_lr)
    if guided is not denoised:
        prediction = denoised_to_prediction(chain.schedule, step_index, latents, guided)
    return chain.kernel(latents, step_index, prediction)[0]


def twisted_mean(mean: Tensor, std: Tensor | float, gradient: Tensor, scale: float) -> Tensor:
    """mean + scale std^2 gradient, (N, ...): the step tilted by exp(scale V), were V linear in the next state.

    Exact then for the gradient of V at the level of the next state; guidance takes that at the level before.
    """
    return mean + scale * std**2 * gradient


def twisted_denoised(denoised: Tensor, gradient: Tensor, scale: float, alpha: float, sigma: float) -> Tensor:
    """x0 + scale (sigma^2 / alpha) gradient, (N, ...), alpha > 0: the estimate of the noise less scale sigma gradient.

    The gradient is that of the reward of x0 by the state. For a linear estimate and reward of Gaussian data this is the
    mean of x0 under the tilt.
    """
    return denoised + scale * sigma**2 / alpha * gradient


def clip_rows(gradient: Tensor, most: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (N, ...) cut to the norm `most`, and 0 where not finite; which were clipped (N,), and broken (N,)."""
    shape = (-1,) + (1,) * (gradient.dim() - 1)
    broken = ~gradient.flatten(1).isfinite().all(1)
    gradient = torch.where(broken.view(shape), torch.zeros_like(gradient), gradient)
    if most is None:
        return gradient, torch.zeros_like(broken), broken
    norms = gradient.flatten(1).norm(dim=1)
    factors = (most / norms.clamp_min(1e-30)).clamp_max(1)
    return gradient * factors.view(shape), norms > most, broken


def climb(chain: Chain, denoised: Tensor, steps: int, lr: float) -> Tensor:
    """The change (N, ...) of an estimate of x0 by Adam on its reward, from 0: backward universal guidance."""
    change = torch.zeros_like(denoised, requires_grad=True)
    adam = torch.optim.Adam([change], lr=lr)
    for _ in range(steps):
        change.grad = -chain.clean_gradient(denoised + change.detach())[1]
        adam.step()
    return change.detach()


def first_guided(num_steps: int, guidance_start: float) -> int:
    """The first step that is guided: guidance_start * T, rounded down."""
    return int(guidance_start * num_steps + 1e-9)


def _estimate(
    chain: Chain, latents: Tensor, step_index: int, push: Push, state: Guided
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Prediction, estimate of x0, and the gradient, clipped; None where it would push nothing, and is not paid for."""
    alpha, sigma = path_at(chain.schedule, step_index)
    unit = chain.stds[step_index] if push.form == "twisted" else sigma
    if push.scale == 0 or unit == 0 or (alpha == 0 and push.form in ("tds", "universal")):
        prediction = chain.predict(latents, step_index)
        return prediction, chain.kernel(latents, step_index, prediction)[1], None
    valued = chain.value_gradient(latents, step_index)
    most = None
    if push.clip is not None:  # of the gradient, so that the push is at most clip * sqrt(size) units of noise
        per_unit = push.scale / unit if push.form == "dps" else push.scale * unit
        most = push.clip * math.sqrt(latents[0].numel()) / per_unit
    gradient, clipped, broken = clip_rows(valued.gradient, most)
    state.gradients += len(latents)
    state.clipped += int(clipped.sum())
    state.broken += int(broken.sum())
    return valued.prediction, valued.denoised, gradient


def _check(chain: Chain, push: Push, guidance_start: float, recurrences: int) -> None:
    if push.form not in get_args(Form):
        raise unknown_name("form", push.form, get_args(Form))
    if not 0 <= push.scale < math.inf:
        raise ValueError(f"scale: got {push.scale}, expected >= 0")
    if not 0 <= guidance_start < 1:
        raise ValueError(f"guidance_start: got {guidance_start}, expected within [0, 1), a share of the steps")
    if push.clip is not None and not push.clip > 0:
        raise ValueError(f"clip: got {push.clip}, expected > 0, or None for no bound")
    for option, value, least in (("recurrences", recurrences, 1), ("backward_steps", push.backward_steps, 0)):
        if value < least:
            raise ValueError(f"{option}: got {value}, expected >= {least}")
        if value > least and push.form != "universal":
            raise ValueError(f"{option}: got {value}, expected {least} for the form {push.form!r}; 'universal' has it")
    if not push.backward_lr > 0:
        raise ValueError(f"backward_lr: got {push.backward_lr}, expected > 0")
    if push.scale > 0 or push.backward_steps:
        chain.require_gradient()
    if push.form == "twisted":
        chain.require_noise()
