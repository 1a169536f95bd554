"""The LAION aesthetic predictor, version 2: a small head on CLIP image embeddings, trained on people's ratings."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visalign.images import check_images
from visalign.rewards.base import Context, register_reward

from .encoder import ClipEncoder, check_clip_options

FILE = "sac+logos+ava1-l14-linearMSE.pth"
DEFAULT = Path("~/.cache/visalign") / FILE
SOURCE = "https://github.com/christophschuhmann/improved-aesthetic-predictor"
LAYERS = (0, 2, 4, 6, 7)  # places 1, 3 and 5 were dropout in training; nothing else stands between the linear layers


def find_head(weights: str | Path | None) -> Path:
    """The head's file, or a ValueError that says which file to get and where to put it."""
    path = Path(DEFAULT if weights is None else weights).expanduser()
    if not path.is_file():
        raise ValueError(
            f"weights: got no file at {str(path)!r}, expected the aesthetic head {FILE!r}: get it from {SOURCE} and "
            "put it there, or pass weights=PATH"
        )
    return path


def load_head(path: Path) -> tuple[Tensor, Tensor]:
    """The head in a .pth (tensors only) or safetensors file as what five linear layers in a row are: one affine map.

    Returns:
        weight (D,) and bias (), float32, multiplied out in float64: the score of features is weight . features + bias.

    Raises:
        ValueError: keys other than `layers.{0,2,4,6,7}.{weight,bias}`, or shapes that do not follow on each other.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"weights: could not read {str(path)!r}: {' '.join(str(error).split())[:200]}") from error
    expected = {f"layers.{k}.{part}" for k in LAYERS for part in ("weight", "bias")}
    if not isinstance(state, dict) or set(state) != expected:
        odd = sorted(str(key) for key in set(state) ^ expected) if isinstance(state, dict) else type(state).__name__
        raise ValueError(
            f"weights: got a file {str(path)!r} with missing or extra keys {odd}, expected the layout of {FILE}"
        )
    layers = [(state[f"layers.{k}.weight"].double(), state[f"layers.{k}.bias"].double()) for k in LAYERS]
    width = inputs = layers[0][0].shape[-1]
    matrix, offset = torch.eye(inputs, dtype=torch.float64), torch.zeros(inputs, dtype=torch.float64)
    for k, (weight, bias) in zip(LAYERS, layers):
        if weight.ndim != 2 or weight.shape[1] != width or bias.shape != weight.shape[:1]:
            got = f"{tuple(weight.shape)} with bias {tuple(bias.shape)}"
            raise ValueError(f"weights: got layers.{k} of shape {got}, expected input width {width}")
        width = weight.shape[0]
        matrix, offset = weight @ matrix, weight @ offset + bias
    if width != 1:
        raise ValueError(f"weights: got {width} outputs, expected 1")
    return matrix.squeeze(0).float(), offset.squeeze(0).float()


@register_reward("aesthetic")
class AestheticReward:
    """Predicted mean human rating of a picture's looks; higher is better; gradients reach the images.

    Ratings run from 1 to 10 and predictions from about 4 to 7, but nothing bounds them. Ignores prompts. The head
    (768-1024-128-64-16-1, no activations) reads the L2-normalised embedding of OpenAI's CLIP ViT-L/14 (MIT); the head's
    repository is given by SOURCE, see its terms. Neither is shipped: the user brings both.
    """

    name = "aesthetic"
    differentiable = True
    kind = "pointwise"
    range = (-math.inf, math.inf)
    needs = ()

    def __init__(
        self,
        weights: str | Path | None = None,
        model: str = "ViT-L-14",
        pretrained: str | None = "openai",
        device: str | None = None,
        dtype: str = "float32",
        download: bool = False,
    ) -> None:
        check_clip_options(model, pretrained, dtype)
        self._weight, self._bias = load_head(find_head(weights))
        self.encoder = ClipEncoder(model, pretrained, device, dtype, download)
        head, clip = len(self._weight), self.encoder.embedding_size
        if head != clip:
            raise ValueError(f"weights: got a head for {head} features, expected {clip}, as {model!r} gives")

    @staticmethod
    def preflight(options: Mapping[str, Any]) -> None:
        """Raise ValueError for options that cannot work, without loading anything."""
        model, pretrained = options.get("model", "ViT-L-14"), options.get("pretrained", "openai")
        check_clip_options(model, pretrained, options.get("dtype", "float32"))
        find_head(options.get("weights"))

    def __call__(self, images: Tensor, prompts: Sequence[str], context: Context | None = None) -> Tensor:
        """images: (N, 3, H, W) in [0, 1]. Returns (N,), float32 on the model's device."""
        check_images(images)
        features = self.encoder.embed_images(images)
        if self._weight.device != features.device:
            self._weight, self._bias = self._weight.to(features.device), self._bias.to(features.device)
        return (features * self._weight).sum(dim=-1) + self._bias
