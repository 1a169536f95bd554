"""CLIPScore (Hessel et al. 2021, arXiv:2104.08718): how well a picture fits its prompt, by any CLIP."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from visalign.names import unknown_name
from visalign.rewards.base import Context, check_prompts, register_reward

from .encoder import SHIPPED
from .hf_clip import check_encoder, load_encoder

SCALES = ("cosine", "percent", "hessel", "logit")


@register_reward("clip")
class ClipReward:
    """Cosine of the image's and the prompt's embedding; higher is a better fit; gradients reach the images.

    By `scale`: "cosine" as it is, range [-1, 1], 0.1 to 0.4 in practice for web-scale models; "percent"
    100 * max(cosine, 0); "hessel" 2.5 * max(cosine, 0); "logit" the model's own factor, about 100, times cosine.
    The first and last keep a gradient where the cosine is negative.

    The default model is the shapes world's own, shipped with this project (Apache-2.0) and of no use elsewhere. Others
    come as the options of `load_encoder` say, in open_clip's or transformers' layout, under their own licences
    (OpenAI's and LAION's: MIT). With OpenAI's ViT-B/32 this is CLIP-T.
    """

    name = "clip"
    differentiable = True
    kind = "pointwise"
    needs = ("prompts",)

    def __init__(
        self,
        model: str = str(SHIPPED),
        pretrained: str | None = None,
        scale: str = "cosine",
        device: str | None = None,
        dtype: str = "float32",
        download: bool = False,
    ) -> None:
        self.preflight({"model": model, "pretrained": pretrained, "scale": scale, "dtype": dtype, "download": download})
        self.encoder = load_encoder(model, pretrained, device, dtype, download)
        self.scale = scale
        high = {"cosine": 1.0, "percent": 100.0, "hessel": 2.5, "logit": self.encoder.logit_scale}[scale]
        self._factor = high
        self.range: tuple[float, float] = (-high if scale in ("cosine", "logit") else 0.0, high)

    @staticmethod
    def preflight(options: Mapping[str, Any]) -> None:
        """Raise ValueError for options that cannot work, without loading anything."""
        scale = options.get("scale", "cosine")
        if scale not in SCALES:
            raise unknown_name("scale", scale, SCALES)
        model, dtype = options.get("model", str(SHIPPED)), options.get("dtype", "float32")
        check_encoder(model, options.get("pretrained"), dtype, options.get("download", False))

    def __call__(self, images: Tensor, prompts: Sequence[str], context: Context | None = None) -> Tensor:
        """images: (N, 3, H, W) in [0, 1]; prompts: N strings. Returns (N,), float32 on the model's device."""
        image_features = self.encoder.embed_images(images)
        check_prompts(images, prompts)
        cosine = (image_features * self.encoder.embed_texts(prompts)).sum(dim=-1)
        if self.scale in ("percent", "hessel"):
            cosine = cosine.clamp(min=0)
        return self._factor * cosine


@register_reward("clip_match")
class ClipMatchReward:
    """Probability that a picture shows its prompt: sigmoid(scale (cosine - midpoint)), as a function of CLIP's cosine.

    Range (0, 1); gradients reach the images. Platt's calibration (1999) on matching and near-matching pairs gives the
    two numbers; a folder may bring them in `visalign.json` as {"match": {"scale": ..., "midpoint": ...}}, as the
    shipped model of the shapes world does. Where the plain cosine keeps paying for pictures that are merely less wrong,
    this pays for right ones.

    Args:
        scale, midpoint: None: those of the model's folder.
        model, pretrained, device, dtype, download: as for `clip`.

    Raises:
        ValueError: neither the options nor the folder give a scale and a midpoint.
    """

    name = "clip_match"
    differentiable = True
    kind = "pointwise"
    needs = ("prompts",)
    range = (0.0, 1.0)

    def __init__(
        self,
        scale: float | None = None,
        midpoint: float | None = None,
        model: str = str(SHIPPED),
        pretrained: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        download: bool = False,
    ) -> None:
        self.scale, self.midpoint = calibration(scale, midpoint, model)
        self._clip = ClipReward(model, pretrained, "cosine", device, dtype, download)

    @staticmethod
    def preflight(options: Mapping[str, Any]) -> None:
        """Raise ValueError for options that cannot work, without loading anything."""
        ClipReward.preflight({k: v for k, v in options.items() if k not in ("scale", "midpoint")})
        calibration(options.get("scale"), options.get("midpoint"), options.get("model", str(SHIPPED)))

    def __call__(self, images: Tensor, prompts: Sequence[str], context: Context | None = None) -> Tensor:
        """images: (N, 3, H, W) in [0, 1]; prompts: N strings. Returns (N,), float32 on the model's device."""
        return (self.scale * (self._clip(images, prompts, context) - self.midpoint)).sigmoid()


def calibration(scale: float | None, midpoint: float | None, model: str) -> tuple[float, float]:
    """Scale and midpoint as given, else from `visalign.json` in the model's folder."""
    file = Path(model.removeprefix("local-dir:")).expanduser() / "visalign.json"
    try:
        stored = json.loads(file.read_text(encoding="utf-8")).get("match", {}) if file.is_file() else {}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"model: could not read {str(file)!r} as a JSON object: {error}") from error
    values: dict[str, Any] = {"scale": stored.get("scale") if scale is None else scale}
    values["midpoint"] = stored.get("midpoint") if midpoint is None else midpoint
    for name, value in values.items():
        if value is None:
            raise ValueError(f"{name}: got None for model {model!r}, which brings none, expected a number")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{name}: got {value!r} (from {str(file)!r} where it was not given), expected a number")
        if not math.isfinite(value) or name == "scale" and value <= 0:
            raise ValueError(f"{name}: got {value}, expected a finite number{' above 0' * (name == 'scale')}")
    return float(values["scale"]), float(values["midpoint"])
