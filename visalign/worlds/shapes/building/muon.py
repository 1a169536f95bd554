"""Muon for the world's small models: momentum whose matrices are orthogonalised (Jordan et al. 2024).

`torch.optim.Muon` does the same matrix by matrix in bfloat16, which processors without it emulate about ten times
slower; here matrices of one shape go through the iteration together, in float32.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan's coefficients: singular values end within about (0.7, 1.2)


def orthogonalise(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Replace the singular values of (N, rows, columns) by about one, keeping the singular vectors."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon for hidden matrices. Learning rates are those of AdamW: updates are scaled to a like root mean square.

    The scale 0.2 sqrt(max(rows, columns)) is from Liu et al. 2025 (arXiv:2502.16982).
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for shape, params in shapes.items():
                grads = [p.grad for p in params]
                buffers = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in params]
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                nesterov = torch._foreach_lerp(grads, buffers, group["momentum"])
                matrices = torch.stack(nesterov).flatten(2)  # a convolution's kernels are rows
                updates = orthogonalise(matrices).view(-1, *shape).unbind()
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, updates, alpha=-0.2 * max(matrices.shape[1:]) ** 0.5 * group["lr"])


class MuonAndAdamW:
    """Muon for a module's hidden matrices, AdamW for the rest of it and for `others`, at one learning rate."""

    def __init__(
        self,
        module: nn.Module,
        others: Iterable[Tensor] = (),
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.01,
    ):
        matrices = hidden_matrices(module)
        inner = {id(p) for p in matrices}
        rest = [*(p for p in module.parameters() if id(p) not in inner), *others]
        self.parts = (
            torch.optim.AdamW(rest, lr=0.0, betas=betas, weight_decay=weight_decay, fused=True),
            Muon(matrices, lr=0.0, weight_decay=weight_decay),
        )

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()

    def step(self, learning_rate: float) -> None:
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = learning_rate
            part.step()


def warmup_cosine(step: int, warmup: int, progress: float) -> float:
    """Share of the peak learning rate: linear over `warmup` steps, then a cosine of `progress` in [0, 1] to 0.01."""
    return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * progress)) + 0.01)


@torch.no_grad()
def follow(averaged: nn.Module, trained: nn.Module, decay: float) -> None:
    """One step of an exponential moving average of a module's weights."""
    torch._foreach_lerp_(list(averaged.parameters()), list(trained.parameters()), 1 - decay)


def hidden_matrices(module: nn.Module) -> list[Tensor]:
    """The parameters Muon is for: those of linear and convolutional layers, but the smallest and norms' modulation."""
    kinds = (nn.Linear, nn.Conv2d)
    linear = {name: m.weight for name, m in module.named_modules() if isinstance(m, kinds)}
    return [w for name, w in linear.items() if min(w.shape[:2]) >= 64 and "norm" not in name]
