"""Training by one prediction at a chosen noise level: Direct-Align, cycle consistency, consistency models, editing.

Levels and timesteps are Python numbers; latents (N, ...).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from visalign.transitions.gaussian import at_least_float32, per_sample


def direct_align(x0: Tensor, noise: Tensor, sigma: float, sigma_next: float, velocity: Tensor) -> Tensor:
    """SRPO's estimate of a flow's x0 from a known noise (arXiv:2509.06942), (N, ...).

    x = (1 - sigma) x0 + sigma noise is moved to sigma_next along `velocity`, and the known noise is then taken out:
    (x + (sigma_next - sigma) velocity - sigma_next noise) / (1 - sigma_next). Exactly x0 where velocity is noise - x0,
    so that early levels can be scored without blur. d x0_hat / d velocity = (sigma_next - sigma) / (1 - sigma_next):
    negative when denoising, positive when inverting (sigma_next > sigma), 0 and x0 itself at sigma_next = sigma.

    Args:
        sigma: where the network is asked, in [0, 1].
        sigma_next: where the step lands, in [0, 1); beyond 0.99 the division makes it unstable.
        velocity: the prediction at `add_noise(x0, noise, sigma, "velocity")`.
    """
    if not 0 <= sigma <= 1 or not 0 <= sigma_next < 1:
        raise ValueError(f"sigma, sigma_next: got {sigma}, {sigma_next}, expected within [0, 1] and [0, 1)")
    if not x0.shape == noise.shape == velocity.shape:
        shapes = [tuple(t.shape) for t in (x0, noise, velocity)]
        raise ValueError(f"x0, noise, velocity: got shapes {shapes}, expected one shape")
    x0, noise, velocity = (at_least_float32(t) for t in (x0, noise, velocity))
    landed = (1 - sigma) * x0 + sigma * noise + (sigma_next - sigma) * velocity
    return (landed - sigma_next * noise) / (1 - sigma_next)


@dataclass(frozen=True)
class AlignLevels:
    """One update of SRPO: both branches land at `landing`; their excess weights of the first prompt."""

    landing: float
    denoise_from: float  # above landing
    inversion_from: float  # below it
    denoise_excess: float
    inversion_excess: float


def align_levels(high: float, low: float, generator: torch.Generator, count: int = 1000) -> AlignLevels:
    """Draw the levels of one SRPO update as the released run does (arXiv:2509.06942).

    A grid G of `count` = L levels falls linearly from `high` to `low`. m in 5 .. L-5 and k = min(101, L - m, m) give
    the landing G[L-m], the noisier start G[L-m-k] and the cleaner G[L-max(m-k, 1)]; excesses are the m-th of 0.1 to
    0.25, and the max(m-k, 1)-th of 0.3 to 0.01. For other L the numbers 5 and 101 are kept.
    """
    if not 0 < low < high < 0.99:
        raise ValueError(f"high, low: got {high}, {low}, expected 0 < low < high < 0.99 (unstable nearer to noise)")
    if count < 20:
        raise ValueError(f"count: got {count}, expected >= 20")
    grid = torch.linspace(high, low, count, dtype=torch.float64).tolist()
    m = int(torch.randint(5, count - 4, (), generator=generator))
    k = min(101, count - m, m)
    n = max(m - k, 1)
    along = 1 / (count - 1)
    return AlignLevels(
        grid[count - m], grid[count - m - k], grid[count - n], 0.1 + 0.15 * m * along, 0.3 - 0.29 * n * along
    )


def edit_start(num_steps: int, strength: float) -> int:
    """The step at which editing of noised data starts: the last round(strength * T) of T steps are taken.

    InstructVideo (arXiv:2312.12490): T 20, strength 0.6 start at timestep 551 of 1000, 12 steps. 1 is whole generation,
    0 takes no step and gives the data back.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength: got {strength}, expected within [0, 1]")
    return num_steps - round(strength * num_steps)


def offset_noise(noise: Tensor, offsets: Tensor, strength: float) -> Tensor:
    """noise + strength * offsets: a shift constant over space (InstructVideo, strength 0.1), of each channel and frame.

    Args:
        noise: (N, C, H, W) or (N, C, F, H, W), standard normal.
        offsets: the same, with H = W = 1.
    """
    if offsets.shape != (*noise.shape[:-2], 1, 1):
        raise ValueError(f"offsets: got shape {tuple(offsets.shape)}, expected {(*noise.shape[:-2], 1, 1)}")
    return noise + strength * offsets


def masked_mean(values: Tensor, timesteps: Tensor, t_min: float, t_max: float, count: int | None = None) -> Tensor:
    """Mean of values (N,) over those with t_min <= timestep (N,) <= t_max, (); 0 with zero gradient if there is none.

    sum_i m_i l_i / (sum_i m_i + 1e-10) (ControlNet++, arXiv:2404.07987; t_max 200 of 1000, in Ctrl-U 400): one-step
    estimates from elsewhere are too blurred to judge.

    Args:
        count: how many there are in all, where these values are some of a larger batch; None: those here.
    """
    within = ((timesteps >= t_min) & (timesteps <= t_max)).to(values)
    return (values * within).sum() / ((within.sum() if count is None else count) + 1e-10)


def doubt_weighted(losses: Tensor, doubt: Tensor) -> Tensor:
    """l exp(-u) of each pixel (Ctrl-U, arXiv:2410.11236), u >= 0 the disagreement of two predictions; no stop-gradient.

    The mean of u itself, times c_u, has to be added: without it the model could raise u to escape l. g l exp(-u) + c_u
    u is stationary at u = max(0, log(g l / c_u)).
    """
    if losses.shape != doubt.shape:
        raise ValueError(f"doubt: got shape {tuple(doubt.shape)}, expected {tuple(losses.shape)}, as losses")
    return losses * (-doubt).exp()


def ramp(step: int, steps: int) -> float:
    """min(1, step / steps): 0 at the first step; 1 throughout for steps 0."""
    return 1.0 if steps == 0 else min(1.0, step / steps)


def consistency_loss(estimate: Tensor, target: Tensor, huber: float = 1e-3) -> Tensor:
    """Pseudo-Huber distance of f_theta(z_t, t) to the target, (N,): mean of sqrt(d^2 + c^2) - c (LCM; RG-LCM).

    At most the mean of |d|, and 0 where they agree. The target is a constant.
    """
    if estimate.shape != target.shape:
        raise ValueError(f"target: got shape {tuple(target.shape)}, expected {tuple(estimate.shape)}, as estimate")
    difference = at_least_float32(estimate) - at_least_float32(target).detach()
    return per_sample((difference**2 + huber**2).sqrt() - huber, "mean")


def min_snr_weight(level: float, prediction_type: str, gamma: float = 5.0) -> float:
    """Weight of the denoising loss at a level: min(SNR, gamma) / SNR for noise (Hang et al. 2023, arXiv:2303.09556).

    In general min(SNR, gamma) (d x0 / d prediction)^2, so that every kind of prediction weighs an error of x0 the same.

    Args:
        level: sigma ("velocity") or alpha (else), neither pure noise nor pure data.
    """
    if not 0 < level < 1 or gamma <= 0:
        raise ValueError(f"level, gamma: got {level}, {gamma}, expected 0 < level < 1 and gamma > 0")
    signal, spread = (1 - level, level) if prediction_type == "velocity" else (math.sqrt(level), math.sqrt(1 - level))
    slope = {"epsilon": spread / signal, "sample": 1.0}.get(prediction_type, spread)
    return min((signal / spread) ** 2, gamma) * slope**2
