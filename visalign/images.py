"""The one place where pictures change form: float images (N, 3, H, W) in [0, 1], PIL, uint8 arrays (N, H, W, 3)."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

TOLERANCE = 1e-3  # how far a pixel may lie outside [0, 1]: rounding of half-precision decoders


def check_videos(videos: Tensor) -> None:
    """Raise ValueError unless `videos` is a float tensor (N, F, 3, H, W) with N and F >= 1. Reads no value."""
    if not isinstance(videos, Tensor) or videos.ndim != 5:
        got = f"shape {tuple(videos.shape)}" if isinstance(videos, Tensor) else type(videos).__name__
        raise ValueError(f"videos: got {got}, expected a float tensor (N, F, 3, H, W)")
    if not videos.numel():
        raise ValueError(f"videos: got shape {tuple(videos.shape)}, expected at least one frame of at least one pixel")
    check_images(videos.flatten(0, 1))


def check_images(images: Tensor) -> None:
    """Raise ValueError unless `images` is a float tensor (N, 3, H, W) with N >= 1. Reads no value, so it is free."""
    if not isinstance(images, Tensor):
        raise ValueError(
            f"images: got {type(images).__name__}, expected a float tensor (N, 3, H, W); see pil_to_images"
        )
    shape = tuple(images.shape)
    if images.ndim != 4 or shape[1] != 3:
        known = {1: " (greyscale: repeat the channel 3 times)", 4: " (RGBA: blend the alpha channel into RGB)"}
        hint = known.get(shape[1], "") if images.ndim == 4 else ""
        raise ValueError(f"images: got shape {shape}, expected (N, 3, H, W){hint}")
    if not images.numel():
        raise ValueError(f"images: got shape {shape}, expected at least one image of at least one pixel")
    if not images.is_floating_point():
        raise ValueError(f"images: got {images.dtype}, expected floats in [0, 1] (divide uint8 pixels by 255)")


def check_pixels(images: Tensor) -> None:
    """Raise ValueError naming the first image with a NaN or a pixel outside [0, 1]. Waits for the device."""
    low, high = (f(images.detach().flatten(1), dim=1).float().cpu() for f in (torch.amin, torch.amax))
    bad = ~((low >= -TOLERANCE) & (high <= 1 + TOLERANCE))  # also true for NaN, which amin and amax keep
    if bad.any():
        n = int(bad.nonzero()[0])
        raise ValueError(f"images: got values from {low[n]:.4g} to {high[n]:.4g} in sample {n}, expected within [0, 1]")


def to_uint8(images: Tensor) -> Tensor:
    """Images (N, 3, H, W) in [0, 1] to uint8, rounded to the nearest level; cuts the gradient."""
    check_images(images)
    return (images.detach().float() * 255).round().clamp(0, 255).to(torch.uint8)


def images_to_numpy(images: Tensor) -> np.ndarray:
    """Images (N, 3, H, W) in [0, 1] to uint8 (N, H, W, 3)."""
    return to_uint8(images).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def images_to_pil(images: Tensor) -> list[Image.Image]:
    """Images (N, 3, H, W) in [0, 1] to RGB pictures."""
    return [Image.fromarray(pixels) for pixels in images_to_numpy(images)]


def numpy_to_images(pixels: np.ndarray) -> Tensor:
    """uint8 (N, H, W, 3) to images (N, 3, H, W), float32 in [0, 1]."""
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
        raise ValueError(f"pixels: got {pixels.dtype} {pixels.shape}, expected uint8 (N, H, W, 3)")
    return torch.tensor(pixels).permute(0, 3, 1, 2).contiguous().float() / 255


def pil_to_images(pictures: Sequence[Image.Image]) -> Tensor:
    """RGB pictures of one size to images (N, 3, H, W), float32 in [0, 1].

    Raises:
        ValueError: no picture, sizes that differ, or a mode other than RGB; converting is the caller's choice.
    """
    if not pictures:
        raise ValueError("pictures: got none, expected at least one")
    for n, picture in enumerate(pictures):
        if picture.mode != "RGB":
            raise ValueError(f"pictures: got mode {picture.mode!r} at {n}, expected 'RGB'; use picture.convert('RGB')")
        if picture.size != pictures[0].size:
            raise ValueError(
                f"pictures: got sizes {pictures[0].size} at 0 and {picture.size} at {n}, expected one size"
            )
    return numpy_to_images(np.stack([np.asarray(picture) for picture in pictures]))
