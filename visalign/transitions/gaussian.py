"""One step of a sampler as a Gaussian over the next latents: sample, log-probability, KL."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["mean", "sum"]


def at_least_float32(tensor: Tensor) -> Tensor:
    """float32 from narrower types; float64 is kept. Sampler maths in bfloat16 rounds the mean away."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def per_sample(values: Tensor, reduction: Reduction) -> Tensor:
    """(N, ...) to (N,): mean or sum over all but the batch dimension.

    The mean is what the published policy-gradient code uses: its log-ratio is 1/D of the joint one, which is why
    clip ranges there are 1e-4 and less. Never mix mean- and sum-reduced terms in one loss.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction: got {reduction!r}, expected 'mean' or 'sum'")
    flat = values.flatten(1)
    return flat.mean(dim=1) if reduction == "mean" else flat.sum(dim=1)


@dataclass(frozen=True)
class Gaussian:
    """N(mean, std^2 I), one step of a sampler.

    Attributes:
        mean: (N, ...), float32 or float64.
        std: broadcastable to mean, (N, 1, ...), same type; does not depend on the weights.
        deterministic: set by the maker when std is 0, so that nothing has to look at the values (no device sync).
    """

    mean: Tensor
    std: Tensor
    deterministic: bool = False

    @classmethod
    def of(cls, mean: Tensor, std: float) -> "Gaussian":
        """The Gaussian with one std, a Python number, for the whole batch."""
        shape = (mean.shape[0],) + (1,) * (mean.dim() - 1)
        return cls(mean, mean.new_full(shape, std), deterministic=std == 0)

    def take(self, rows: Tensor) -> "Gaussian":
        """Those of the samples at these places (K,), which may repeat: several draws from one."""
        return Gaussian(self.mean[rows], self.std[rows], self.deterministic)

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise, with standard normal noise shaped as mean. A deterministic step ignores the noise."""
        if self.deterministic:
            return self.mean
        return self.mean + self.std * noise

    def log_prob(self, x: Tensor, reduction: Reduction = "mean") -> Tensor:
        """log N(x; mean, std), constants included, (N,). Detach x: it is an action taken, not a function of the policy.

        Raises:
            ValueError: the step is deterministic and has no density.
        """
        self._needs_density("log_prob")
        x = _as(x, self.mean, "x")
        error = (x - self.mean) / self.std
        return per_sample(-0.5 * error**2 - self.std.log() - 0.5 * math.log(2 * math.pi), reduction)

    def kl(self, other: "Gaussian", reduction: Reduction = "mean") -> Tensor:
        """KL(self || other), (N,), for two Gaussians of the same std: (mean - other.mean)^2 / (2 std^2).

        Only this one's std is used: both must come from the same transition and step.

        Raises:
            ValueError: the step is deterministic.
        """
        self._needs_density("kl")
        return per_sample(((self.mean - _as(other.mean, self.mean, "other")) / self.std) ** 2 / 2, reduction)

    def _needs_density(self, what: str) -> None:
        if self.deterministic:
            raise ValueError(f"{what}: got a deterministic step (std 0), expected std > 0; choose a stochastic step")


def unscaled_log_prob(x: Tensor, mean: Tensor, reduction: Reduction = "mean") -> Tensor:
    """-(x - mean)^2 reduced to (N,): what the CPS code (arXiv:2509.05952) calls the log-probability.

    It lacks 1/(2 std^2) and the constants, so exp of a difference is not a likelihood ratio and each step is weighted
    by 2 std^2. For reproducing that work only; clip ranges differ by the same factor.
    """
    mean = at_least_float32(mean)
    return per_sample(-((_as(x, mean, "x") - mean) ** 2), reduction)


def _as(tensor: Tensor, like: Tensor, argument: str) -> Tensor:
    if tensor.shape != like.shape:
        raise ValueError(f"{argument}: got shape {tuple(tensor.shape)}, expected {tuple(like.shape)}, as the mean")
    return tensor.to(like.dtype)
