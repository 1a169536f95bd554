"""A multistep consistency step: jump to the denoised estimate, noise it again (Luo et al. 2023, arXiv:2310.04378)."""

import math

from torch import Tensor

from visalign.transitions.diffusion import prediction_to_denoised_and_noise
from visalign.transitions.gaussian import Gaussian, at_least_float32


def boundary_scalings(timestep: float, timestep_scaling: float = 10.0, sigma_data: float = 0.5) -> tuple[float, float]:
    """c_skip and c_out of a consistency model; (1, 0) at timestep 0, so that f(x, 0) = x."""
    scaled = timestep_scaling * timestep
    total = scaled**2 + sigma_data**2
    return sigma_data**2 / total, scaled / math.sqrt(total)


def consistency_step(
    latents: Tensor,
    prediction: Tensor,
    timestep: float,
    alpha: float,
    alpha_prev: float,
    *,
    prediction_type: str = "epsilon",
    timestep_scaling: float = 10.0,
    sigma_data: float = 0.5,
    eta: float = 1.0,
) -> tuple[Gaussian, Tensor]:
    """Jump to f = c_out x0 + c_skip x, then to alpha_prev: mean sqrt(alpha_prev) f, std sqrt(1 - alpha_prev) (eta 1).

    eta 1 is the policy of RLCM (Oertell et al. 2024, arXiv:2404.03673). With eta < 1 the std is eta times that and the
    rest of the noise level is filled by the noise which f implies, as DDIM does; 0 is deterministic. alpha_prev 1
    returns f itself.

    Returns:
        The Gaussian over the next latents, and denoised f (N, ...).
    """
    std = consistency_std(alpha_prev, eta)
    denoised, _ = prediction_to_denoised_and_noise(latents, prediction, alpha, prediction_type)
    c_skip, c_out = boundary_scalings(timestep, timestep_scaling, sigma_data)
    latents = at_least_float32(latents)
    denoised = c_out * denoised + c_skip * latents
    mean = math.sqrt(alpha_prev) * denoised
    if eta < 1 and alpha_prev < 1:
        noise = (latents - math.sqrt(alpha) * denoised) / math.sqrt(1 - alpha)
        mean = mean + math.sqrt((1 - alpha_prev) * (1 - eta**2)) * noise
    return Gaussian.of(mean, std), denoised


def consistency_std(alpha_prev: float, eta: float = 1.0) -> float:
    """eta * sqrt(1 - alpha_prev)."""
    if not 0 <= alpha_prev <= 1:
        raise ValueError(f"alpha_prev: got {alpha_prev}, expected within [0, 1]")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: got {eta}, expected within [0, 1]")
    return eta * math.sqrt(1 - alpha_prev)
