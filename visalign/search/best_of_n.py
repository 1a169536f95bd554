"""Best of N: draw N results and keep the best. The control of every search, and of every training."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.special import gammaln
from torch import Tensor

from .chain import Chain
from .records import Event


@dataclass
class Pool:
    """Independent draws from the base: their rewards in order, and their final latents (on the CPU) if kept."""

    rewards: list[float] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)


def best_of_n(chain: Chain, *, keep_latents: bool = False) -> Iterator[Event]:
    """N = max_nfe / T independent results; sample i is entity i. Anytime; works with any kernel.

    Args:
        keep_latents: keep all final latents, for weighting them (`snis_weights`).
    """
    pool = Pool()
    while count := min(chain.batch_size, chain.ledger.left // chain.num_steps):
        entities = range(len(pool.rewards), len(pool.rewards) + count)
        starts = chain.initial(entities)
        final = chain.finish(starts, 0, entities)
        pool.rewards += chain.result(final, entities, starts).tolist()
        if keep_latents:
            pool.latents += list(final.cpu().split(1))
        yield chain.event(pool, f"{len(pool.rewards)} drawn")


def expected_best(rewards: Sequence[float], n: int, scores: Sequence[float] | None = None) -> float:
    """The mean best of n draws, from a pool of N >= n, without bias: sum_i C(i - 1, n - 1) / C(N, n) r_(i).

    r_(1) <= ... <= r_(N); the whole curve over n costs one pool. With `scores` of the same draws by something else, the
    mean of these at the draw that the rewards like best.
    """
    order = np.argsort(np.asarray(rewards, float), kind="stable")
    ordered = np.asarray(rewards if scores is None else scores, float)[order]
    if not 1 <= n <= len(ordered):
        raise ValueError(f"n: got {n}, expected 1 .. {len(ordered)}, the pool's size")
    i = np.arange(n, len(ordered) + 1)
    weights = np.exp(_log_binomial(i - 1, n - 1) - _log_binomial(len(ordered), n))
    return float(weights @ ordered[n - 1 :])


def best_of_n_kl(n: int) -> float:
    """KL divergence of the best of n from the base, log n - (n - 1) / n, for a continuous reward: how hard it pulls."""
    if n < 1:
        raise ValueError(f"n: got {n}, expected >= 1")
    return math.log(n) - (n - 1) / n


def snis_weights(rewards: Sequence[float] | Tensor, tilt: float) -> Tensor:
    """Self-normalised importance weights softmax(tilt * r), (N,) float64: the tilted law from draws of the base.

    What every sampler of that law is measured against.
    """
    return torch.softmax(tilt * torch.as_tensor(rewards, dtype=torch.float64), 0)


def _log_binomial(n: np.ndarray | int, k: int) -> np.ndarray:
    return gammaln(n + 1.0) - gammaln(k + 1.0) - gammaln(np.asarray(n) - k + 1.0)
