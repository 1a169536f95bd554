"""Twisted samplers: particles whose every step leans towards the reward's gradient, with weights that make up for it.

`tds` is the twisted diffusion sampler (Wu et al. 2023, arXiv:2306.17775), `das` diffusion alignment as sampling (Kim et
al. 2025, arXiv:2501.05803), which tempers the reward. A step draws from q = N(mean + shift, std^2 I) in place of the
kernel's p = N(mean, std^2 I); psi is the log-potential of a state, and

    log w += log p(x' | x) - log q(x' | x) + psi(x') - psi(x),    at the end psi = tilt * r(x0).
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from visalign.names import unknown_name
from visalign.search.chain import Chain
from visalign.search.records import Event
from visalign.search.twist import draw_twisted, twist_scale

from .particles import Particles, affordable, check_options, choose, maybe_resample, start
from .resampling import effective_sample_size

FORMS = ("mean", "denoised")


def temper(step: int, rate: float) -> float:
    """gamma of DAS after so many steps: min((1 + rate)^step - 1, 1); 0 at the first noise."""
    return min((1 + rate) ** step - 1, 1.0)


def usual_rate(num_steps: int) -> float:
    """The rate that brings gamma to 1 after 0.87 T steps: 0.008 for 100 and 0.10 for 8, as published."""
    return 2 ** (1 / (0.87 * num_steps)) - 1


def temper_by_ess(log_weights: Tensor, slopes: Tensor, threshold: float, lowest: float) -> float:
    """gamma in [lowest, 1] at which the ESS of log_weights + gamma * slopes falls below threshold * K.

    By bisection, from above: just below the bound. 1 if it never falls so far, lowest if it has already.
    """
    target = threshold * len(log_weights)

    def enough(gamma: float) -> bool:
        return effective_sample_size(log_weights + gamma * slopes) >= target

    if enough(1.0) or not enough(lowest):
        return 1.0 if enough(1.0) else lowest
    low, high = lowest, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if enough(middle) else (low, middle)
    return high


def tds(
    chain: Chain,
    *,
    particles: int | None = None,
    tilt: float = 10.0,
    form: str = "denoised",
    clip: float | None = 1.0,
    guidance_start: float = 0.2,
    ess_threshold: float = 0.5,
    adaptive: bool = False,
    resampling: str = "systematic",
    output: str = "best",
) -> Iterator[Event]:
    """The twisted diffusion sampler, psi = tilt * r(estimate of x0). Particle k is entity k; an event for each step.

    Args:
        particles, tilt, ess_threshold, adaptive, resampling, output: as `fk`; published: resampled at every step.
        form: how the gradient shifts a step, see `twist_scale`.
        clip: bound on the shift, see `twist`; None: none.
        guidance_start: share of the steps before which nothing is shifted: estimates of x0 are vague there.

    Raises:
        ValueError: an option that cannot work, or more particles than the budget holds; before anything is spent.
    """
    yield from _twisted(
        chain,
        particles,
        tilt,
        gammas=lambda _: 1.0,
        form=form,
        clip=clip,
        guidance_start=guidance_start,
        gate=(resampling, ess_threshold, adaptive),
        output=output,
    )


def das(
    chain: Chain,
    *,
    particles: int | None = None,
    tilt: float = 10.0,
    tempering: float | None = None,
    adaptive_tempering: bool = False,
    clip: float | None = 1.0,
    guidance_start: float = 0.2,
    ess_threshold: float = 0.5,
    adaptive: bool = True,
    resampling: str = "ssp",
    output: str = "heaviest",
) -> Iterator[Event]:
    """Diffusion alignment as sampling: psi = gamma * tilt * r(estimate of x0), gamma rising from 0 to 1.

    The gradient that shifts a step has the gamma of the next level.

    Args:
        particles, tilt, ess_threshold, adaptive, resampling, output: as `fk`. The published tilt is 1 / kappa: 200 for
            the aesthetic score, 100 for CLIP's, 10000 for PickScore's.
        tempering: the rate of `temper`; None: `usual_rate`.
        adaptive_tempering: gamma is as large as the effective sample size allows, see `temper_by_ess`; the gradient has
            the gamma of its own level (reconstructed).
        clip, guidance_start: as `tds`.

    Raises:
        ValueError: as `tds`; tempering with adaptive_tempering.
    """
    if tempering is not None and (tempering <= 0 or adaptive_tempering):
        expected = "None with adaptive_tempering" if adaptive_tempering else "> 0"
        raise ValueError(f"tempering: got {tempering}, expected {expected}")
    rate = usual_rate(chain.num_steps) if tempering is None else tempering
    yield from _twisted(
        chain,
        particles,
        tilt,
        gammas=None if adaptive_tempering else lambda i: temper(i, rate),
        form="mean",
        clip=clip,
        guidance_start=guidance_start,
        gate=(resampling, ess_threshold, adaptive),
        output=output,
    )


def twisted_least(num_steps: int, options: dict[str, Any]) -> int:
    """Guided predictions of the smallest run of `tds` or `das`: T a particle, or T if they follow from the budget."""
    count = options.get("particles")
    return (1 if count is None else count) * num_steps


def _twisted(
    chain: Chain,
    particles: int | None,
    tilt: float,
    *,
    gammas: Callable[[int], float] | None,
    form: str,
    clip: float | None,
    guidance_start: float,
    gate: tuple[str, float, bool],
    output: str,
) -> Iterator[Event]:
    """The loop of both; gammas by level, or None: by the effective sample size."""
    scheme, threshold, _ = gate
    check_options(tilt, threshold, scheme, output)
    if form not in FORMS:
        raise unknown_name("form", form, FORMS)
    if clip is not None and clip <= 0:
        raise ValueError(f"clip: got {clip}, expected > 0, or None")
    if not 0 <= guidance_start <= 1:
        raise ValueError(f"guidance_start: got {guidance_start}, expected within [0, 1], a share of the steps")
    chain.require_gradient()
    count, gamma = affordable(chain, particles, chain.num_steps), 0.0
    cloud = start(chain, count)
    for i in range(chain.num_steps):
        valued = chain.value_gradient(cloud.latents, i)
        untilted, slopes = cloud.log_weights - cloud.applied, tilt * valued.values
        if gammas is not None:
            gamma = gammas(i)
        elif i > 0:
            gamma = temper_by_ess(untilted, slopes, threshold, gamma)
        cloud = replace(
            cloud,
            log_weights=untilted + gamma * slopes,
            applied=gamma * slopes,
            rewards=valued.values,
            prediction=valued.prediction,
            gradient=(tilt * (gamma if gammas is None else gammas(i + 1))) * valued.gradient,
        )
        cloud = maybe_resample(cloud, chain, i, *gate)
        guided = guidance_start * chain.num_steps <= i < chain.num_steps - 1
        cloud = _move(cloud, chain, i, twist_scale(chain, i, form, cloud.latents[:1]) if guided else 0.0, clip)
        yield chain.event(cloud, f"step {i}: effective sample size {cloud.ess[-1]:.1f} of {count}, gamma {gamma:.3f}")
    rewards = chain.result(cloud.latents, range(count))
    cloud = replace(cloud, rewards=rewards, log_weights=cloud.log_weights - cloud.applied + tilt * rewards)
    cloud = replace(cloud, ess=(*cloud.ess, effective_sample_size(cloud.log_weights)))
    cloud = choose(cloud, chain, output, scheme)
    yield chain.event(cloud, f"finished: {cloud.unique_ancestors} ancestors, resampled {cloud.resamples} times")


def _move(cloud: Particles, chain: Chain, step_index: int, scale: float, clip: float | None) -> Particles:
    """Draw the next latents from q, and put p / q on the weights; without a scale, or a step's noise, q is p."""
    gaussian, _ = cloud.kernel(chain, step_index)
    assert cloud.gradient is not None
    latents, ratios = draw_twisted(chain, gaussian, step_index, range(cloud.size), cloud.gradient, scale, clip)
    weights = cloud.log_weights + ratios
    return replace(cloud, prediction=None, gradient=None, latents=latents, log_weights=weights)
