"""Best of N: draw N results and keep the best. The control of every search, and of every training."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.special import gammaln
from scipy.stats import rankdata
from torch import Tensor

from visalign.rewards import CombinedReward

from .chain import Chain
from .records import Best, Event


@dataclass
class Pool:
    """Independent draws from the base, in order.

    Attributes:
        rewards: of each.
        latents: their final ones, (1, ...) on the CPU, if kept.
        scores: (K, N), of each reward of an ensemble.
        chosen: the ensemble's best.
    """

    rewards: list[float] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)
    scores: Tensor | None = None
    chosen: Best | None = None


def best_of_n(chain: Chain, *, ensemble: bool = False, keep_latents: bool = False) -> Iterator[Event]:
    """N = max_nfe / T independent results; sample i is entity i. Anytime; works with any kernel.

    Args:
        ensemble: the best is not that of the largest sum of a combined reward, but of the least mean rank under its
            members, whatever their scales and weights (Ma et al. 2025, arXiv:2501.09732). Its reward, the sum, may
            then fall from one event to the next.
        keep_latents: keep all final latents, for weighting them (`snis_weights`).

    Raises:
        ValueError: ensemble with a single reward.
    """
    pool, directions = Pool(), _directions(chain) if ensemble else None
    while count := min(chain.batch_size, chain.ledger.left // chain.num_steps):
        entities = range(len(pool.rewards), len(pool.rewards) + count)
        starts = chain.initial(entities)
        final = chain.finish(starts, 0, entities)
        pool.rewards += chain.result(final, entities, starts).tolist()
        if keep_latents or ensemble:
            pool.latents += list(final.cpu().split(1))
        if directions is not None:
            scores = directions * torch.cat(chain.member_scores, 1)
            pool.scores = scores if pool.scores is None else torch.cat([pool.scores, scores], 1)
            chain.best = pool.chosen = _of_least_rank(chain, pool, final.device)
        yield chain.event(pool, f"{len(pool.rewards)} drawn")


def mean_rank(scores: Tensor) -> Tensor:
    """Candidates by several verifiers, (V, N) to (N,): the unweighted mean of their ranks, 1 for the best; ties share.

    Scales do not matter, so neither verifier drowns the others. The least mean rank is the choice of the ensemble.
    """
    return torch.as_tensor(rankdata(-scores.double().cpu().numpy(), axis=1)).mean(0)


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


def _directions(chain: Chain) -> Tensor:
    """1 or -1, (K, 1), for the members of the reward: whether more of it is better."""
    weights = [m.weight for m in chain.reward.used] if isinstance(chain.reward, CombinedReward) else []
    if len(weights) < 2 or 0 in weights:
        raise ValueError(
            f"ensemble: got reward {chain.reward.name!r}, expected at least two, all with a weight, such as "
            "'clip:1+aesthetic:1'"
        )
    return torch.tensor(weights, dtype=torch.float64).sign()[:, None]


def _of_least_rank(chain: Chain, pool: Pool, device: torch.device) -> Best:
    """The best of the pool by its members' ranks, the first of equals; decoded once more if it was passed over."""
    assert pool.scores is not None and chain.images is not None
    k = int(mean_rank(pool.scores).argmin())
    if pool.chosen is not None and pool.chosen.entity == k:
        return pool.chosen
    latents, latest = pool.latents[k].to(device), k - len(pool.rewards)  # from the end, as the latest images are
    image = chain.images[latest:][:1] if -latest <= len(chain.images) else chain.picture(latents)
    return Best(pool.rewards[k], latents, image.clone(), k, chain.initial([k]))


def _log_binomial(n: np.ndarray | int, k: int) -> np.ndarray:
    return gammaln(n + 1.0) - gammaln(k + 1.0) - gammaln(np.asarray(n) - k + 1.0)
