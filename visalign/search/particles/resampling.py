"""Which particles survive: weights in log space, the effective sample size, five schemes of resampling.

The schemes take normalised weights (K,), float64 on the CPU, and a generator; they return ancestors: indices (K,) whose
expected counts are K times the weights. See Doucet & Johansen 2009 for the family, Gerber, Chopin & Whiteley 2019
(arXiv:1708.02230) for the SSP one.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from visalign.names import unknown_name

ALL_EQUAL = 1e-9  # relative distance of the effective sample size from K below which weights count as equal


def normalized_weights(log_weights: Tensor) -> Tensor:
    """softmax of log-weights (K,), float64; uniform where all are -inf (every particle is impossible).

    Raises:
        ValueError: a log-weight is NaN or +inf.
    """
    log_weights = log_weights.double()
    if bool(torch.isnan(log_weights).any() | (log_weights == math.inf).any()):
        raise ValueError(f"log_weights: got {log_weights.tolist()}, expected numbers or -inf")
    if bool((log_weights == -math.inf).all()):
        return torch.full_like(log_weights, 1 / len(log_weights))
    return torch.softmax(log_weights, 0)


def effective_sample_size(log_weights: Tensor) -> float:
    """(sum w)^2 / sum w^2, in [1, K]: K for equal weights, 1 where one particle has them all."""
    return 1 / float(normalized_weights(log_weights).square().sum())


def log_mean_exp(values: Tensor, dim: int = 0) -> Tensor:
    """log of the mean of exp(values) over a dimension."""
    return torch.logsumexp(values, dim) - math.log(values.shape[dim])


def soft_mean(values: Tensor, tilt: float, dim: int = -1) -> Tensor:
    """(1 / tilt) log mean exp(tilt * values): the mean at tilt 0, rising to the maximum as tilt grows."""
    if tilt == 0:
        return values.mean(dim)
    return values.amax(dim) if tilt == math.inf else log_mean_exp(tilt * values, dim) / tilt


def multinomial(weights: Tensor, generator: torch.Generator) -> Tensor:
    """K independent draws."""
    return _invert(weights, _uniform(len(weights), generator))


def stratified(weights: Tensor, generator: torch.Generator) -> Tensor:
    """One draw from each K-th of the cumulative weights: points (u_i + i) / K."""
    size = len(weights)
    return _invert(weights, (_uniform(size, generator) + torch.arange(size)) / size)


def systematic(weights: Tensor, generator: torch.Generator) -> Tensor:
    """Points (u + i) / K with one u: each count is K times the weight, rounded down or up; equal weights: identity."""
    size = len(weights)
    return _invert(weights, (_uniform(1, generator) + torch.arange(size)) / size)


def residual(weights: Tensor, generator: torch.Generator) -> Tensor:
    """floor(K W) copies of each, the rest drawn independently by the remainders."""
    copies, remainders = _whole_and_rest(weights)
    copied = torch.arange(len(weights)).repeat_interleave(copies)
    missing = len(weights) - len(copied)
    if not missing:
        return copied
    rest = _invert(remainders / remainders.sum(), _uniform(missing, generator))
    return torch.cat([copied, rest]).sort().values


def ssp(weights: Tensor, generator: torch.Generator) -> Tensor:
    """Srinivasan sampling process: counts are K W rounded down or up, by pairwise exchange of the remainders.

    Two remainders p and q pass mass to each other until one of them is 0 or 1, in a direction drawn so that neither's
    expectation changes; the other goes on to the next (Gerber, Chopin & Whiteley 2019, section 3.4).
    """
    whole, remainders = _whole_and_rest(weights)
    counts, rest, draws = whole.tolist(), remainders.tolist(), _uniform(len(weights), generator).tolist()
    open_ = 0  # the one whose remainder is still between 0 and 1
    for other in range(1, len(rest)):
        p, q = rest[open_], rest[other]
        up, down = min(1 - p, q), min(p, 1 - q)  # what p may gain from q, and lose to it
        if up + down > 0:
            moved = up if draws[other] * (up + down) < down else -down
            p, q = p + moved, q - moved
        first_done = min(p, 1 - p) <= min(q, 1 - q)
        done, value = (open_, p) if first_done else (other, q)
        counts[done] += round(value)
        open_, rest[open_], rest[other] = (other if first_done else open_), p, q
    counts[open_] += len(rest) - sum(counts)  # the last remainder is 0 or 1: they sum to an integer
    return torch.arange(len(weights)).repeat_interleave(torch.tensor(counts))


SCHEMES: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    scheme.__name__: scheme for scheme in (multinomial, stratified, systematic, residual, ssp)
}


def resample(log_weights: Tensor, scheme: str = "systematic", *, generator: torch.Generator) -> Tensor:
    """Ancestors (K,) by one of SCHEMES; equal weights are left alone: the identity, whatever the scheme."""
    check_scheme(scheme)
    weights = normalized_weights(log_weights).cpu()
    if effective_sample_size(log_weights) >= len(weights) * (1 - ALL_EQUAL):
        return torch.arange(len(weights))
    return SCHEMES[scheme](weights, generator)


def too_uneven(log_weights: Tensor, threshold: float, adaptive: bool = True) -> bool:
    """Whether to resample: the effective sample size is below threshold * K; not adaptive: weights differ at all."""
    size = len(log_weights)
    bound = threshold * size if adaptive else math.inf
    return effective_sample_size(log_weights) < min(bound, size * (1 - ALL_EQUAL))


def check_scheme(scheme: str) -> None:
    """Raise a ValueError unless it is one of SCHEMES."""
    if scheme not in SCHEMES:
        raise unknown_name("resampling", scheme, SCHEMES)


def _uniform(count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator, dtype=torch.float64)


def _invert(weights: Tensor, points: Tensor) -> Tensor:
    """The first index whose cumulative weight exceeds each point of [0, 1); one of no weight is never found."""
    cumulative = weights.cumsum(0)
    return torch.searchsorted(cumulative / cumulative[-1], points.clamp(max=1 - 2**-53), right=True)


def _whole_and_rest(weights: Tensor) -> tuple[Tensor, Tensor]:
    """K W as whole numbers (int64) and remainders in [0, 1); what rounding alone keeps off a whole number is one."""
    expected = len(weights) * weights
    whole = (expected + 1e-9).floor()
    return whole.long(), (expected - whole).clamp(min=0)
