"""Gaussian paths x = alpha x0 + sigma noise in general, and a flow's path seen as a variance-preserving one (VP).

The conversion is that of rollover budget forcing (Kim et al. 2025, arXiv:2503.19385): a flow at level t, alpha = 1 - t,
and a VP at time rho are the same state up to a scale, xbar = c(rho) x_t(rho). VP times run from 1 (noise) to 0 (data).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .consistency import boundary_scalings
from .diffusion import ddim, ddim_std
from .flow import flow_ddim, flow_ddim_std, velocity_to_denoised
from .gaussian import Gaussian, at_least_float32
from .schedule import Schedule

BETA_MIN, BETA_MAX = 0.1, 20.0  # of the VP, beta(rho) = BETA_MIN + (BETA_MAX - BETA_MIN) rho


# Any path ------------------------------------------------------------------------------------------------------------


def path_at(schedule: Schedule, index: int) -> tuple[float, float]:
    """alpha and sigma of the state at level `index`, 0 .. T. A consistency model's result is (1, 0), as its step is."""
    level = schedule.levels[index]
    if schedule.kind == "flow":
        return 1 - level, level
    if schedule.kind == "consistency" and index == schedule.num_steps:
        return 1.0, 0.0
    return math.sqrt(level), math.sqrt(1 - level)


def path_denoised(latents: Tensor, velocity: Tensor, path: tuple[float, float], rates: tuple[float, float]) -> Tensor:
    """x0 (N, ...) from the velocity dx/dt of any path: (sigma u - sigma' x) / (alpha' sigma - sigma' alpha).

    Args:
        latents, velocity: (N, ...).
        path, rates: (alpha, sigma), sigma > 0, and their derivatives by t.
    """
    (alpha, sigma), (alpha_rate, sigma_rate) = path, rates
    return (sigma * velocity - sigma_rate * latents) / (alpha_rate * sigma - sigma_rate * alpha)


def path_score(latents: Tensor, velocity: Tensor, path: tuple[float, float], rates: tuple[float, float]) -> Tensor:
    """The score -noise / sigma (N, ...) from the velocity: (k u - x) / (sigma^2 - k sigma' sigma), k = alpha / alpha'.

    Args: as `path_denoised`, alpha' not 0.
    """
    (alpha, sigma), (alpha_rate, sigma_rate) = path, rates
    ratio = alpha / alpha_rate
    return (ratio * velocity - latents) / (sigma**2 - ratio * sigma_rate * sigma)


def renoise(latents: Tensor, path: tuple[float, float], noisier: tuple[float, float], noise: Tensor) -> Tensor:
    """Back from one level of a path to a noisier one: (a'/a) x + sqrt(sigma'^2 - (a'/a)^2 sigma^2) noise.

    The law of the path at the noisier level, given x. Source: the rewinding of Kim et al. 2025 and, for VP paths, the
    recurrence of universal guidance (Bansal et al. 2023, arXiv:2302.07121).

    Raises:
        ValueError: `noisier` has less noise in proportion than `path`.
    """
    (alpha, sigma), (alpha_up, sigma_up) = path, noisier
    ratio = alpha_up / alpha
    variance = sigma_up**2 - (ratio * sigma) ** 2
    if variance < -1e-9:
        raise ValueError(f"noisier: got {noisier}, expected a level with more noise than {path}")
    return ratio * latents + math.sqrt(max(variance, 0.0)) * noise


def denoised_to_prediction(schedule: Schedule, step_index: int, latents: Tensor, denoised: Tensor) -> Tensor:
    """The network output (N, ...) from which the step would have estimated this x0: the inverse of that estimate.

    Raises:
        ValueError: a level without signal (alpha 0) and a prediction of the noise, which says nothing of x0.
    """
    alpha, sigma = path_at(schedule, step_index)
    latents, denoised = at_least_float32(latents), at_least_float32(denoised)
    if schedule.kind == "consistency":
        c_skip, c_out = boundary_scalings(schedule.times[step_index], schedule.timestep_scaling, schedule.sigma_data)
        denoised = (denoised - c_skip * latents) / c_out
    if schedule.prediction_type == "sample":
        return denoised
    if schedule.prediction_type == "velocity":
        return (latents - denoised) / sigma
    if schedule.prediction_type == "v_prediction":
        return (alpha * latents - denoised) / sigma
    if alpha == 0:
        raise ValueError("denoised: got a level with alpha 0, expected some signal where the noise is predicted")
    return (latents - alpha * denoised) / sigma


# A flow seen as VP ---------------------------------------------------------------------------------------------------


def vp_path(rho: float) -> tuple[float, float]:
    """alpha and sigma of the VP at rho, in [0, 1]: exp(-B/2), sqrt(1 - exp(-B)), B = (b1 - b0) rho^2 / 2 + b0 rho."""
    total = 0.5 * (BETA_MAX - BETA_MIN) * rho**2 + BETA_MIN * rho
    return math.exp(-0.5 * total), math.sqrt(-math.expm1(-total))


def vp_rates(rho: float) -> tuple[float, float]:
    """The derivatives of `vp_path` by rho, in (0, 1]."""
    alpha, sigma = vp_path(rho)
    alpha_rate = -0.5 * (BETA_MIN + (BETA_MAX - BETA_MIN) * rho) * alpha
    return alpha_rate, -alpha * alpha_rate / sigma


def vp_time(alpha: float, sigma: float) -> float:
    """The rho, in [0, 1], at which the VP has the signal-to-noise ratio alpha / sigma; 1 if it never has so little."""
    if alpha == 0:
        return 1.0
    total = math.log1p((sigma / alpha) ** 2)
    slope = BETA_MAX - BETA_MIN
    return min((math.sqrt(BETA_MIN**2 + 2 * slope * total) - BETA_MIN) / slope, 1.0)


def vp_time_grid(steps: int) -> list[float]:
    """steps + 1 times from 1 to 0: sqrt(1 - (1 - q)^2), q uniform. Very fine where there is most noise."""
    return [math.sqrt(1 - (i / steps) ** 2) for i in range(steps + 1)]


def flow_time(rho: float) -> float:
    """The flow's level t = sigma / (alpha + sigma) of the same signal-to-noise ratio as the VP at rho."""
    alpha, sigma = vp_path(rho)
    return sigma / (alpha + sigma)


def flow_time_rate(rho: float) -> float:
    """dt / drho = t^2 (alpha sigma' - sigma alpha') / sigma^2, for rho in (0, 1]."""
    (alpha, sigma), (alpha_rate, sigma_rate) = vp_path(rho), vp_rates(rho)
    return flow_time(rho) ** 2 * (alpha * sigma_rate - sigma * alpha_rate) / sigma**2


def vp_scale(rho: float) -> float:
    """c = alpha + sigma, by which the flow's state at `flow_time` becomes the VP's: xbar = c x."""
    return sum(vp_path(rho))


def vp_scale_rate(rho: float) -> float:
    """dc / drho = alpha' + sigma', for rho in (0, 1]; the paper writes it (t sigma' - sigma t') / t^2."""
    return sum(vp_rates(rho))


def vp_velocity(latents: Tensor, velocity: Tensor, rho: float) -> Tensor:
    """The VP's velocity by rho, (N, ...): (c'/c) xbar + c t' u.

    Args:
        latents: xbar, the VP's state, (N, ...).
        velocity: u, the flow's at xbar / c and `flow_time(rho)`, (N, ...).
        rho: in (0, 1].
    """
    scale = vp_scale(rho)
    return vp_scale_rate(rho) / scale * latents + scale * flow_time_rate(rho) * velocity


def vp_sde_step(
    latents: Tensor, velocity: Tensor, score: Tensor, rho: float, rho_next: float, strength: float = 3.0
) -> Gaussian:
    """Euler-Maruyama with diffusion g = strength rho^2: mean xbar - h u + g^2 h score / 2, std g sqrt(h).

    All of the VP. Far from its marginals unless the steps are as fine as `vp_time_grid`'s where there is most noise;
    0 is the Euler step of the ODE.
    """
    if not 0 <= rho_next < rho <= 1:
        raise ValueError(f"rho, rho_next: got {rho}, {rho_next}, expected 0 <= rho_next < rho <= 1")
    h, diffusion = rho - rho_next, strength * rho**2
    latents = at_least_float32(latents)
    return Gaussian.of(latents - h * velocity + 0.5 * diffusion**2 * h * score, diffusion * math.sqrt(h))


@dataclass(frozen=True)
class VPSDE:
    """The step of DDIM's family whose spread is that of `vp_sde_step`, as far as the path allows; flow or diffusion.

    The paper's SDE on any schedule. Ours: its mean is that of DDIM's family, so the marginals hold for long steps too
    (Euler-Maruyama's leave the path on a sampler's usual schedule). With strength 0 it is the ODE.
    """

    name: ClassVar[str] = "vp_sde"
    strength: float = 3.0  # diffusion strength * rho^2 of the VP

    @property
    def stochastic(self) -> bool:
        return self.strength > 0

    def eta(self, schedule: Schedule, step_index: int) -> float:
        """Of DDIM's family, in [0, 1]."""
        if schedule.kind not in ("flow", "diffusion"):
            raise ValueError(f"schedule: got kind {schedule.kind!r}, expected 'flow' or 'diffusion' for {self.name!r}")
        most = (flow_ddim_std if schedule.kind == "flow" else ddim_std)(*schedule.step(step_index))
        if most == 0:
            return 0.0
        path, path_next = path_at(schedule, step_index), path_at(schedule, step_index + 1)
        rho, rho_next = vp_time(*path), vp_time(*path_next)
        std = self.strength * rho**2 * math.sqrt(max(rho - rho_next, 0.0)) * math.hypot(*path_next)
        return min(std / most, 1.0)

    def std(self, schedule: Schedule, step_index: int) -> float:
        eta = self.eta(schedule, step_index)
        return (flow_ddim_std if schedule.kind == "flow" else ddim_std)(*schedule.step(step_index), eta)

    def __call__(
        self, schedule: Schedule, step_index: int, latents: Tensor, prediction: Tensor
    ) -> tuple[Gaussian, Tensor]:
        eta = self.eta(schedule, step_index)
        level, level_next = schedule.step(step_index)
        if schedule.kind == "diffusion":
            return ddim(latents, prediction, level, level_next, eta, schedule.prediction_type)
        return flow_ddim(latents, prediction, level, level_next, eta), velocity_to_denoised(latents, prediction, level)
