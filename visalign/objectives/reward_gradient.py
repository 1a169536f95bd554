"""Losses of training with a reward's gradient, and what keeps such a training from exploiting its reward.

Rewards are (N,), higher is better; losses are (N,), one per sample, and their gradient is the reward's.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from visalign.names import unknown_name
from visalign.transitions.gaussian import Gaussian, at_least_float32, per_sample

Objective = Literal["reward", "hinge", "target"]
CutKind = Literal["uniform", "gaussian", "fixed"]


def reward_loss(rewards: Tensor, objective: Objective = "reward", threshold: float | None = None) -> Tensor:
    """The loss (N,): "reward" -r; "hinge" relu(threshold - r), no gradient once met; "target" |r - threshold|.

    ReFL's hinge is at 2 on ImageReward (arXiv:2304.05977), SRPO's at 0.7; AlignProp aims at 10 on the aesthetic score.

    Raises:
        ValueError: an unknown objective, a missing threshold, or one that would be ignored.
    """
    if objective not in ("reward", "hinge", "target"):
        raise unknown_name("objective", objective, ("reward", "hinge", "target"))
    if (threshold is None) != (objective == "reward"):
        raise ValueError(f"threshold: got {threshold} for {objective!r}, expected a number for 'hinge' and 'target'")
    if threshold is None:
        return -rewards
    return (threshold - rewards).relu() if objective == "hinge" else (rewards - threshold).abs()


def draw_cut(kind: CutKind, num_steps: int, generator: torch.Generator) -> int:
    """AlignProp's first step with gradient (arXiv:2310.03739); to be drawn once for a whole trajectory.

    "uniform" over 0 .. T-1; "gaussian" Normal(42, 5) of 50 steps, in proportion for others, redrawn until within
    1 .. T-1 (T = 1: 0); "fixed" T-1, DRaFT-1. Drawn anew in each step, as older code did, the steps with gradient would
    have gaps, and gradients of early ones would be lost.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps: got {num_steps}, expected >= 1")
    if kind == "fixed" or num_steps == 1:
        return num_steps - 1
    if kind == "uniform":
        return int(torch.randint(num_steps, (), generator=generator))
    if kind != "gaussian":
        raise unknown_name("cut", kind, ("uniform", "gaussian", "fixed"))
    while True:
        cut = int((42 + 5 * torch.randn((), generator=generator).item()) * num_steps / 50)
        if 1 <= cut < num_steps:
            return cut


def output_anchor(prediction: Tensor, reference: Tensor) -> Tensor:
    """Mean squared difference of predictions (N, ...) to the frozen model's at the same state, (N,); mean over C, H, W.

    For samplers without noise in their steps, whose KL is undefined.
    """
    if prediction.shape != reference.shape:
        raise ValueError(f"reference: got shape {tuple(reference.shape)}, expected {tuple(prediction.shape)}")
    return per_sample((at_least_float32(prediction) - at_least_float32(reference).detach()) ** 2, "mean")


def step_kl(policy: Gaussian, reference: Gaussian) -> Tensor:
    """KL of one stochastic step from the frozen model's, (N,): ||mean - mean_ref||^2 / (2 std^2), a *sum* over C, H, W.

    `objectives.policy_gradient.kl_penalty` has the mean, and the forms that published code calls KL.
    """
    return policy.kl(Gaussian(reference.mean.detach(), reference.std, reference.deterministic), "sum")


def lora_penalty(pairs: Sequence[tuple[Tensor, Tensor]], scale: float = 1.0) -> Tensor:
    """Squared size of a LoRA's change of the weights, (): sum over layers of ||scale B A||^2, without forming B A.

    Args:
        pairs: (A (r, inputs), B (outputs, r)) of each layer.
        scale: alpha / rank.
    """
    if not pairs:
        raise ValueError("pairs: got none, expected A and B of at least one layer")
    return torch.stack([((b.T @ b) * (a @ a.T)).sum() for a, b in pairs]).sum() * scale**2


def start_penalty(weights: Sequence[Tensor], start: Sequence[Tensor]) -> Tensor:
    """||theta - theta_init||^2, (), over all weights."""
    if len(weights) != len(start) or not weights:
        raise ValueError(f"start: got {len(start)} tensors, expected {len(weights)}, as weights, and at least one")
    return torch.stack([((w - s.detach()) ** 2).sum() for w, s in zip(weights, start)]).sum()


def normalised_mix(gradients: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i w_i g_i / (||g_i|| + 1e-8) per image (R0, arXiv:2503.13070; reconstructed: no code was published).

    No reward dominates by its scale.

    Args:
        gradients: of each reward by the images, (N, ...) each.
    """
    if len(gradients) != len(weights) or not gradients:
        raise ValueError(f"weights: got {len(weights)}, expected {len(gradients)}, one per gradient, and at least one")
    return torch.stack([w * g / (_norm(g) + 1e-8) for w, g in zip(weights, gradients)]).sum(0)


def worst_case(images: Tensor, gradient: Tensor, radius: float) -> Tensor:
    """Images moved by `radius` against the reward: images - radius g / ||g||, cut to [0, 1] (reconstructed).

    A reward that is high only on a narrow peak pays nothing there. The shift is a constant: gradients reach the images.

    Args:
        gradient: of the reward by the images, (N, ...).
        radius: length of the shift of one image, over all its pixels; about 1e-2.
    """
    if radius < 0:
        raise ValueError(f"radius: got {radius}, expected >= 0")
    return (images - radius * (gradient / (_norm(gradient) + 1e-8)).detach()).clamp(0, 1)


def augment(images: Tensor, seeds: Sequence[int], crop: float = 0.9, noise: float = 0.02, flip: bool = False) -> Tensor:
    """Each image randomly cropped, resized back, flipped and noised, (N, 3, H, W); image n by seeds[n] alone.

    Averaging a reward over such copies takes the profit out of high-frequency patterns.

    Args:
        crop: smallest share of each side that is kept, in (0, 1]; 1 does not crop.
        noise: std of the noise, in units of the pixels; the result is not cut to [0, 1].
        flip: mirror half of the images; not for prompts that speak of left and right.
    """
    if len(seeds) != len(images) or not 0 < crop <= 1 or noise < 0:
        got = f"{len(seeds)} seeds, crop {crop}, noise {noise}"
        raise ValueError(f"augment: got {got}, expected {len(images)} seeds, crop within (0, 1], noise >= 0")
    height, width = images.shape[-2:]
    made = []
    for image, seed in zip(images, seeds):
        generator = torch.Generator().manual_seed(int(seed))
        share, down, right, mirror = torch.rand(4, generator=generator).tolist()
        h, w = (max(1, round(side * (crop + (1 - crop) * share))) for side in (height, width))
        top, left = round(down * (height - h)), round(right * (width - w))
        part = image[:, top : top + h, left : left + w]
        if (h, w) != (height, width):
            part = torch.nn.functional.interpolate(
                part[None], (height, width), mode="bilinear", align_corners=False, antialias=True
            )[0]
        part = part.flip(-1) if flip and mirror < 0.5 else part
        made.append(part + noise * torch.randn(part.shape, generator=generator).to(part))
    return torch.stack(made)


def relative_reward(wanted: Tensor, unwanted: Tensor, excess: float = 0.0) -> Tensor:
    """(1 + excess) r(wanted prompt) - r(unwanted prompt), (N,) (SRPO, arXiv:2509.06942): common biases cancel."""
    if wanted.shape != unwanted.shape:
        raise ValueError(f"unwanted: got shape {tuple(unwanted.shape)}, expected {tuple(wanted.shape)}, as wanted")
    return (1 + excess) * wanted - unwanted


def saturated_fraction(images: Tensor) -> Tensor:
    """Share of pixel values at or beyond 0 or 1, (), where the decoder's clamp leaves no gradient. A rise is a sign."""
    images = images.detach()
    return ((images <= 0) | (images >= 1)).float().mean()


def _norm(gradient: Tensor) -> Tensor:
    """Of each sample, (N, 1, ...)."""
    return gradient.flatten(1).norm(dim=1).view(-1, *[1] * (gradient.dim() - 1))
