"""A step whose mean leans towards the reward's gradient, and what it weighs for that."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from visalign.transitions import Gaussian
from visalign.transitions.interpolant import path_at

from .chain import Chain


def twist(gradient: Tensor, scale: float, std: float, clip: float | None = 1.0) -> Tensor:
    """The shift of a step's mean, scale * gradient (K, ...), at most clip * std * sqrt(d) long per sample.

    sqrt(d) is how long the step's own noise is, over std, so that clip 1 moves no sample further than noise does. A
    sample whose gradient is not finite is not shifted. The weights hold for any shift.
    """
    shift = scale * gradient
    size = shift.flatten(1).norm(dim=1)
    factor = torch.ones_like(size)
    if clip is not None:
        factor = (clip * std * math.sqrt(shift[0].numel()) / size.clamp(min=torch.finfo(size.dtype).tiny)).clamp(max=1)
    keep = size.isfinite().view(-1, *[1] * (shift.dim() - 1))
    return torch.where(keep, shift * factor.view_as(keep), 0.0)


def log_ratio(shift: Tensor, noise: Tensor, std: float) -> Tensor:
    """log p(x') - log q(x') of x' = mean + shift + std * noise: -(shift^2 / (2 std) + shift * noise) / std.

    (K,) float64; p is N(mean, std^2 I), q is N(mean + shift, std^2 I); summed over all but the first dimension.
    """
    shift, noise = shift.double().flatten(1), noise.double().flatten(1)
    return -((shift.square() / (2 * std) + shift * noise) / std).sum(1).cpu()


def draw_twisted(
    chain: Chain,
    gaussian: Gaussian,
    step_index: int,
    entities: Sequence[int],
    gradient: Tensor,
    scale: float,
    clip: float | None,
) -> tuple[Tensor, Tensor]:
    """The next latents, the mean shifted by `twist`, and log p - log q (N,): 0 without a scale or a step's noise."""
    if gaussian.deterministic or scale == 0:
        return chain.draw(gaussian, step_index, entities), torch.zeros(len(gaussian.mean), dtype=torch.float64)
    std = chain.stds[step_index]
    shift = twist(gradient.to(gaussian.mean.dtype), scale, std, clip)
    noise = chain.noise(entities, step_index, gaussian.mean)
    return gaussian.mean + shift + gaussian.std * noise, log_ratio(shift, noise, std)


def twist_scale(chain: Chain, step_index: int, form: str, like: Tensor) -> float:
    """What the gradient of psi by x is multiplied by to shift the mean of a step; like: (1, ...), a row of latents.

    "mean": std^2 (TDS, eq. 8; DAS). "denoised": the estimate of x0 moves by (sigma^2 / alpha) * gradient and the mean
    follows it (TDS's published image sampler); 0 at pure noise, where no x0 can be told from x.
    """
    if form == "mean":
        return chain.stds[step_index] ** 2
    alpha, sigma = path_at(chain.schedule, step_index)
    if alpha == 0:
        return 0.0
    gaussian, denoised = chain.kernel(torch.zeros_like(like), step_index, torch.ones_like(like))
    follows = float(gaussian.mean.flatten()[0] / denoised.flatten()[0])  # both are linear in the prediction
    return follows * sigma**2 / alpha
