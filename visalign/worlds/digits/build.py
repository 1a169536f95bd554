"""Train the digits world from nothing: `python -m visalign.worlds.digits.build --out folder`.

The flow by rectified-flow matching with logit-normal levels (Esser et al. 2024, arXiv:2403.03206), its averaged weights
ship; two classifiers that differ in their seeds. Deterministic on one machine with one thread.
"""

import argparse
import copy
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from . import WEIGHTS, load_pictures
from .network import DigitClassifier, DigitFlow


def similarities(turn: Tensor, growth: Tensor, right: Tensor, down: Tensor) -> Tensor:
    """Matrices (N, 2, 3) of turns in radians, enlargements by 1 + growth, and moves in half widths, each (N,)."""
    cos, sin = (1 + growth) * turn.cos(), (1 + growth) * turn.sin()
    return torch.stack([cos, -sin, right, sin, cos, down], 1).view(-1, 2, 3)


def warped(pictures: Tensor, strength: float, random: torch.Generator) -> Tensor:
    """Pictures (N, 1, 8, 8) turned by up to strength radians, scaled by half of it, moved by 2 * strength pixels."""
    turn, growth, right, down = strength * (2 * torch.rand(4, len(pictures), generator=random) - 1)
    matrices = similarities(turn, growth / 2, right / 2, down / 2)
    grid = F.affine_grid(matrices, list(pictures.shape), align_corners=False)
    return F.grid_sample(pictures, grid, align_corners=False)


def batches(
    steps: int, size: int, strength: float, random: torch.Generator, optimizer: torch.optim.Optimizer, peak: float
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(step, pictures, digits) of the training split; the learning rate warms up and falls along a cosine to 0."""
    pictures, digits = load_pictures("train")
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = peak * min((step + 1) / 100, 0.5 * (1 + math.cos(math.pi * step / steps)))
        rows = torch.randint(len(pictures), (size,), generator=random)
        yield step, warped(pictures[rows], strength, random), digits[rows]


def train_classifier(seed: int, steps: int = 2000, size: int = 96, peak: float = 3e-3) -> DigitClassifier:
    """Of warped pictures, half of them with some noise: it will be shown a flow's estimates."""
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    network = DigitClassifier()
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    for _, pictures, digits in batches(steps, size, 0.2, random, optimizer, peak):
        level = 0.25 * torch.rand(size, 1, 1, 1, generator=random) * (torch.rand(size, 1, 1, 1, generator=random) < 0.5)
        seen = (pictures + level * torch.randn(pictures.shape, generator=random)).clamp(0, 1)
        loss = F.cross_entropy(network(seen), digits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


def train_flow(
    seed: int = 0, steps: int = 8000, size: int = 64, peak: float = 2e-3, strength: float = 0.08
) -> nn.Module:
    """Of pictures that are warped a little, as there are few; the average of the weights."""
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    network = DigitFlow()
    averaged = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), betas=(0.9, 0.99), weight_decay=0.01)
    started, recent = time.monotonic(), 0.0
    for step, pictures, _ in batches(steps, size, strength, random, optimizer, peak):
        data, sigma = 2 * pictures - 1, torch.randn(size, generator=random).sigmoid()
        noise, at = torch.randn(data.shape, generator=random), sigma.view(-1, 1, 1, 1)
        loss = (network((1 - at) * data + at * noise, sigma) - (noise - data)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        decay = min(0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(averaged.parameters()), list(network.parameters()), 1 - decay)
        recent = 0.99 * recent + 0.01 * loss.item() if step else loss.item()
        if step % 500 == 499:
            print(f"flow step {step + 1} loss {recent:.4f} seconds {time.monotonic() - started:.0f}", flush=True)
    return averaged.eval()


def save(network: nn.Module, file: Path) -> None:
    """In fp16."""
    save_file({name: weight.half().contiguous() for name, weight in network.state_dict().items()}, file)


@torch.no_grad()
def accuracy(classifier: nn.Module) -> float:
    """On the held-out pictures."""
    pictures, digits = load_pictures("test")
    return float((classifier(pictures).argmax(1) == digits).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder of the weights")
    parts = ("classifier", "judge", "flow")
    parser.add_argument("--parts", nargs="*", default=parts, choices=parts)
    parser.add_argument("--flow-steps", type=int, default=8000)
    parser.add_argument("--classifier-steps", type=int, default=2000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for part in arguments.parts:
        if part == "flow":
            network = train_flow(steps=arguments.flow_steps)
        else:
            network = train_classifier(("classifier", "judge").index(part), arguments.classifier_steps)
            print(f"{part}: {accuracy(network):.1%} of the held-out pictures", flush=True)
        save(network, arguments.out / f"{part}.safetensors")


if __name__ == "__main__":
    main()
