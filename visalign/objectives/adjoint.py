"""Adjoint matching (Domingo-Enrich et al. 2024, arXiv:2409.08861): a regression whose optimum is p_base exp(lambda r).

One formula serves flows and diffusions: with mean_k(x) the base model's mean of the sampler's next state,
a_k = (d mean_k / dx)^T a_{k+1}, a_K = -lambda grad r, and the control (mean_theta - mean_base) / std_k shall be
-std_k a. With the memoryless flow's mean this is the paper's a - h (2 J^T a + kappa a) and, divided by h, its loss.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def lean_adjoints(
    states: Mapping[int, Tensor], terminal: Tensor, mean: Callable[[int, Tensor], Tensor]
) -> dict[int, Tensor]:
    """The adjoints of a trajectory, by one vector-Jacobian product a step, last step first; none is chained in memory.

    Args:
        states: {step: x_k (N, ...)}, of every step 0 .. K-1.
        terminal: a_K (N, ...).
        mean: (step, x_k) to the *base* model's mean of the next state, with gradient to x_k.

    Returns:
        {step: a_k} of the steps 0 .. K; a_K is `terminal`. Nothing carries gradient.
    """
    count = len(states)
    if sorted(states) != list(range(count)):
        raise ValueError(f"states: got those of steps {sorted(states)}, expected every step 0 .. {count - 1}")
    adjoints = {count: terminal.detach()}
    for k in reversed(range(count)):
        with torch.enable_grad():
            x = states[k].detach().requires_grad_()
            (adjoint,) = torch.autograd.grad(mean(k, x), x, adjoints[k + 1])
        adjoints[k] = adjoint.detach()
    return adjoints


def adjoint_matching_loss(mean: Tensor, base_mean: Tensor, std: float, adjoint: Tensor) -> Tensor:
    """|| (mean - base_mean) / std + std a ||^2 of each sample, (N,), summed over the latents' dimensions; >= 0.

    Args:
        mean: (N, ...), of the next state, with the gradient of the weights.
        base_mean, adjoint: (N, ...), constants.
        std: of the step's noise, > 0.
    """
    if not std > 0:
        raise ValueError(f"std: got {std}, expected > 0 (a step without noise cannot be controlled)")
    return ((mean - base_mean.detach()) / std + std * adjoint.detach()).square().flatten(1).sum(1)


def smoothed_gradient(gradients: Tensor, quantile: float = 0.85) -> Tensor:
    """Mean over copies (C, N, ...) of a reward's gradient, each copy's norm clipped at this quantile of the copies'."""
    norms = gradients.flatten(2).norm(dim=2)  # (C, N)
    limit = norms.quantile(quantile, dim=0)
    scale = (limit / norms.clamp(min=1e-12)).clamp(max=1.0)
    return (gradients * scale.view(*scale.shape, *[1] * (gradients.dim() - 2))).mean(0)


def matched_steps(noisy: list[int], generator: torch.Generator, share: float = 0.25) -> list[int]:
    """Which of the stochastic steps are trained: the last `share` of them always, and as many of the others at random.

    Quoted of the paper; its code takes half from the first 60 % and half from the last 40 %. At least one of each.
    """
    count = max(1, round(share * len(noisy)))
    first, last = noisy[:-count], noisy[-count:]
    chosen = torch.randperm(len(first), generator=generator)[: max(1, round(share * len(first)))].tolist()
    return sorted([first[k] for k in chosen] + last)
