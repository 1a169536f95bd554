"""PickScore (Kirstain et al. 2023, arXiv:2305.01569): CLIP taught which of two pictures people pick for a prompt."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from visalign.names import unknown_name
from visalign.rewards.base import Context, check_prompts, register_reward

from .hf_clip import HfEncoder, check_hf_options

MODEL = "yuvalkirstain/PickScore_v1"
PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
NORMALISERS = {"none": 1.0, "div26": 1 / 26}


@register_reward("pickscore")
class PickScoreReward:
    """exp(logit_scale) * cosine of image and prompt; higher is likelier picked; gradients reach the images.

    About 15 to 26. For pictures of one prompt, the softmax of their scores is the probability of being picked.

    Args:
        normalise: "none", or "div26": divide by 26, so that good pictures are near 1.
        model, processor: folders or hub ids of a `CLIPModel` and of its tokenizer and image settings.
        device, dtype, download: as for HfEncoder.
    """

    name = "pickscore"
    differentiable = True
    kind = "pointwise"
    needs = ("prompts",)
    media = "images"
    checkpoints = (MODEL, PROCESSOR)
    licence = "MIT"
    source = "arXiv:2305.01569"

    def __init__(
        self,
        normalise: str = "none",
        model: str = MODEL,
        processor: str = PROCESSOR,
        device: str | None = None,
        dtype: str = "float32",
        download: bool = False,
    ) -> None:
        if normalise not in NORMALISERS:
            raise unknown_name("normalise", normalise, NORMALISERS)
        self.encoder = HfEncoder(model, processor, device, dtype, download)
        self._factor = self.encoder.logit_scale * NORMALISERS[normalise]
        self.range: tuple[float, float] = (-self._factor, self._factor)

    @staticmethod
    def preflight(options: Mapping[str, Any]) -> None:
        """Raise ValueError for options that cannot work, without loading anything."""
        normalise = options.get("normalise", "none")
        if normalise not in NORMALISERS:
            raise unknown_name("normalise", normalise, NORMALISERS)
        model, processor = options.get("model", MODEL), options.get("processor", PROCESSOR)
        check_hf_options(model, processor, options.get("dtype", "float32"), options.get("download", False))

    def __call__(self, images: Tensor, prompts: Sequence[str], context: Context | None = None) -> Tensor:
        """images: (N, 3, H, W) in [0, 1]; prompts: N strings. Returns (N,), float32 on the model's device."""
        features = self.encoder.embed_images(images)
        check_prompts(images, prompts)
        return self._factor * (features * self.encoder.embed_texts(prompts)).sum(dim=-1)
