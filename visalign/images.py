"""The one place where pictures change form: float images (N, 3, H, W) in [0, 1], PIL, uint8 arrays (N, H, W, 3)."""

import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # that are read; others may run programs, or hold none
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_PIXELS = 8192 * 8192
TOLERANCE = 1e-3  # how far a pixel may lie outside [0, 1]: rounding of half-precision decoders


def is_video(images: Any) -> bool:
    """Whether these are videos (N, F, 3, H, W) rather than pictures, by the number of axes."""
    return isinstance(images, Tensor) and images.ndim == 5


def check_videos(videos: Any) -> None:
    """Raise ValueError unless `videos` is a float tensor (N, F, 3, H, W) with N and F >= 1. Reads no value."""
    _check_layout("videos", videos, "(N, F, 3, H, W)")


def check_images(images: Any) -> None:
    """Raise ValueError unless `images` is a float tensor (N, 3, H, W) with N >= 1. Reads no value, so it is free."""
    _check_layout("images", images, "(N, 3, H, W)")


def _check_layout(name: str, pixels: Any, layout: str) -> None:
    if not isinstance(pixels, Tensor):
        got = type(pixels).__name__
        raise ValueError(f"{name}: got {got}, expected a float tensor {layout}; see pil_to_images")
    shape = tuple(pixels.shape)
    if pixels.ndim != layout.count(",") + 1 or shape[-3] != 3:
        known = {1: " (greyscale: repeat the channel 3 times)", 4: " (RGBA: blend the alpha channel into RGB)"}
        last = " (channels last: they belong before height and width)" if shape[-1:] == (3,) else ""
        hint = last or known.get(shape[-3], "") if pixels.ndim == layout.count(",") + 1 else ""
        raise ValueError(f"{name}: got shape {shape}, expected {layout}{hint}")
    if not pixels.numel():
        raise ValueError(f"{name}: got shape {shape}, expected at least one image of at least one pixel")
    if not pixels.is_floating_point():
        raise ValueError(f"{name}: got {pixels.dtype}, expected floats in [0, 1] (divide uint8 pixels by 255)")


def check_references(references: Any, count: int, videos: bool = False) -> None:
    """Raise ValueError unless these are `count` lists of float pictures (3, H, W), each of any length and sizes.

    Args:
        videos: whether they may be videos (F, 3, H, W) as well.
    """
    if isinstance(references, (Tensor, Mapping, str)) or not isinstance(references, Collection):
        raise ValueError(f"references: got {type(references).__name__}, expected {count} lists, one per image")
    if len(references) != count:
        raise ValueError(f"references: got {len(references)}, expected {count} lists, one per image")
    for n, pictures in enumerate(list(references)):
        one = isinstance(pictures, str) or not isinstance(pictures, Iterable)
        for picture in [pictures] if one else pictures:
            if not isinstance(picture, Tensor) or picture.ndim not in (3, 3 + videos):
                got = tuple(picture.shape) if isinstance(picture, Tensor) else type(picture).__name__
                raise ValueError(f"references: got {got} for image {n}, expected a list of tensors (3, H, W)")
            try:
                (check_images if picture.ndim == 3 else check_videos)(picture[None])
            except ValueError as error:
                raise ValueError(f"references for image {n}: {error}") from error


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
    """Images (N, 3, H, W) in [0, 1] to uint8 (N, H, W, 3).

    Raises:
        ValueError: a NaN or a pixel outside [0, 1]; as bytes they would look like any other.
    """
    check_pixels(images)
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


def read_picture(
    source: str | Path | BinaryIO, formats: tuple[str, ...] = FORMATS, most_pixels: int = MAX_PIXELS
) -> Image.Image:
    """A picture file as RGB: upright, 16 bits scaled to 8, on white where it is transparent; the first of several.

    The one reader for pictures of others: prompt sets, data, scoring, the server and the page see the same pixels.

    Raises:
        ValueError: no picture of these formats, too many pixels (told before they are decoded), or a broken file.
    """
    name = str(source)[-80:] if isinstance(source, (str, Path)) else "picture"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(source, formats=formats) as image:
                if image.width * image.height > most_pixels:
                    got = f"{image.width} x {image.height} pixels"
                    raise ValueError(f"{name}: got {got}, expected at most {most_pixels:,} in all")
                image.load()
                return _on_white(_eight_bits(ImageOps.exif_transpose(image)))
    except UnidentifiedImageError:
        raise ValueError(f"{name}: is no picture of {', '.join(formats)}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(f"{name}: got more pixels than {most_pixels:,}") from None
    except FileNotFoundError:
        raise ValueError(f"{name}: there is no such file") from None
    except (OSError, SyntaxError, EOFError, MemoryError) as error:
        raise ValueError(f"{name}: is broken ({' '.join(str(error).split())[:100]})") from None


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, or of floats in [0, 1], as grey of 8; PIL's own conversion would clip it."""
    if image.mode == "F":
        return Image.fromarray((np.asarray(image).clip(0, 1) * 255).round().astype(np.uint8))
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    return Image.fromarray((np.asarray(image).astype(np.float64).clip(0, 65535) / 257).round().astype(np.uint8))


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        clear = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")
    return image.convert("RGB")


def picture_files(folder: Path) -> list[Path]:
    """The picture files of a folder, in natural order (frame_2 before frame_10), without hidden and other files."""
    files = [p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and p.is_file()]
    return sorted(files, key=lambda p: [int(t) if t.isdigit() else t.lower() for t in re.split(r"(\d+)", p.name)])
