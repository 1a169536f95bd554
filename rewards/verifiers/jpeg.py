"""How well a picture compresses: the smoke-test rewards of DDPO (Black et al. 2023, arXiv:2305.13301, section 5.1)."""

import io
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from visalign.images import check_images, check_pixels, images_to_pil
from visalign.rewards.base import Context, register_reward

QUALITY = 95


def jpeg_kilobytes(images: Tensor) -> Tensor:
    """Size of each image (N, 3, H, W) in [0, 1] as a JPEG of quality 95, (N,) float32, in units of 1000 bytes."""
    check_images(images)
    check_pixels(images)
    sizes = []
    for picture in images_to_pil(images):
        buffer = io.BytesIO()
        picture.save(buffer, format="JPEG", quality=QUALITY)
        sizes.append(buffer.tell() / 1000)
    return torch.tensor(sizes)


def _checked_unit(unit_kb: float) -> float:
    if not unit_kb > 0:
        raise ValueError(f"unit_kb: got {unit_kb}, expected > 0")
    return unit_kb


@register_reward("jpeg_compressibility")
class JpegCompressibility:
    """Minus the JPEG size, so smooth pictures score higher; range (-inf, 0), in units of `unit_kb` kilobytes.

    1 is DDPO's unit; 500 is Flow-GRPO's, which brings 512-pixel pictures near 1. Ignores prompts, no weights,
    no gradient.
    """

    name = "jpeg_compressibility"
    differentiable = False
    kind = "pointwise"
    range = (-math.inf, 0.0)
    needs = ()
    media = "images"
    licence = "no weights"
    source = "Black et al. 2023 (DDPO), arXiv:2305.13301, section 5.1"

    def __init__(self, unit_kb: float = 1.0) -> None:
        self.unit_kb = _checked_unit(unit_kb)

    def __call__(self, images: Tensor, prompts: Sequence[str], context: Context | None = None) -> Tensor:
        """images: (N, 3, H, W) in [0, 1]. Returns (N,), float32 on the CPU."""
        return -jpeg_kilobytes(images) / self.unit_kb


@register_reward("jpeg_incompressibility")
class JpegIncompressibility:
    """The JPEG size, so busy pictures score higher; range (0, inf). Otherwise as JpegCompressibility."""

    name = "jpeg_incompressibility"
    differentiable = False
    kind = "pointwise"
    range = (0.0, math.inf)
    needs = ()
    media = "images"
    licence = "no weights"
    source = "Black et al. 2023 (DDPO), arXiv:2305.13301, section 5.1"

    def __init__(self, unit_kb: float = 1.0) -> None:
        self.unit_kb = _checked_unit(unit_kb)

    def __call__(self, images: Tensor, prompts: Sequence[str], context: Context | None = None) -> Tensor:
        """images: (N, 3, H, W) in [0, 1]. Returns (N,), float32 on the CPU."""
        return jpeg_kilobytes(images) / self.unit_kb
