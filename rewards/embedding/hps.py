"""Human Preference Score 2 and 2.1 (Wu et al. 2023, arXiv:2306.09341): CLIP taught what people prefer for a prompt."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from visalign.rewards.base import Context, check_prompts, register_reward

from .encoder import ClipEncoder
from .frozen import check_dtype, hub_file

REPO = "xswu/HPSv2"


@register_reward("hpsv2")
class HpsV2Reward:
    """Cosine of image and prompt, without the logit scale; higher is preferred; gradients reach the images.

    About 0.20 to 0.35; tables show it times 100. Compare only pictures of one prompt, and no v2.0 with v2.1 scores.
    Pictures are resized as floats, antialiased; the reference follows the torchvision installed: about 1e-3 apart.

    Args:
        weights: the published .pt file (a dict with "state_dict" in open_clip's layout); None: from the hub's cache.
        model: open_clip's name of the architecture.
        device, dtype, download: as for ClipEncoder.
    """

    name = "hpsv2"
    differentiable = True
    kind = "pointwise"
    range = (-1.0, 1.0)
    needs: tuple[str, ...] = ("prompts",)
    media = "images"
    file = "HPS_v2_compressed.pt"
    checkpoints: tuple[str, ...] = ("xswu/HPSv2: HPS_v2_compressed.pt",)
    licence = "Apache-2.0"
    source = "arXiv:2306.09341"

    def __init__(
        self,
        weights: str | Path | None = None,
        model: str = "ViT-H-14",
        device: str | None = None,
        dtype: str = "float32",
        download: bool = False,
    ) -> None:
        path = hub_file("weights", weights, REPO, self.file, download)
        self.encoder = ClipEncoder(model, str(path), device, dtype)  # open_clip reads "state_dict", and strictly

    @classmethod
    def preflight(cls, options: Mapping[str, Any]) -> None:
        """Raise ValueError for options that cannot work, without loading anything."""
        check_dtype(options.get("dtype", "float32"))
        if options.get("weights") is not None or not options.get("download", False):
            hub_file("weights", options.get("weights"), REPO, cls.file)

    def __call__(self, images: Tensor, prompts: Sequence[str], context: Context | None = None) -> Tensor:
        """images: (N, 3, H, W) in [0, 1]; prompts: N strings. Returns (N,), float32 on the model's device."""
        features = self.encoder.embed_images(images)
        check_prompts(images, prompts)
        return (features * self.encoder.embed_texts(prompts)).sum(dim=-1)


@register_reward("hpsv21")
class HpsV21Reward(HpsV2Reward):
    """HPS v2.1: as `hpsv2`, with the weights of version 2.1, trained on better data."""

    name = "hpsv21"
    file = "HPS_v2.1_compressed.pt"
    checkpoints = ("xswu/HPSv2: HPS_v2.1_compressed.pt",)
