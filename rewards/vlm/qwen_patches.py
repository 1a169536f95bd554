"""Pictures and videos as the Qwen vision towers read them, on tensors, so that gradients reach the pixels."""

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
    """How one checkpoint's processor cuts pictures, or videos; read from the processor, not from a table."""

    patch: int  # 14 for Qwen2-VL and Qwen2.5-VL, 16 for Qwen3-VL
    merge: int  # patches a side that become one token
    temporal: int  # frames a patch spans; a picture, or the last frame, is repeated
    min_pixels: int  # of a picture or frame
    max_pixels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, processor: Any, min_pixels: int | None, max_pixels: int | None) -> "Patches":
        """As the image or video processor has it; the pixel budget may be overruled."""
        shortest, longest = (int(processor.size[f"{edge}_edge"]) for edge in ("shortest", "longest"))  # pixels in all
        return cls(
            processor.patch_size,
            processor.merge_size,
            processor.temporal_patch_size,
            shortest if min_pixels is None else min_pixels,
            longest if max_pixels is None else max_pixels,
            tuple(processor.image_mean),
            tuple(processor.image_std),
        )

    def grid(self, height: int, width: int, frames: int = 1) -> tuple[int, int, int]:
        """(steps, rows, columns) of patches that a picture or video of this size gets."""
        factor = self.patch * self.merge
        h, w = smart_resize(height, width, factor, self.min_pixels, self.max_pixels)
        return -(-frames // self.temporal), h // self.patch, w // self.patch

    def tokens(self, height: int, width: int) -> int:
        """How many tokens the language model sees of a picture of this size."""
        return math.prod(self.grid(height, width)) // self.merge**2

    def __call__(self, pictures: Tensor) -> Tensor:
        """Pictures (N, 3, H, W) or videos (N, F, 3, H, W) in [0, 1] to patches.

        Returns:
            (N, steps * rows * columns, 3 * temporal * patch * patch), float32. Patches that merge into one token follow
            each other. Bicubic with antialiasing, clamped to [0, 1], normalised; differs from the processor's own path
            by its rounding to 8 bits only.
        """
        videos = (pictures[:, None] if pictures.ndim == 4 else pictures).float()
        n, frames, _, height, width = videos.shape
        steps, rows, columns = self.grid(height, width, frames)
        target = rows * self.patch, columns * self.patch
        if target != (height, width):
            flat = F.interpolate(videos.flatten(0, 1), target, mode="bicubic", antialias=True, align_corners=False)
            videos = flat.view(n, frames, 3, *target)
        mean, std = (torch.tensor(v, device=videos.device).view(3, 1, 1) for v in (self.mean, self.std))
        videos = (videos.clamp(0, 1) - mean) / std
        last = videos[:, -1:].expand(-1, steps * self.temporal - frames, -1, -1, -1)
        p, m = self.patch, self.merge
        x = torch.cat([videos, last], dim=1).view(n, steps, self.temporal, 3, rows // m, m, p, columns // m, m, p)
        # N, step, row block, column block, row in it, column in it, colour, frame, y, x
        x = x.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9)
        return x.reshape(n, steps * rows * columns, 3 * self.temporal * p * p)
