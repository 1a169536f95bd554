"""Steps of a rectified flow, x_sigma = (1 - sigma) * x0 + sigma * noise, velocity = noise - x0.

Each function takes one step from sigma to sigma_next < sigma (dt = sigma_next - sigma is negative) and returns the
Gaussian over the next latents. Sigmas are Python numbers, latents and velocity (N, ...); the maths is in float32 at
least. `*_std` are the spreads alone, which need no tensors.
"""

import math

from torch import Tensor

from visalign.transitions.gaussian import Gaussian, at_least_float32


def velocity_to_denoised(latents: Tensor, velocity: Tensor, sigma: float) -> Tensor:
    """The estimate of x0 at (latents, sigma): x - sigma * v. Exactly x at sigma 0."""
    latents, velocity = _pair(latents, velocity)
    return latents - sigma * velocity


def velocity_to_noise(latents: Tensor, velocity: Tensor, sigma: float) -> Tensor:
    """The estimate of the noise at (latents, sigma): x + (1 - sigma) * v; the score is -1/sigma times it."""
    latents, velocity = _pair(latents, velocity)
    return latents + (1 - sigma) * velocity


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """shift * s / (1 + (shift - 1) * s): more of the schedule at high noise for shift > 1; keeps 0 and 1."""
    if shift <= 0:
        raise ValueError(f"shift: got {shift}, expected > 0")
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def flow_ode(latents: Tensor, velocity: Tensor, sigma: float, sigma_next: float) -> Gaussian:
    """Euler step of the probability-flow ODE: x + v * dt. Deterministic: it has no density."""
    _check_step(sigma, sigma_next)
    latents, velocity = _pair(latents, velocity)
    return Gaussian.of(latents + velocity * (sigma_next - sigma), 0.0)


def flow_sde(
    latents: Tensor,
    velocity: Tensor,
    sigma: float,
    sigma_next: float,
    eta: float = 0.7,
    sigma_cap: float | None = None,
) -> Gaussian:
    """One step of Flow-GRPO's SDE (Liu et al. 2025, arXiv:2505.05470): diffusion eta * sqrt(sigma / (1 - sigma)).

    At sigma exactly 1 the denominator takes `sigma_cap` in place of sigma: the second entry of the schedule, which is
    sigma_next (the default). The first step is then x (1 - eta^2 / 2) + v dt with std eta, for every schedule.
    Marginals are kept to first order in dt only. eta 0 is the Euler step.
    """
    return _sde_step(latents, velocity, sigma, sigma_next, flow_sde_std(sigma, sigma_next, eta, sigma_cap))


def flow_sde_std(sigma: float, sigma_next: float, eta: float = 0.7, sigma_cap: float | None = None) -> float:
    """Std of one `flow_sde` step: the diffusion times sqrt(-dt)."""
    _check_step(sigma, sigma_next)
    _check_eta(eta)
    cap = sigma_next if sigma_cap is None else sigma_cap
    if sigma == 1 and not 0 <= cap < 1:
        raise ValueError(f"sigma_cap: got {cap}, expected within [0, 1)")
    diffusion = eta * math.sqrt(sigma / (1 - (cap if sigma == 1 else sigma)))
    return diffusion * math.sqrt(sigma - sigma_next)


def dance_sde(latents: Tensor, velocity: Tensor, sigma: float, sigma_next: float, eta: float = 0.3) -> Gaussian:
    """One step of DanceGRPO's SDE (Xue et al. 2025, arXiv:2505.07818): constant diffusion eta.

    No singularity at sigma 1, but the drift grows as 1/sigma towards the image. eta 0 is the Euler step.
    """
    return _sde_step(latents, velocity, sigma, sigma_next, dance_sde_std(sigma, sigma_next, eta))


def dance_sde_std(sigma: float, sigma_next: float, eta: float = 0.3) -> float:
    """Std of one `dance_sde` step: eta * sqrt(-dt)."""
    _check_step(sigma, sigma_next)
    _check_eta(eta)
    return eta * math.sqrt(sigma - sigma_next)


def cps(latents: Tensor, velocity: Tensor, sigma: float, sigma_next: float, eta: float = 0.8) -> Gaussian:
    """Coefficients-preserving sampling (arXiv:2509.05952): the noise level after the step is exactly sigma_next.

    With std = s sin(eta pi/2): mean (1 - s) x0 + s cos(eta pi/2) noise, s = sigma_next. eta in [0, 1]: 0 is the Euler
    step, 1 draws all noise afresh. Deterministic at sigma_next 0. The spread of the data is not kept for eta > 0.
    """
    std = cps_std(sigma, sigma_next, eta)
    denoised = velocity_to_denoised(latents, velocity, sigma)
    noise = velocity_to_noise(latents, velocity, sigma)
    remaining = sigma_next * math.cos(eta * math.pi / 2)
    return Gaussian.of((1 - sigma_next) * denoised + remaining * noise, std)


def cps_std(sigma: float, sigma_next: float, eta: float = 0.8) -> float:
    """Std of one `cps` step: sigma_next * sin(eta pi/2)."""
    _check_step(sigma, sigma_next)
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: got {eta}, expected within [0, 1]")
    return sigma_next * math.sin(eta * math.pi / 2)


def flow_ddim(latents: Tensor, velocity: Tensor, sigma: float, sigma_next: float, eta: float = 1.0) -> Gaussian:
    """DDIM's family of steps (Song et al. 2020, arXiv:2010.02502) on the flow's path: alpha = 1 - sigma.

    Mean alpha' x0 + sqrt(sigma'^2 - std^2) noise; the marginals are the path's own for every eta in [0, 1]. 0 is the
    Euler step of the ODE, 1 the posterior of the path given x0. Finite from sigma 1, deterministic to sigma_next 0.
    """
    std = flow_ddim_std(sigma, sigma_next, eta)
    denoised = velocity_to_denoised(latents, velocity, sigma)
    noise = velocity_to_noise(latents, velocity, sigma)
    return Gaussian.of((1 - sigma_next) * denoised + math.sqrt(max(sigma_next**2 - std**2, 0.0)) * noise, std)


def flow_ddim_std(sigma: float, sigma_next: float, eta: float = 1.0) -> float:
    """Std of one `flow_ddim` step: eta sigma' sqrt(1 - (alpha sigma')^2 / (alpha' sigma)^2)."""
    _check_step(sigma, sigma_next)
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: got {eta}, expected within [0, 1]")
    ratio = (1 - sigma) * sigma_next / ((1 - sigma_next) * sigma)
    return eta * sigma_next * math.sqrt(1 - ratio**2)


def dpm_solver_2m(
    latents: Tensor,
    denoised: Tensor,
    previous_denoised: Tensor | None,
    sigma_prev: float | None,
    sigma: float,
    sigma_next: float,
) -> Tensor:
    """One step of DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095) on a flow: alpha = 1 - sigma.

    With lambda = log(alpha / sigma), h = lambda' - lambda and h_p the step before:
    x' = (sigma'/sigma) x - alpha' (e^-h - 1) (m0 + (m0 - m1) h / (2 h_p)).
    Without the second term it is the Euler step.

    Args:
        latents: x at sigma, (N, ...).
        denoised: m0, the estimate of x0 at sigma.
        previous_denoised: m1, the estimate at sigma_prev; None for the first step (first order).
        sigma_prev, sigma, sigma_next: falling. First order too where a lambda is infinite: from sigma_prev or sigma
            1, or to sigma_next 0.
    """
    _check_step(sigma, sigma_next)
    latents, denoised = _pair(latents, denoised)
    # alpha' (e^-h - 1), written without lambda: finite at sigma 1 and at sigma_next 0.
    weight = (1 - sigma) * sigma_next / sigma - (1 - sigma_next)
    first = sigma_next / sigma * latents - weight * denoised
    if previous_denoised is None or sigma_next == 0 or sigma == 1:
        return first
    if sigma_prev is None or not sigma < sigma_prev <= 1:
        raise ValueError(f"sigma_prev: got {sigma_prev}, expected within ({sigma}, 1]")
    if sigma_prev == 1:
        return first
    h, h_prev = _lambda(sigma_next) - _lambda(sigma), _lambda(sigma) - _lambda(sigma_prev)
    slope = (denoised - at_least_float32(previous_denoised)) * (h / h_prev)
    return first - 0.5 * weight * slope


def _lambda(sigma: float) -> float:
    return math.log1p(-sigma) - math.log(sigma)


def _sde_step(latents: Tensor, velocity: Tensor, sigma: float, sigma_next: float, std: float) -> Gaussian:
    """The step of the SDE with the ODE's marginals whose diffusion^2 * (-dt) is std^2.

    Mean x + v dt + diffusion^2 / (2 sigma) (x + (1 - sigma) v) dt, std diffusion * sqrt(-dt).
    """
    euler = flow_ode(latents, velocity, sigma, sigma_next)
    if std == 0:
        return euler
    noise = velocity_to_noise(latents, velocity, sigma)
    return Gaussian.of(euler.mean - std**2 / (2 * sigma) * noise, std)


def _pair(latents: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    if other.shape != latents.shape:
        raise ValueError(f"prediction: got shape {tuple(other.shape)}, expected {tuple(latents.shape)}, as latents")
    return at_least_float32(latents), at_least_float32(other)


def _check_step(sigma: float, sigma_next: float) -> None:
    if not 0 <= sigma_next < sigma <= 1:
        raise ValueError(f"sigma, sigma_next: got {sigma}, {sigma_next}, expected 0 <= sigma_next < sigma <= 1")


def _check_eta(eta: float) -> None:
    if not eta >= 0:
        raise ValueError(f"eta: got {eta}, expected >= 0")
