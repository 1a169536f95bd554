"""One DDIM step of a variance-preserving diffusion, x_t = sqrt(alpha) x0 + sqrt(1 - alpha) noise.

alpha is the cumulative product (often written with a bar), a Python number.
"""

import math

from torch import Tensor

from visalign.transitions.gaussian import Gaussian, at_least_float32


def prediction_to_denoised_and_noise(
    latents: Tensor, prediction: Tensor, alpha: float, prediction_type: str = "epsilon"
) -> tuple[Tensor, Tensor]:
    """The estimates of x0 and of the noise, (N, ...) each, from an "epsilon", "sample" or "v_prediction" output."""
    if prediction.shape != latents.shape:
        raise ValueError(
            f"prediction: got shape {tuple(prediction.shape)}, expected {tuple(latents.shape)}, as latents"
        )
    if not 0 <= alpha < 1 or (alpha == 0 and prediction_type == "epsilon"):
        raise ValueError(f"alpha: got {alpha}, expected within (0, 1), or 0 where the prediction is not the noise")
    latents, prediction = at_least_float32(latents), at_least_float32(prediction)
    signal, noise_level = math.sqrt(alpha), math.sqrt(1 - alpha)
    if prediction_type == "epsilon":
        return (latents - noise_level * prediction) / signal, prediction
    if prediction_type == "sample":
        return prediction, (latents - signal * prediction) / noise_level
    if prediction_type == "v_prediction":
        return signal * latents - noise_level * prediction, signal * prediction + noise_level * latents
    expected = "'epsilon', 'sample' or 'v_prediction'"
    raise ValueError(f"prediction_type: got {prediction_type!r}, expected {expected}")


def ddim(
    latents: Tensor,
    prediction: Tensor,
    alpha: float,
    alpha_prev: float,
    eta: float = 1.0,
    prediction_type: str = "epsilon",
) -> tuple[Gaussian, Tensor]:
    """One DDIM step from alpha to alpha_prev >= alpha (Song et al. 2020, arXiv:2010.02502, eqs. 12 and 16).

    Args:
        latents, prediction: (N, ...).
        eta: in [0, 1]; 0 is deterministic DDIM, 1 the DDPM posterior.

    Returns:
        The Gaussian over the next latents, deterministic where alpha_prev is 1 or alpha, and denoised (N, ...).
    """
    std = ddim_std(alpha, alpha_prev, eta)
    denoised, noise = prediction_to_denoised_and_noise(latents, prediction, alpha, prediction_type)
    direction = math.sqrt(max(1 - alpha_prev - std**2, 0.0))
    return Gaussian.of(math.sqrt(alpha_prev) * denoised + direction * noise, std), denoised


def ddim_std(alpha: float, alpha_prev: float, eta: float = 1.0) -> float:
    """eta * sqrt((1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)), with alpha_prev the larger level."""
    if not 0 <= alpha <= alpha_prev <= 1 or alpha == 1 or alpha_prev == 0:
        raise ValueError(f"alpha, alpha_prev: got {alpha}, {alpha_prev}, expected 0 <= alpha <= alpha_prev <= 1")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: got {eta}, expected within [0, 1]")
    return eta * math.sqrt((1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev))
