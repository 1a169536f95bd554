"""Feynman-Kac steering: K particles follow the kernel, are weighted by rewards on the way, and are resampled.

Singhal et al. 2025, arXiv:2501.06848. A potential G multiplies a particle's weight at each rewarded step; the last one,
at the result, makes the product along every path exp(tilt * r(x0)), so that weighted particles follow the base law
tilted by it, exactly as K grows.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from visalign.names import unknown_name
from visalign.search.chain import Chain
from visalign.search.records import Event

from .particles import Particles, affordable, check_options, choose, maybe_resample, start
from .resampling import effective_sample_size, soft_mean

REFERENCE_LARGEST = math.log(1e10)  # to which the published code clamps a weight

# Potentials: (rewards, memory, tilt), (K,) each and a number, to log G and the next memory, (K,) ----------------------


def max_potential(rewards: Tensor, memory: Tensor, tilt: float) -> tuple[Tensor, Tensor]:
    """log G = tilt * m, m the largest reward of the path so far. Keeps m, from -inf."""
    largest = torch.maximum(rewards, memory)
    return tilt * largest, largest


def diff_potential(rewards: Tensor, memory: Tensor, tilt: float) -> tuple[Tensor, Tensor]:
    """log G = tilt * (reward - the one before). Keeps the reward, from 0."""
    return tilt * (rewards - memory), rewards


def add_potential(rewards: Tensor, memory: Tensor, tilt: float) -> tuple[Tensor, Tensor]:
    """log G = tilt * the sum of the rewards of the path so far. Keeps the sum, from 0."""
    total = memory + rewards
    return tilt * total, total


def rt_potential(rewards: Tensor, memory: Tensor, tilt: float) -> tuple[Tensor, Tensor]:
    """log G = tilt * reward. Keeps nothing."""
    return tilt * rewards, memory


Potential = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
POTENTIALS: dict[str, tuple[Potential, float]] = {  # with what is kept at first
    "max": (max_potential, -math.inf),
    "diff": (diff_potential, 0.0),
    "add": (add_potential, 0.0),
    "rt": (rt_potential, 0.0),
}

# Steering -------------------------------------------------------------------------------------------------------------


def fk(
    chain: Chain,
    *,
    particles: int | None = None,
    tilt: float = 10.0,
    potential: str = "max",
    ess_threshold: float = 0.5,
    adaptive: bool = True,
    resampling: str = "systematic",
    start_step: int | None = None,
    every: int | None = None,
    end_step: int | None = None,
    lag: int = 0,
    value_samples: int = 0,
    compat: bool = False,
    output: str = "best",
) -> Iterator[Event]:
    """Feynman-Kac steering (Singhal et al. 2025). Particle k is entity k; an event for each scheduled step.

    Args:
        particles: K (published: 4); None: as many as the budget holds.
        tilt: lambda, in units of 1 / reward; 0 is plain sampling.
        potential: one of POTENTIALS.
        ess_threshold, adaptive: resample where the effective sample size is below threshold * K; not adaptive: at
            every scheduled step.
        resampling: one of SCHEMES.
        start_step, every, end_step: the rewarded steps, start, start + every, ... <= end; None: 0.2 T, 0.2 T and 0.8 T,
            as published. The result is always rewarded. Step i is rewarded at x_i, so step 0 at pure noise.
        lag: 0: particles are weighted before the step; 1: after it, by the same reward, as published.
        value_samples: 0: the reward of the estimate of x0; n: (1/tilt) log mean exp(tilt r) of n results finished from
            each particle, which cost n (T - 1 - i) predictions a particle, and count as results.
        compat: reproduce the published code, faults included: weights that are not resampled by are dropped (under
            "diff" that part of the reward is lost), the last weight is of the kept maximum or sum and is resampled by
            only if uneven, the maximum starts at 0, weights are at most 1e10. With lag=1, resampling="multinomial".
        output: which particles are `chosen` at the end, see `choose`.

    Raises:
        ValueError: an option that cannot work, or more particles than the budget holds; before anything is spent.
    """
    steps = rewarded_steps(chain.num_steps, start_step, every, end_step)
    check_options(tilt, ess_threshold, resampling, output)
    if potential not in POTENTIALS:
        raise unknown_name("potential", potential, POTENTIALS)
    if lag not in (0, 1):
        raise ValueError(f"lag: got {lag}, expected 0 or 1")
    if value_samples < 0:
        raise ValueError(f"value_samples: got {value_samples}, expected >= 0")
    count = affordable(chain, particles, fk_nfe(chain.num_steps, steps, value_samples))
    log_potential, memory = POTENTIALS[potential]
    cloud = start(chain, count, 0.0 if compat else memory)
    gate = (resampling, ess_threshold, adaptive)

    def weigh(cloud: Particles, i: int) -> Particles:
        log_g, memory = log_potential(cloud.rewards, cloud.memory, tilt)
        if compat:
            return _reference_weigh(replace(cloud, memory=memory), chain, i, log_g, gate)
        log_weights, applied = cloud.log_weights + log_g, cloud.applied + log_g
        return maybe_resample(replace(cloud, log_weights=log_weights, applied=applied, memory=memory), chain, i, *gate)

    for i in range(chain.num_steps):
        cloud = replace(cloud, prediction=chain.predict(cloud.latents, i))
        if i in steps:
            cloud = replace(cloud, rewards=_values(chain, cloud, i, tilt, value_samples))
            cloud = cloud if lag else weigh(cloud, i)
        gaussian, _ = cloud.kernel(chain, i)
        cloud = replace(cloud, latents=chain.draw(gaussian, i, range(count)), prediction=None)
        cloud = weigh(cloud, i) if lag and i in steps else cloud
        if i in steps:
            yield chain.event(cloud, f"step {i}: effective sample size {cloud.ess[-1]:.1f} of {count}")
    cloud = replace(cloud, rewards=chain.result(cloud.latents, range(count)))
    if compat:
        cloud = _reference_end(cloud, chain, potential, tilt, gate)
    else:
        cloud = replace(cloud, log_weights=cloud.log_weights + tilt * cloud.rewards - cloud.applied)
        cloud = replace(cloud, ess=(*cloud.ess, effective_sample_size(cloud.log_weights)))
    cloud = choose(cloud, chain, output, resampling)
    yield chain.event(cloud, f"finished: {cloud.unique_ancestors} ancestors, resampled {cloud.resamples} times")


def rewarded_steps(num_steps: int, first: int | None, every: int | None, end: int | None) -> range:
    """first, first + every, ... <= end; None: a fifth, a fifth and four fifths of the steps.

    Raises:
        ValueError: outside of 0 <= first, every >= 1, end <= T - 1; or a first given past the end.
    """
    fifth = max(1, round(0.2 * num_steps))
    start, every, end = (
        fifth if first is None else first,
        fifth if every is None else every,
        min(4 * num_steps // 5, num_steps - 1) if end is None else end,
    )
    if start < 0:
        raise ValueError(f"start_step: got {start}, expected >= 0")
    if every < 1:
        raise ValueError(f"every: got {every}, expected >= 1")
    if not end < num_steps:
        raise ValueError(f"end_step: got {end}, expected <= {num_steps - 1}, the last step")
    if first is not None and first > end:
        raise ValueError(f"start_step: got {first}, expected <= {end} (end_step)")
    return range(start, end + 1, every)


def fk_nfe(num_steps: int, steps: range, value_samples: int = 0) -> int:
    """Guided predictions a particle: T, and those of the results that are finished to value it on the way."""
    return num_steps + sum(value_samples * (num_steps - 1 - i) for i in steps)


def fk_least(num_steps: int, options: dict[str, Any]) -> int:
    """Guided predictions of the smallest run of `fk`: all its particles, or one if they follow from the budget."""
    steps = rewarded_steps(num_steps, *(options.get(name) for name in ("start_step", "every", "end_step")))
    count = options.get("particles")
    return (1 if count is None else count) * fk_nfe(num_steps, steps, options.get("value_samples", 0))


def _values(chain: Chain, cloud: Particles, step_index: int, tilt: float, samples: int) -> Tensor:
    """The reward (K,) that the particles of a step stand for: of the estimate of x0, or of results finished from it."""
    gaussian, denoised = cloud.kernel(chain, step_index)
    if not samples:
        return chain.value(denoised)
    samples = samples if any(chain.stds[step_index:]) else 1  # without noise they are copies
    rows = torch.arange(cloud.size).repeat_interleave(samples)
    first = cloud.size + step_index * len(rows)  # after the particles' own entities
    entities = range(first, first + len(rows))
    states = chain.draw(gaussian.take(rows.to(gaussian.mean.device)), step_index, entities)
    results = chain.finish(states, step_index + 1, entities)
    return soft_mean(chain.result(results, entities).view(cloud.size, samples), tilt)


def _reference_weigh(
    cloud: Particles, chain: Chain, step_index: int, log_g: Tensor, gate: tuple[str, float, bool]
) -> Particles:
    """As the published code: weights that are not resampled by are dropped, what the potential keeps is not."""
    log_weights = log_g.clamp(max=REFERENCE_LARGEST)
    weighed = replace(cloud, log_weights=log_weights, applied=cloud.applied + log_weights)
    weighed = maybe_resample(weighed, chain, step_index, *gate)
    if weighed.resamples > cloud.resamples:
        return weighed
    return replace(weighed, log_weights=torch.zeros_like(log_weights), applied=cloud.applied)


def _reference_end(
    cloud: Particles, chain: Chain, potential: str, tilt: float, gate: tuple[str, float, bool]
) -> Particles:
    """As the published code: the potential once more instead of the reward's own weight, and only if uneven."""
    log_g, _ = POTENTIALS[potential][0](cloud.rewards, cloud.memory, tilt)
    log_g = log_g if potential == "diff" else log_g - cloud.applied
    return _reference_weigh(cloud, chain, chain.num_steps, log_g, (gate[0], gate[1], True))
