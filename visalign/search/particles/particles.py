"""Particles: states that move together, with weights, and are resampled with all that belongs to them.

What Feynman-Kac steering and the twisted samplers share.
"""

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from visalign.names import unknown_name
from visalign.search.chain import Chain
from visalign.search.records import Role
from visalign.transitions import Gaussian

from .resampling import check_scheme, effective_sample_size, log_mean_exp, normalized_weights, resample, too_uneven

OUTPUTS = ("best", "weighted", "resampled", "heaviest")


@dataclass(frozen=True)
class Particles:
    """K particles. Every tensor has a row for each, and `take` gathers them all; numbers are of the whole.

    Attributes:
        latents: (K, ...).
        log_weights: (K,), float64 on the CPU like all (K,) here; unnormalised.
        rewards: (K,), latest: of estimates of x0 on the way, of the results at the end.
        ancestors: (K,), int64: the initial noise that each comes from.
        applied: (K,), the log-potentials along each path, summed.
        memory: (K,), what the potential remembers of each path.
        prediction: (K, ...), of the denoiser, during a step.
        gradient: (K, ...), of the potential by the latents, during a step of a twisted sampler.
        ess: the effective sample size at each scheduled step, and at the results.
        resamples: how many times they were resampled.
        log_evidence: of the weights spent in resampling; see `log_z`.
        chosen: at the end, the rows that are the output (they may repeat).
    """

    latents: Tensor
    log_weights: Tensor
    rewards: Tensor
    ancestors: Tensor
    applied: Tensor
    memory: Tensor
    prediction: Tensor | None = None
    gradient: Tensor | None = None
    ess: tuple[float, ...] = ()
    resamples: int = 0
    log_evidence: float = 0.0
    chosen: tuple[int, ...] = ()

    def take(self, indices: Tensor) -> "Particles":
        """Those at these places (K,), which may repeat, with all that belongs to them."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **{name: rows[indices.to(rows.device)] for name, rows in tensors.items()})

    def kernel(self, chain: Chain, step_index: int) -> tuple[Gaussian, Tensor]:
        """The Gaussian over their next latents, and the estimate of x0 (K, ...), from their prediction."""
        assert self.prediction is not None
        return chain.kernel(self.latents, step_index, self.prediction)

    @property
    def size(self) -> int:
        """K."""
        return len(self.log_weights)

    @property
    def weights(self) -> Tensor:
        """(K,), normalised."""
        return normalized_weights(self.log_weights)

    @property
    def unique_ancestors(self) -> int:
        """How many of the initial noises have a descendant."""
        return len(self.ancestors.unique())

    @property
    def log_z(self) -> float:
        """log of the estimate of Z = E[exp(tilt r(x0))] over the base, at the end; exp of it is without bias."""
        return self.log_evidence + float(log_mean_exp(self.log_weights))


def start(chain: Chain, count: int, memory: float = 0.0) -> Particles:
    """The first particles: entities 0 .. K-1 at their initial noise."""
    zeros = torch.zeros(count, dtype=torch.float64)
    return Particles(chain.initial(range(count)), zeros, zeros, torch.arange(count), zeros, zeros + memory)


def maybe_resample(
    particles: Particles, chain: Chain, step_index: int, scheme: str, threshold: float, adaptive: bool
) -> Particles:
    """Note the effective sample size; resample, with all that belongs to them, where the weights are too uneven.

    Otherwise the weights are carried on.
    """
    log_weights = particles.log_weights
    particles = replace(particles, ess=(*particles.ess, effective_sample_size(log_weights)))
    if not too_uneven(log_weights, threshold, adaptive):
        return particles
    survivors = particles.take(resample(log_weights, scheme, generator=chain.random(Role.RESAMPLE, 0, step_index)))
    return replace(
        survivors,
        log_weights=torch.zeros_like(log_weights),
        log_evidence=particles.log_evidence + float(log_mean_exp(log_weights)),
        resamples=particles.resamples + 1,
    )


def choose(particles: Particles, chain: Chain, output: str, scheme: str) -> Particles:
    """Say which of the finished particles are the output.

    The "best" by reward, all "weighted", a "resampled" set of equal weights, or the "heaviest".
    """
    if output == "best":
        chosen = [int(particles.rewards.argmax())]
    elif output == "heaviest":
        chosen = [int(particles.log_weights.argmax())]
    elif output == "weighted":
        chosen = list(range(particles.size))
    else:
        generator = chain.random(Role.RESAMPLE, 1, chain.num_steps)
        chosen = resample(particles.log_weights, scheme, generator=generator).tolist()
    return replace(particles, chosen=tuple(chosen))


def check_options(tilt: float, ess_threshold: float, resampling: str, output: str) -> None:
    """Raise a ValueError where an option that all samplers of particles share cannot work."""
    if not 0 <= tilt < math.inf:
        raise ValueError(f"tilt: got {tilt}, expected a finite number >= 0")
    if not 0 < ess_threshold <= 1:
        raise ValueError(f"ess_threshold: got {ess_threshold}, expected within (0, 1], a share of the particles")
    check_scheme(resampling)
    if output not in OUTPUTS:
        raise unknown_name("output", output, OUTPUTS)


def affordable(chain: Chain, particles: int | None, nfe: int) -> int:
    """K, where a particle costs `nfe` guided predictions; None: as many as are left to pay for.

    Raises:
        ValueError: none, or more than the budget holds, or None without a budget.
    """
    most = chain.ledger.left // nfe
    if particles is None and chain.ledger.max_nfe is None:
        raise ValueError("particles: got None without a budget, expected a number")
    count = most if particles is None else particles
    if not 1 <= count <= most:
        raise ValueError(f"particles: got {particles}, expected 1 .. {most}, at {nfe} denoiser calls each")
    return count
