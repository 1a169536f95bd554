"""Scores of sets: distance to exemplars, diversity, each sample's share in either, DRAGON's better and worse sets."""

from collections.abc import Callable

import torch
from torch import Tensor


def moments(features: Tensor, shrinkage: float = 0.0) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D), divisor n - 1, in float64.

    With fewer samples than dimensions the covariance is singular; `shrinkage` rho in [0, 1] mixes in a round one:
    (1 - rho) C + rho tr(C) / D I (own choice).
    """
    features = _checked(features, 2).double()
    if not 0 <= shrinkage <= 1:
        raise ValueError(f"shrinkage: got {shrinkage}, expected between 0 and 1")
    mean = features.mean(dim=0)
    centred = features - mean
    covariance = centred.T @ centred / (len(features) - 1)
    size = len(covariance)
    eye = torch.eye(size, dtype=torch.float64, device=features.device)
    return mean, (1 - shrinkage) * covariance + shrinkage * covariance.trace() / size * eye


def frechet_distance(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], eps: float = 0.0) -> Tensor:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), (), at least 0: Heusel et al. 2017, arXiv:1706.08500.

    The root's trace is the sum of the roots of the eigenvalues of C2^(1/2) C1 C2^(1/2), which is symmetric: always
    real, and differentiable. The gradient reaches the first set only.

    Args:
        first, second: means and covariances as `moments` gives them.
        eps: added to the diagonals of both.
    """
    (m1, c1), (m2, c2) = first, (second[0].detach(), second[1].detach())
    if c1.shape != c2.shape:
        raise ValueError(f"second: got {len(c2)} features, expected {len(c1)}, as first")
    eye = eps * torch.eye(len(c1), dtype=c1.dtype, device=c1.device)
    c1, c2 = c1 + eye, c2.to(c1) + eye
    values, vectors = torch.linalg.eigh(c2)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root @ c1 @ root
    mixed = torch.linalg.eigvalsh((product + product.T) / 2)
    mixed = mixed[mixed > 1e-15 * mixed.detach().abs().amax()]  # the root's slope at 0 is infinite
    return ((m1 - m2.to(m1)) ** 2).sum() + c1.trace() + c2.trace() - 2 * mixed.sqrt().sum()


def kernel_distance(first: Tensor, second: Tensor) -> Tensor:
    """Unbiased squared MMD of features (n, D) and (m, D), kernel (x.y / D + 1)^3: KID, arXiv:1801.01401.

    May be slightly negative; wants fewer samples than `frechet_distance`.
    """
    first, second = _checked(first, 2).double(), _checked(second, 2).double()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: Tensor) -> Tensor:
        table = kernel(x, x)
        return (table.sum() - table.trace()) / (len(x) * (len(x) - 1))

    return within(first) + within(second) - 2 * kernel(first, second).mean()


def vendi_score(features: Tensor, order: float = 1.0, weights: Tensor | None = None) -> Tensor:
    """Effective number of different samples, (), in [1, n]: Friedman and Dieng 2022, arXiv:2210.02410.

    exp of the Renyi entropy of order q of the eigenvalues of K / n, K the cosines; 1 is Shannon's, infinity the inverse
    of the largest. With more samples than dimensions the eigenvalues are those of X^T X / n. Differentiable.

    Args:
        features: (n, D), not zero.
        order: q >= 0; large orders hear the common samples more.
        weights: (n,) of the samples, summing to 1; None: all equal.
    """
    x = torch.nn.functional.normalize(_checked(features, 1).double(), dim=1)
    if not order >= 0:
        raise ValueError(f"order: got {order}, expected >= 0")
    share = x.new_full((len(x),), 1 / len(x)) if weights is None else weights.to(x)
    x = x * share.sqrt()[:, None]
    values = torch.linalg.eigvalsh(x @ x.T if x.shape[0] <= x.shape[1] else x.T @ x)
    values = values[values > 1e-12]
    if order == 1:
        return (-(values * values.log()).sum()).exp()
    if order == float("inf"):
        return 1 / values.amax()
    return ((values**order).sum().log() / (1 - order)).exp()


def leave_one_out(score: Callable[[Tensor], Tensor], features: Tensor) -> tuple[Tensor, Tensor]:
    """A set's score, (), and each member's share in it, (n,): n (r(S) - r(S without i)) (own choice)."""
    whole, places = score(features), torch.arange(len(features), device=features.device)
    return whole, len(features) * torch.stack([whole - score(features[places != i]) for i in range(len(features))])


def split_by_score(first: Tensor, second: Tensor) -> Tensor:
    """DRAGON's pairs for a reward of single samples: (n,) bool, True where the second goes to the better set D+."""
    return second > first


def split_by_set_score(
    first: Tensor,
    second: Tensor,
    score: Callable[[Tensor], Tensor],
    generator: torch.Generator,
    gap: bool = False,
    sweeps: int = 10,
) -> Tensor:
    """DRAGON's better and worse set D+ and D- for a reward of sets (arXiv:2504.15217); the algorithm is reconstructed.

    Starts from the better of the two sets as D+ and swaps pairs, in random order, wherever that raises the objective,
    until a sweep swaps none. So r(D+) is at least that of either set, and each pair gives one sample to each side.

    Args:
        first, second: features (n, D) of two samples of each of n prompts.
        score: of a set's features (n, D), a number; higher is better.
        gap: raise r(D+) - r(D-) instead of r(D+).
        sweeps: at most.

    Returns:
        (n,) bool: True where the second of a pair goes to D+.
    """
    if first.shape != second.shape:
        raise ValueError(f"second: got shape {tuple(second.shape)}, expected {tuple(first.shape)}, as first")

    def value(swap: Tensor) -> float:
        better = float(score(torch.where(swap[:, None], second, first)))
        return better - float(score(torch.where(swap[:, None], first, second))) if gap else better

    with torch.no_grad():
        swap = torch.full((len(first),), bool(score(second) > score(first)), device=first.device)
        best = value(swap)
        for _ in range(sweeps):
            before = best
            for k in torch.randperm(len(first), generator=generator).tolist():
                swap[k] = ~swap[k]
                trial = value(swap)
                if trial > best:
                    best = trial
                else:
                    swap[k] = ~swap[k]
            if best == before:
                break
    return swap


def _checked(features: Tensor, least: int) -> Tensor:
    if features.ndim != 2 or len(features) < least:
        raise ValueError(f"features: got shape {tuple(features.shape)}, expected (n, D) with n >= {least}")
    return features
