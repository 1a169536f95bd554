"""REBEL: regression of relative rewards by the policy's own log-ratios, on pairs of samples of one prompt."""

import torch
from torch import Tensor


def rebel_residuals(log_ratios: Tensor, advantages: Tensor, scale: float = 1.0) -> Tensor:
    """scale * (sum_t dlogp(y) - sum_t dlogp(y')) - (A(y) - A(y')), (N / 2,), for the pairs (0, 1), (2, 3), ...

    REBEL (Gao et al. 2024, arXiv:2404.16767) as RLCM (arXiv:2404.03673) uses it on consistency models.

    Args:
        log_ratios: (N,), sum over the trained steps of log_prob - old_log_prob; N even.
        advantages: (N,); of a pair only the difference counts.
        scale: eta_r, > 0: how far the policy moves for a difference of 1 is 1 / scale.
    """
    if log_ratios.shape != advantages.shape or log_ratios.dim() != 1 or len(log_ratios) % 2:
        shapes = f"{tuple(log_ratios.shape)}, {tuple(advantages.shape)}"
        raise ValueError(f"log_ratios, advantages: got shapes {shapes}, expected (N,) each, N even")
    if not scale > 0:
        raise ValueError(f"scale: got {scale}, expected > 0")
    moved, wanted = log_ratios.unflatten(0, (-1, 2)), advantages.detach().to(log_ratios.dtype).unflatten(0, (-1, 2))
    return scale * (moved[:, 0] - moved[:, 1]) - (wanted[:, 0] - wanted[:, 1])


def rebel_loss(log_ratios: Tensor, advantages: Tensor, scale: float = 1.0) -> Tensor:
    """Squared `rebel_residuals`, (N / 2,). At the old weights it is (A - A')^2 and its gradient is not 0."""
    return rebel_residuals(log_ratios, advantages, scale) ** 2


def rebel_weights(log_ratios: Tensor, advantages: Tensor, scale: float = 1.0) -> Tensor:
    """d sum(rebel_loss) / d log_ratios, (N,), detached: sum(weights * log_ratios) has the gradient of the loss.

    With the sums known from a pass without gradient, backward can so be called step by step, in the memory of one.
    """
    residuals = rebel_residuals(log_ratios.detach(), advantages, scale)
    return 2 * scale * torch.stack([residuals, -residuals], dim=1).flatten()
