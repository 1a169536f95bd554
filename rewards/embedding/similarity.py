"""Likeness to references (CLIP-I, DINO; Ruiz et al. 2023, arXiv:2208.12242) and among a picture's own panels."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visalign.images import check_images, check_videos, is_video
from visalign.rewards.base import Context, RewardOutput, register_reward

from .frozen import (
    FrozenModel,
    ReferenceEmbeddings,
    check_checkpoint,
    check_dtype,
    is_path,
    load_model,
    load_pretrained,
    mean_cosines,
    read_references,
)
from .hf_clip import check_encoder, load_encoder
from .preprocessing import IMAGENET, load_preprocessing

CLIP_I, DINO = "openai/clip-vit-base-patch32", "facebook/dino-vits16"
OPEN_CLIP = ("ViT-H-14", "laion2b_s32b_b79k")


class _Likeness:
    """Mean cosine with context["references"]; a picture without any is invalid."""

    differentiable = True
    kind = "pointwise"
    range = (-1.0, 1.0)
    needs = ("references",)
    media = "images"

    def __init__(self, encoder: Any) -> None:
        self.encoder = encoder
        self._embed = ReferenceEmbeddings(encoder.embed_images)

    def __call__(self, images: Tensor, prompts: Sequence[str], context: Context | None = None) -> RewardOutput:
        """images: (N, 3, H, W) in [0, 1]. Returns scores (N,), float32 on the model's device."""
        check_images(images)
        references = read_references(context, len(images))
        scores, valid = mean_cosines(self.encoder.embed_images(images), references, self._embed)
        return RewardOutput(scores, rationale=[None if own else "no references" for own in references], valid=valid)


@register_reward("clip_i")
class ClipIReward(_Likeness):
    """CLIP-I: mean cosine of a picture's CLIP embedding with those of its references; higher is liker.

    Ignores prompts; gradients reach the images (not the references). For CLIP-T, the likeness to the prompt, use `clip`
    with the same model.

    Args:
        model, pretrained, device, dtype, download: as for `load_encoder`. Papers use OpenAI's ViT-B/32 or ViT-B/16.
    """

    name = "clip_i"
    checkpoints = (CLIP_I, "openai/clip-vit-base-patch16")
    licence = "MIT"
    source = "arXiv:2208.12242"

    def __init__(
        self,
        model: str = CLIP_I,
        pretrained: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        download: bool = False,
    ) -> None:
        super().__init__(load_encoder(model, pretrained, device, dtype, download))

    @staticmethod
    def preflight(options: Mapping[str, Any]) -> None:
        """Raise ValueError for options that cannot work, without loading anything."""
        check_encoder(
            options.get("model", CLIP_I),
            options.get("pretrained"),
            options.get("dtype", "float32"),
            options.get("download", False),
        )


class DinoEncoder(FrozenModel):
    """The class token of a frozen ViT or DINOv2 in transformers' layout, L2-normalised, float32, (N, D)."""

    def __init__(self, model: str, device: str | None = None, dtype: str = "float32", download: bool = False) -> None:
        from transformers import AutoConfig, AutoModel

        check_dtype(dtype)
        check_checkpoint("model", model, download)
        kind = load_pretrained("model", AutoConfig, model, download).model_type
        # DINO's checkpoints have no pooler, which ViTModel would build all the same; DINOv2's model has none.
        options = {"add_pooling_layer": False} if kind == "vit" else {}
        super().__init__(load_model(AutoModel, model, download, **options), device, dtype)
        place = str(Path(model).expanduser()) if is_path(model) else model
        self.preprocess = load_preprocessing(place, IMAGENET, self.model.config.image_size, download)

    def embed_images(self, images: Tensor) -> Tensor:
        """images (N, 3, H, W) in [0, 1] to (N, D); gradients reach the images."""
        check_images(images)
        pixels = self.preprocess(self.follow(images)).to(self.dtype)
        return F.normalize(self.model(pixel_values=pixels).last_hidden_state[:, 0].float(), dim=-1)


@register_reward("dino")
class DinoReward(_Likeness):
    """Mean cosine of a picture's DINO class token with those of its references; higher is liker.

    Stricter than CLIP-I on whether it is the same thing rather than the same kind of thing. Ignores prompts; gradients
    reach the images (not the references).

    Args:
        model: folder or hub id of a DINO or DINOv2 checkpoint in transformers' layout.
        device, dtype, download: as for HfEncoder.
    """

    name = "dino"
    checkpoints = (DINO, "facebook/dinov2-base")
    licence = "Apache-2.0"
    source = "arXiv:2208.12242, arXiv:2104.14294"

    def __init__(
        self, model: str = DINO, device: str | None = None, dtype: str = "float32", download: bool = False
    ) -> None:
        super().__init__(DinoEncoder(model, device, dtype, download))

    @staticmethod
    def preflight(options: Mapping[str, Any]) -> None:
        """Raise ValueError for options that cannot work, without loading anything."""
        check_dtype(options.get("dtype", "float32"))
        check_checkpoint("model", options.get("model", DINO), options.get("download", False))


def off_diagonal_mean(features: Tensor) -> Tensor:
    """Mean cosine over the pairs of each set: L2-normalised features (N, n, D), n >= 2, to (N,)."""
    n = features.shape[1]
    cosines = features @ features.transpose(1, 2)
    return (cosines.sum(dim=(1, 2)) - cosines.diagonal(dim1=1, dim2=2).sum(dim=1)) / (n * (n - 1))


@register_reward("set_consistency")
class SetConsistencyReward:
    """How alike the panels of a picture, or the frames of a video, are: mean cosine over pairs; higher is liker.

    The score of PaCo's benchmark for consistent sets. Ignores prompts; gradients reach the images. A single panel or
    frame has no pair and is invalid.

    Args:
        rows, columns: how many panels a picture is made of; pixels that do not divide evenly are left out at the right
            and bottom edges. Videos ignore it: each frame is a panel.
        model, pretrained, device, dtype, download: as for `load_encoder`.
    """

    name = "set_consistency"
    differentiable = True
    kind = "pointwise"
    range = (-1.0, 1.0)
    needs = ()
    media = "both"
    checkpoints = ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K",)
    licence = "MIT"
    source = "PaCo-RL, arXiv:2512.04784"

    def __init__(
        self,
        rows: int = 2,
        columns: int = 2,
        model: str = OPEN_CLIP[0],
        pretrained: str | None = OPEN_CLIP[1],
        device: str | None = None,
        dtype: str = "float32",
        download: bool = False,
    ) -> None:
        _check_grid(rows, columns)
        self.rows, self.columns = rows, columns
        self.encoder = load_encoder(model, pretrained, device, dtype, download)

    @staticmethod
    def preflight(options: Mapping[str, Any]) -> None:
        """Raise ValueError for options that cannot work, without loading anything."""
        _check_grid(options.get("rows", 2), options.get("columns", 2))
        check_encoder(
            options.get("model", OPEN_CLIP[0]),
            options.get("pretrained", OPEN_CLIP[1]),
            options.get("dtype", "float32"),
            options.get("download", False),
        )

    def __call__(self, images: Tensor, prompts: Sequence[str], context: Context | None = None) -> RewardOutput:
        """images: (N, 3, H, W), or videos (N, F, 3, H, W), in [0, 1]. Returns scores (N,), float32."""
        video = is_video(images)
        (check_videos if video else check_images)(images)
        panels = images if video else split_panels(images, self.rows, self.columns)
        features = self.encoder.embed_images(panels.flatten(0, 1)).unflatten(0, panels.shape[:2])
        if panels.shape[1] == 1:
            nothing = torch.zeros(len(images), dtype=torch.bool)
            return RewardOutput(features.sum(dim=(1, 2)) * 0, rationale=["one panel"] * len(images), valid=nothing)
        return RewardOutput(off_diagonal_mean(features))


def split_panels(images: Tensor, rows: int, columns: int) -> Tensor:
    """Pictures (N, 3, H, W) as their panels, row by row: (N, rows * columns, 3, H // rows, W // columns)."""
    height, width = images.shape[-2] // rows, images.shape[-1] // columns
    if not height or not width:
        raise ValueError(f"images: got {tuple(images.shape)}, expected at least {rows} by {columns} pixels, the panels")
    cut = images[..., : rows * height, : columns * width]
    return cut.unflatten(3, (columns, width)).unflatten(2, (rows, height)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def _check_grid(rows: int, columns: int) -> None:
    for name, value in (("rows", rows), ("columns", columns)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: got {value!r}, expected a whole number of at least 1")
