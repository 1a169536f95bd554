"""The flow SDE whose result does not depend on its start, which adjoint matching needs."""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .flow import flow_ode, velocity_to_denoised
from .gaussian import Gaussian, at_least_float32
from .schedule import Schedule


def memoryless_diffusion(sigma: float, sigma_next: float) -> float:
    """sqrt(2 (sigma + h) / (1 - sigma + h)), h = sigma - sigma_next: `flow_sde`'s with eta sqrt(2), but finite."""
    h = sigma - sigma_next
    return math.sqrt(2 * (sigma + h) / (1 - sigma + h))


def memoryless_flow(latents: Tensor, velocity: Tensor, sigma: float, sigma_next: float) -> Gaussian:
    """One step of the memoryless SDE (Domingo-Enrich et al. 2024, arXiv:2409.08861), as in its authors' code.

    Mean x - h (2 v + x / (1 - sigma + h)), std sqrt(h) * `memoryless_diffusion`. A step to sigma 0 is the ODE's,
    without noise (ours; the code takes the SDE's mean there).
    """
    if sigma_next == 0:
        return flow_ode(latents, velocity, sigma, sigma_next)
    latents, velocity = at_least_float32(latents), at_least_float32(velocity)
    h = sigma - sigma_next
    mean = latents - h * (2 * velocity + latents / (1 - sigma + h))
    return Gaussian.of(mean, math.sqrt(h) * memoryless_diffusion(sigma, sigma_next))


@dataclass(frozen=True)
class MemorylessFlow:
    """See `memoryless_flow`."""

    name: ClassVar[str] = "memoryless_flow"
    stochastic: ClassVar[bool] = True

    def std(self, schedule: Schedule, step_index: int) -> float:
        sigma, sigma_next = self._levels(schedule, step_index)
        if sigma_next == 0:
            return 0.0
        return math.sqrt(sigma - sigma_next) * memoryless_diffusion(sigma, sigma_next)

    def __call__(
        self, schedule: Schedule, step_index: int, latents: Tensor, prediction: Tensor
    ) -> tuple[Gaussian, Tensor]:
        sigma, sigma_next = self._levels(schedule, step_index)
        gaussian = memoryless_flow(latents, prediction, sigma, sigma_next)
        return gaussian, velocity_to_denoised(latents, prediction, sigma)

    def _levels(self, schedule: Schedule, step_index: int) -> tuple[float, float]:
        if schedule.kind != "flow":
            raise ValueError(f"schedule: got kind {schedule.kind!r}, expected 'flow' for the transition {self.name!r}")
        return schedule.step(step_index)
