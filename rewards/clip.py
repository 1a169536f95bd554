"""CLIPScore (Hessel et al. 2021, arXiv:2104.08718): how well a picture fits its prompt, by any open_clip model."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from visalign.names import unknown_name

from .base import Context, check_prompts, register_reward
from .clip_encoder import SHIPPED, ClipEncoder, check_clip_options

SCALES = ("cosine", "percent", "hessel", "logit")


@register_reward("clip")
class ClipReward:
    """Cosine of the image's and the prompt's embedding; higher is a better fit; gradients reach the images.

    By `scale`: "cosine" as it is, range [-1, 1], 0.1 to 0.4 in practice for web-scale models; "percent"
    100 * max(cosine, 0); "hessel" 2.5 * max(cosine, 0); "logit" the model's own factor, about 100, times cosine.
    The first and last keep a gradient where the cosine is negative.

    The default model is the shapes world's own, shipped with this project (Apache-2.0) and of no use elsewhere. Others
    come as ClipEncoder's options say, under their own licences (OpenAI's and LAION's: MIT).
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
        self.preflight({"model": model, "pretrained": pretrained, "scale": scale, "dtype": dtype})
        self.encoder = ClipEncoder(model, pretrained, device, dtype, download)
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
        check_clip_options(model, options.get("pretrained"), dtype)

    def __call__(self, images: Tensor, prompts: Sequence[str], context: Context | None = None) -> Tensor:
        """images: (N, 3, H, W) in [0, 1]; prompts: N strings. Returns (N,), float32 on the model's device."""
        image_features = self.encoder.embed_images(images)
        check_prompts(images, prompts)
        cosine = (image_features * self.encoder.embed_texts(prompts)).sum(dim=-1)
        if self.scale in ("percent", "hessel"):
            cosine = cosine.clamp(min=0)
        return self._factor * cosine
