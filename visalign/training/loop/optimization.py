"""Learning rates, one optimiser update over all processes that a bad gradient cannot spoil, and means to log."""

import math
from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor


def learning_rate(step: int, steps: int, peak: float, warmup: int, schedule: str) -> float:
    """The learning rate of step 0 .. steps - 1: linear warm-up, then constant, or falling to 0 by cosine or line."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    fall = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return peak * fall[schedule]


def apply_gradients(
    accelerator: Accelerator, optimizer: torch.optim.Optimizer, rate: float, max_norm: float
) -> tuple[float, bool]:
    """Sum gradients over processes, clip, step, and clear them.

    The sum is explicit (one flat all-reduce), so the stock pipeline can call the module itself, without a wrapper.

    Args:
        max_norm: clip the global norm to this; 0: do not clip.

    Returns:
        The norm before clipping, and whether the update was made: a gradient that is not finite is dropped instead.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    if accelerator.num_processes > 1:
        flat = accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "sum")
        gradients = [part.view_as(p) for part, p in zip(flat.split([p.numel() for p in parameters]), parameters)]
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm if max_norm > 0 else math.inf).item()
    applied = math.isfinite(norm)
    if applied:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, applied


def mean_over_processes(accelerator: Accelerator, sums: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, float]:
    """sums[name] / sums["count"], both over all processes; 0 where nothing was counted.

    Args:
        sums: scalars of this process; what is missing is 0.
    """
    zero = torch.zeros((), device=accelerator.device)
    values = torch.stack([sums.get(name, zero).to(zero.device).float() for name in (*names, "count")])
    values = accelerator.reduce(values, "sum")
    return dict(zip(names, (values[:-1] / values[-1].clamp(min=1)).tolist()))
