"""How near a weighted set of digits is to a law, and how diverse it is.

A set is pictures with weights (N,) that sum to 1 (None: all equal). Every measure is of that discrete law as it is, so
that repeated pictures count as a heavier one, and is in float64.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from visalign.rewards.groups.sets import frechet_distance

from .network import CLASSES, DigitClassifier, to_grey

Moments = tuple[Tensor, Tensor]


def normalised(weights: Tensor | None, count: int) -> Tensor:
    """Weights (N,) float64 that sum to 1; None: all equal.

    Raises:
        ValueError: another number of them, negative ones, or a sum that is not positive.
    """
    if weights is None:
        return torch.full((count,), 1 / count, dtype=torch.float64)
    weights = weights.detach().double().cpu()
    if weights.shape != (count,) or not bool((weights >= 0).all()) or not 0 < float(weights.sum()) < float("inf"):
        raise ValueError(f"weights: got shape {tuple(weights.shape)}, expected ({count},), >= 0 and not all 0")
    return weights / weights.sum()


def weighted_moments(features: Tensor, weights: Tensor | None = None) -> Moments:
    """Mean (D,) and covariance (D, D) of the discrete law of features (N, D), whose divisor is N for equal weights."""
    weights, features = normalised(weights, len(features)), features.detach().double().cpu()
    mean = weights @ features
    centred = features - mean
    return mean, centred.T @ (weights[:, None] * centred)


def frechet(features: Tensor, weights: Tensor | None, reference: Moments) -> float:
    """Frechet distance |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of a set's moments to the reference's.

    Heusel et al. 2017, arXiv:1706.08500. Few samples lie far from any law, their own included: compare equal numbers.
    """
    return float(frechet_distance(weighted_moments(features, weights), reference))


def class_shares(digits: Tensor, weights: Tensor | None = None) -> Tensor:
    """Share (10,) of each digit in a set of digits (N,)."""
    shares = torch.zeros(CLASSES, dtype=torch.float64)
    return shares.index_add(0, digits.cpu(), normalised(weights, len(digits)))


def entropy(shares: Tensor) -> float:
    """- sum p log p, in nats: 0 for one class, log k for k even ones."""
    return max(0.0, float(-torch.special.xlogy(shares, shares).sum()))  # 1 log 1 may round below 0


def mean_distance(points: Tensor, weights: Tensor | None = None) -> float:
    """Mean Euclidean distance of two independent draws from the set of points (N, D); 0 if it is one picture."""
    weights, points = normalised(weights, len(points)), points.detach().double().cpu()
    positive = weights > 0
    weights, points = weights[positive], points[positive]
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    return float(weights @ distances @ weights)


def effective_size(weights: Tensor | None, count: int) -> float:
    """1 / sum w^2, within [1, N]."""
    return float(1 / normalised(weights, count).square().sum())


@dataclass(frozen=True)
class Seen:
    """Pictures as a classifier sees them.

    Attributes:
        features: (N, 32).
        digits: (N,), the likeliest.
        confidence: (N,), the probability of it.
        pixels: (N, 64), in [0, 1].
    """

    features: Tensor
    digits: Tensor
    confidence: Tensor
    pixels: Tensor


@torch.no_grad()
def look(judge: DigitClassifier, images: Tensor) -> Seen:
    """images: (N, 3, H, W), or grey (N, 1, 8, 8), in [0, 1]."""
    grey = (to_grey(images) if images.shape[1] == 3 else images).cpu()
    parts = grey.split(4096)
    features = torch.cat([judge.features(part) for part in parts])
    probabilities = judge.head(features).softmax(1)
    return Seen(features, probabilities.argmax(1), probabilities.amax(1), grey.flatten(1))


def measure(seen: Seen, weights: Tensor | None, wanted: tuple[int, ...], references: dict[str, Moments]) -> dict:
    """A set against references by name: "frechet_NAME" of each, "accuracy" (the share of the wanted digits by the
    judge), "entropy" of the digits, "distance" of two draws in pixels, and "effective" size.
    """
    shares = class_shares(seen.digits, weights)
    return {
        **{f"frechet_{name}": frechet(seen.features, weights, moments) for name, moments in references.items()},
        "accuracy": min(1.0, float(shares[list(wanted)].sum())),
        "entropy": entropy(shares),
        "distance": mean_distance(seen.pixels, weights),
        "effective": effective_size(weights, len(seen.digits)),
    }
