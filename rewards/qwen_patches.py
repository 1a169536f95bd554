"""Pictures as the Qwen vision towers read them, on tensors all the way, so that gradients reach the pixels."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_ASPECT = 200


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size (height, width) a picture is brought to: multiples of `factor` near its own, within the pixel budget.

    Raises:
        ValueError: a picture more than 200 times as long as it is wide.
    """
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(f"picture: got {width} x {height} pixels, expected an aspect ratio of at most {MAX_ASPECT}")
    rounded = round(height / factor) * factor, round(width / factor) * factor
    if rounded[0] * rounded[1] > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        return (
            max(factor, math.floor(height / shrink / factor) * factor),
            max(factor, math.floor(width / shrink / factor) * factor),
        )
    if rounded[0] * rounded[1] < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        return math.ceil(height * grow / factor) * factor, math.ceil(width * grow / factor) * factor
    return rounded


@dataclass(frozen=True)
class Patches:
    """How one checkpoint's processor cuts pictures; read from the processor, not from a table."""

    patch: int  # 14 for Qwen2-VL and Qwen2.5-VL, 16 for Qwen3-VL
    merge: int  # patches a side that become one token
    temporal: int  # frames a patch spans; a picture is repeated
    min_pixels: int
    max_pixels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, image_processor: Any, min_pixels: int | None, max_pixels: int | None) -> "Patches":
        """As the processor has it; the pixel budget may be overruled."""
        size = image_processor.size
        shortest, longest = (
            int(size["shortest_edge"]),
            int(size["longest_edge"]),
        )  # pixels in all, in spite of the names
        return cls(
            image_processor.patch_size,
            image_processor.merge_size,
            image_processor.temporal_patch_size,
            shortest if min_pixels is None else min_pixels,
            longest if max_pixels is None else max_pixels,
            tuple(image_processor.image_mean),
            tuple(image_processor.image_std),
        )

    def grid(self, height: int, width: int) -> tuple[int, int, int]:
        """(1, rows, columns) of patches that a picture of this size gets."""
        factor = self.patch * self.merge
        h, w = smart_resize(height, width, factor, self.min_pixels, self.max_pixels)
        return 1, h // self.patch, w // self.patch

    def tokens(self, height: int, width: int) -> int:
        """How many tokens the language model sees of a picture of this size."""
        return math.prod(self.grid(height, width)) // self.merge**2

    def __call__(self, pictures: Tensor) -> Tensor:
        """Pictures (N, 3, H, W) in [0, 1] to patches (N, rows * columns, 3 * temporal * patch * patch), float32.

        Bicubic with antialiasing, clamped to [0, 1], normalised. Patches that merge into one token follow each other.
        Differs from the processor's own path by its rounding to 8 bits only.
        """
        n, _, height, width = pictures.shape
        _, rows, columns = self.grid(height, width)
        target = rows * self.patch, columns * self.patch
        pictures = pictures.float()
        if target != (height, width):
            pictures = F.interpolate(pictures, target, mode="bicubic", antialias=True, align_corners=False)
        pictures = pictures.clamp(0, 1)
        mean, std = (torch.tensor(v, device=pictures.device).view(3, 1, 1) for v in (self.mean, self.std))
        p, m = self.patch, self.merge
        x = ((pictures - mean) / std).view(n, 3, rows // m, m, p, columns // m, m, p)
        x = x.permute(0, 2, 5, 3, 6, 1, 4, 7)  # N, row block, column block, row in it, column in it, colour, y, x
        x = x.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, self.temporal, -1, -1)
        return x.reshape(n, rows * columns, 3 * self.temporal * p * p)
