"""Between data and noise: noised states, what a network is trained to say of them, and what it says of the data.

A level is sigma of a flow (prediction type "velocity"), x = (1 - sigma) x0 + sigma noise, or alpha, the cumulative
product, of a diffusion ("epsilon", "sample", "v_prediction"), x = sqrt(alpha) x0 + sqrt(1 - alpha) noise. Levels are
Python numbers, one for the whole batch.
"""

import math

from torch import Tensor

from visalign.names import unknown_name
from visalign.transitions.diffusion import prediction_to_denoised_and_noise
from visalign.transitions.flow import velocity_to_denoised
from visalign.transitions.gaussian import at_least_float32

KINDS = ("velocity", "epsilon", "sample", "v_prediction")


def add_noise(x0: Tensor, noise: Tensor, level: float, prediction_type: str) -> Tensor:
    """The state at a level, (N, ...), of data x0 and standard normal noise, (N, ...) each, in float32 at least."""
    signal, spread = _coefficients(level, prediction_type)
    x0, noise = _pair(x0, noise)
    return signal * x0 + spread * noise


def training_target(x0: Tensor, noise: Tensor, level: float, prediction_type: str) -> Tensor:
    """What the network is to predict at `add_noise`'s state: noise - x0, the noise, x0, or v, (N, ...)."""
    signal, spread = _coefficients(level, prediction_type)
    x0, noise = _pair(x0, noise)
    if prediction_type == "velocity":
        return noise - x0
    return {"epsilon": noise, "sample": x0}.get(prediction_type, signal * noise - spread * x0)


def one_step_estimate(latents: Tensor, prediction: Tensor, level: float, prediction_type: str) -> Tensor:
    """The estimate of x0, (N, ...), from a state and the prediction there, with the gradients of both.

    By the prediction: d x0 / d velocity = -sigma, d x0 / d epsilon = -sqrt((1 - alpha) / alpha), d x0 / d v =
    -sqrt(1 - alpha): the first and last are bounded, the second grows without bound towards noise.

    Raises:
        ValueError: an unknown prediction type, a level outside its range, shapes that differ.
    """
    _coefficients(level, prediction_type)
    if prediction_type == "velocity":
        return velocity_to_denoised(latents, prediction, level)
    return prediction_to_denoised_and_noise(latents, prediction, level, prediction_type)[0]


def _coefficients(level: float, prediction_type: str) -> tuple[float, float]:
    """Of x0 and of the noise."""
    if prediction_type not in KINDS:
        raise unknown_name("prediction_type", prediction_type, KINDS)
    if not 0 <= level <= 1:
        raise ValueError(f"level: got {level}, expected within [0, 1]")
    if prediction_type == "velocity":
        return 1 - level, level
    return math.sqrt(level), math.sqrt(1 - level)


def _pair(x0: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    if noise.shape != x0.shape:
        raise ValueError(f"noise: got shape {tuple(noise.shape)}, expected {tuple(x0.shape)}, as x0")
    return at_least_float32(x0), at_least_float32(noise)
