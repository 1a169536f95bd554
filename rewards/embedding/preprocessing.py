"""Pictures as a checkpoint's own processor would prepare them, on tensors and with gradient."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from .encoder import preprocess

FILTERS = {2: "bilinear", 3: "bicubic"}  # PIL's numbers, as processors store them


@dataclass(frozen=True)
class Preprocessing:
    """Resize, crop the centre, normalise: (N, 3, H, W) in [0, 1] to (N, 3, S, S), float32."""

    size: int  # shorter side after resizing, or both sides where the aspect ratio is given up
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mode: str = "bicubic"  # or "bilinear"; antialiased
    resize: str = "shortest"  # or "squash"
    crop: int | None = None  # side of the result; None: size
    round_down: bool = True  # the crop's offset: transformers' rule; False: torchvision's, to nearest

    def __call__(self, images: Tensor) -> Tensor:
        rules = (self.size, self.mean, self.std, self.mode, self.resize, self.crop, self.round_down)
        return preprocess(images, *rules)


CLIP = Preprocessing(224, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET = Preprocessing(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = Preprocessing(384, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def from_processor(config: Mapping[str, Any]) -> Preprocessing:
    """The rules that a transformers image processor's settings (`processor.to_dict()`) spell out.

    Rescaling and normalising are folded into one mean and std, among them EfficientNet's offset and second division.

    Raises:
        ValueError: rules that this cannot follow (no resizing, a size that is not square, a filter other than bilinear
            or bicubic, a crop that needs padding); names the setting.
    """
    if not config.get("do_resize", True):
        raise ValueError("do_resize: got False, expected a processor that resizes")
    size = config["size"]
    resize = "shortest" if size.get("shortest_edge") else "squash"
    side = size.get("shortest_edge") or _square(size, "size")
    crop = _square(config["crop_size"], "crop_size") if config.get("do_center_crop") else None
    if crop is None and resize == "shortest":
        raise ValueError(f"do_center_crop: got False with size {dict(size)}, expected a square result")
    if crop is not None and crop > side:
        raise ValueError(f"crop_size: got {crop}, expected at most the size, {side}")
    mode = FILTERS.get(int(config.get("resample", 3)))
    if mode is None:
        raise ValueError(f"resample: got {config['resample']!r}, expected one of {FILTERS}")
    mean, std = _folded(config)
    return Preprocessing(int(side), mean, std, mode, resize, None if crop == side else crop)


def _square(size: Mapping[str, Any], name: str) -> int:
    if not size.get("height") or size.get("height") != size.get("width"):
        raise ValueError(f"{name}: got {dict(size)}, expected a square")
    return int(size["height"])


def _folded(config: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std that do in one go to pixels in [0, 1] what the settings do to pixels in [0, 255]."""
    scale = 255.0 * (config["rescale_factor"] if config.get("do_rescale", True) else 1.0)
    offset = 1.0 if config.get("rescale_offset") else 0.0
    stds = [float(x) for x in config["image_std"]]
    mean, std = (list(config["image_mean"]), stds) if config.get("do_normalize", True) else ([0.0] * 3, [1.0] * 3)
    if config.get("include_top"):
        std = [a * b for a, b in zip(std, stds)]
    return tuple((offset + float(m)) / scale for m in mean), tuple(s / scale for s in std)


def load_preprocessing(model: str, fallback: Preprocessing, image_size: int, download: bool = False) -> Preprocessing:
    """The processor's rules from `model` (a folder or id), else `fallback` at the model's image size.

    The fallback is for checkpoints that bring no processor at all; one that cannot be followed is an error.
    """
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(model, local_files_only=not download)
    except OSError:
        return replace(fallback, size=image_size)
    try:
        return from_processor(processor.to_dict())
    except ValueError as error:
        raise ValueError(f"processor of {model!r}: {error}") from error
