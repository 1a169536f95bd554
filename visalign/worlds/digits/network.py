"""The networks of the digits world: the flow's velocity, and a classifier. Each makes do with a tenth of a second a
thousand pictures on one core.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE, CLASSES = 8, 10


def level_embedding(sigma: Tensor, width: int) -> Tensor:
    """Cosines and sines of sigma (N,) in [0, 1] at angular frequencies from 1 to 100, (N, width)."""
    frequencies = torch.exp(torch.linspace(0, math.log(100), width // 2, device=sigma.device))
    angles = sigma.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class Block(nn.Module):
    """A residual block of two linear layers, whose input is scaled and shifted by the noise level."""

    def __init__(self, width: int, level_width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(level_width, 2 * width)
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        for layer in (self.modulation, self.second):  # starts as the identity
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, hidden: Tensor, level: Tensor) -> Tensor:
        scale, shift = self.modulation(level).chunk(2, dim=1)
        return hidden + self.second(F.silu(self.first(self.norm(hidden) * (1 + scale) + shift)))


class DigitFlow(nn.Module):
    """The velocity, noise minus data, of a flow over the digits: 64 pixels through residual blocks."""

    def __init__(self, width: int = 256, blocks: int = 4, level_width: int = 64) -> None:
        super().__init__()
        self.level_width = level_width
        self.read = nn.Linear(SIDE * SIDE, width)
        self.level = nn.Linear(level_width, level_width)
        self.blocks = nn.ModuleList(Block(width, level_width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.write = nn.Linear(width, SIDE * SIDE)
        nn.init.zeros_(self.write.weight)
        nn.init.zeros_(self.write.bias)

    def forward(self, latents: Tensor, sigma: Tensor) -> Tensor:
        """latents: (N, 1, 8, 8), noise at sigma (N,) in [0, 1]. Returns the velocity (N, 1, 8, 8)."""
        hidden = self.read(latents.flatten(1))
        level = F.silu(self.level(level_embedding(sigma, self.level_width)))
        for block in self.blocks:
            hidden = block(hidden, level)
        return self.write(self.norm(hidden)).view(latents.shape)


class DigitClassifier(nn.Module):
    """A convnet: grey pictures (N, 1, 8, 8) in [0, 1] to features, and on to the logits of the ten digits."""

    def __init__(self, width: int = 24, features: int = 32) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(8 * width, features),
            nn.SiLU(),
        )
        self.head = nn.Linear(features, CLASSES)

    def features(self, pictures: Tensor) -> Tensor:
        """(N, 32): what the logits are linear in."""
        return self.trunk(2 * pictures - 1)

    def forward(self, pictures: Tensor) -> Tensor:
        """Logits (N, 10)."""
        return self.head(self.features(pictures))


def to_grey(images: Tensor) -> Tensor:
    """Images (N, 3, H, W) in [0, 1] as the classifier reads them: the channels' mean, averaged down to 8 x 8."""
    grey = images.float().mean(1, keepdim=True)
    return grey if grey.shape[-2:] == (SIDE, SIDE) else F.adaptive_avg_pool2d(grey, SIDE)
