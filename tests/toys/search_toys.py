"""Chains of one dimension whose law, tilted law and values are known by quadrature.

Data: half N(-2, 0.3^2), half N(2, 0.3^2), with the exact denoiser; reward 0.5 x; kernel of the DDIM family at eta 1,
started from N(0, 1) at the first level. V_root = (1/tilt) log E[exp(tilt r)], pi the base tilted by exp(tilt r).
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from visalign.search import Chain, Ledger
from visalign.transitions import Schedule, noisy_of

MEANS, SPREAD = (-2.0, 2.0), 0.3
BASE_RIGHT = 0.5  # P(x > 0) of the base
VP_LEVELS, FLOW_LEVELS = (1, 0.7, 0.5, 0.35, 0.2, 0.1, 0), (0.999, 0.8, 0.6, 0.4, 0.2, 0.1, 0)


def vp_alpha(t: float) -> float:
    """alpha = exp(-B(t) / 2) of x_t = alpha x0 + sigma noise, beta from 0.1 to 20."""
    return math.exp(-0.5 * (0.5 * t * t * (20 - 0.1) + 0.1 * t))


def vp_schedule(levels=VP_LEVELS) -> Schedule:
    squares = [vp_alpha(t) ** 2 for t in levels[:-1]] + [1.0]
    return Schedule(
        "diffusion",
        torch.arange(len(levels) - 1, 0, -1.0),
        alphas_cumprod=torch.tensor(squares, dtype=torch.float64),
        prediction_type="sample",
    )


def flow_schedule(levels=FLOW_LEVELS) -> Schedule:
    sigmas = torch.tensor(levels, dtype=torch.float64)
    return Schedule("flow", 1000 * sigmas[:-1], sigmas=sigmas)


@dataclass
class MixtureModel:
    """The exact denoiser of the mixture, driven as a Generator is; latents (N, 1) float64."""

    schedule: Schedule

    def path(self, step: int) -> tuple[float, float]:
        """alpha and sigma of the state before a step."""
        level = self.schedule.levels[step]
        return (1 - level, level) if self.schedule.kind == "flow" else (math.sqrt(level), math.sqrt(1 - level))

    def noise(self, prompts, seeds) -> Tensor:
        rows = [torch.randn(1, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds]
        return torch.stack(rows)

    def denoised(self, x: Tensor, step: int) -> Tensor:
        alpha, sigma = self.path(step)
        variance = alpha**2 * SPREAD**2 + sigma**2
        centres = torch.tensor(MEANS, dtype=x.dtype)
        weights = torch.softmax(-0.5 * (x[..., None] - alpha * centres) ** 2 / variance, -1)
        return (weights * (centres + alpha * SPREAD**2 / variance * (x[..., None] - alpha * centres))).sum(-1)

    def predict(self, latents, step_index, prompts) -> Tensor:
        denoised = self.denoised(latents, step_index)
        return (latents - denoised) / self.path(step_index)[1] if self.schedule.kind == "flow" else denoised

    def decode(self, latents, prompts) -> Tensor:
        return latents[:, :, None, None]


def half(images: Tensor, prompts) -> Tensor:
    """r(x) = 0.5 x."""
    return 0.5 * images.flatten(1).sum(1)


half.differentiable = True  # type: ignore[attr-defined]


class ToyChain(Chain):
    """A chain whose results are numbers: rewards are not checked as those of images are."""

    def _rewards(self, images: Tensor, prompts: list[str]) -> Tensor:
        self._scored.append(torch.ones(len(images), dtype=torch.bool))
        return self.reward(images, prompts, self.context)


def toy_chain(
    schedule=None, reward=half, seed=0, max_nfe=None, transition=None, model=None, batch_size=10**9
) -> ToyChain:
    """Of the VP toy by default."""
    model = model or MixtureModel(vp_schedule() if schedule is None else schedule)
    transition = transition or noisy_of(model.schedule)
    return ToyChain(model, "toy", reward, transition, seed=seed, ledger=Ledger(max_nfe=max_nfe), batch_size=batch_size)


class Quadrature:
    """The laws of a one-dimensional chain on a grid: base forwards, exp(tilt V) backwards."""

    def __init__(self, schedule: Schedule, tilt: float = 1.0, reward=lambda x: 0.5 * x, points: int = 1601):
        self.model, self.tilt = MixtureModel(schedule), tilt
        self.x = np.linspace(-6, 6, points)
        self.width = self.x[1] - self.x[0]
        self.reward = reward(self.x)

    def kernel(self, step: int) -> np.ndarray:
        """(from, to) masses of one step; the last step, without noise, is narrowed to a grid cell."""
        x = torch.tensor(self.x)[:, None]
        gaussian, _ = noisy_of(self.model.schedule)(self.model.schedule, step, x, self.model.predict(x, step, []))
        mean, std = gaussian.mean.numpy(), max(float(gaussian.std[0]), self.width)
        mass = np.exp(-0.5 * ((self.x[None] - mean) / std) ** 2)
        return mass / mass.sum(1, keepdims=True)

    @cached_property
    def kernels(self) -> list[np.ndarray]:
        return [self.kernel(i) for i in range(self.model.schedule.num_steps)]

    @cached_property
    def base(self) -> np.ndarray:
        """Masses of the result."""
        mass = np.exp(-0.5 * self.x**2)
        mass /= mass.sum()
        for kernel in self.kernels:
            mass = mass @ kernel
        return mass

    @property
    def value(self) -> float:
        """V at the root."""
        return float(np.log(self.base @ np.exp(self.tilt * self.reward)) / self.tilt)

    @property
    def tilted(self) -> np.ndarray:
        mass = self.base * np.exp(self.tilt * self.reward)
        return mass / mass.sum()

    def distance(self, samples, weights=None) -> float:
        """W1 of weighted samples to the tilted law: the integral of |F_a - F_b|."""
        samples = np.asarray(samples, float).ravel()
        weights = np.full(len(samples), 1 / len(samples)) if weights is None else np.asarray(weights, float)
        order = np.argsort(samples)
        reached = np.concatenate([[0], np.cumsum(weights[order])])
        found = reached[np.searchsorted(samples[order], self.x, side="right")]
        return float(np.abs(found - np.cumsum(self.tilted)).sum() * self.width)
