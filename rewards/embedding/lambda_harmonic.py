"""Lambda-harmonic reward for subject-driven generation (Miao et al. 2024, arXiv:2407.12164): like the references, and
like the prompt."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from visalign.images import check_images
from visalign.rewards.base import Context, RewardOutput, check_prompts, register_reward

from .frozen import ReferenceEmbeddings, mean_cosines, read_references
from .hf_clip import check_encoder, load_encoder

ALIGN = "kakaobrain/align-base"


def lambda_harmonic(image: Tensor, text: Tensor, lam: float) -> Tensor:
    """Weighted harmonic mean 1 / (lam / image + (1 - lam) / text) of likenesses (N,) in [0, 1]; the smaller rules."""
    return 1 / (lam / (image + 1e-8) + (1 - lam) / (text + 1e-8))


@register_reward("lambda_harmonic")
class LambdaHarmonicReward:
    """Harmonic mean of the likeness to context["references"] and to the prompt, each (cosine + 1) / 2.

    Range [0, 1]; gradients reach the images (not the references). Its criteria are "image" and "text". A picture
    without references is invalid unless `lam` is 0.

    Args:
        lam: weight of the references: the paper has 0.3 to choose a checkpoint, 0 (prompt only) to label pairs.
        model, pretrained, device, dtype, download: as for `load_encoder`. The paper's is ALIGN; CLIP serves as well.
    """

    name = "lambda_harmonic"
    differentiable = True
    kind = "pointwise"
    range = (0.0, 1.0)
    media = "images"
    checkpoints = (ALIGN,)
    licence = "see the model card"
    source = "arXiv:2407.12164"

    def __init__(
        self,
        lam: float = 0.3,
        model: str = ALIGN,
        pretrained: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        download: bool = False,
    ) -> None:
        _check_lambda(lam)
        self.lam = lam
        self.needs: tuple[str, ...] = ("prompts", "references") if lam else ("prompts",)
        self.encoder = load_encoder(model, pretrained, device, dtype, download)
        self._embed = ReferenceEmbeddings(self.encoder.embed_images)

    @staticmethod
    def preflight(options: Mapping[str, Any]) -> None:
        """Raise ValueError for options that cannot work, without loading anything."""
        _check_lambda(options.get("lam", 0.3))
        check_encoder(
            options.get("model", ALIGN),
            options.get("pretrained"),
            options.get("dtype", "float32"),
            options.get("download", False),
        )

    def __call__(self, images: Tensor, prompts: Sequence[str], context: Context | None = None) -> RewardOutput:
        """images: (N, 3, H, W) in [0, 1]; prompts: N strings. Returns scores (N,), float32 on the model's device."""
        check_images(images)
        check_prompts(images, prompts)
        features = self.encoder.embed_images(images)
        text = ((features * self.encoder.embed_texts(prompts)).sum(dim=-1) + 1) / 2
        if not self.lam:
            return RewardOutput(lambda_harmonic(text, text, 0.0), {"text": text})
        references = read_references(context, len(images))
        cosines, valid = mean_cosines(features, references, self._embed)
        image = (cosines + 1) / 2
        reasons = [None if own else "no references" for own in references]
        return RewardOutput(
            lambda_harmonic(image, text, self.lam), {"image": image, "text": text}, rationale=reasons, valid=valid
        )


def _check_lambda(lam: float) -> None:
    if not 0 <= lam <= 1:
        raise ValueError(f"lam: got {lam}, expected within [0, 1]")
