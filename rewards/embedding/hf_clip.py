"""Image and text encoders in transformers' layout (CLIP, ALIGN), and choosing between them and open_clip's."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visalign.images import check_images
from visalign.names import unknown_name

from .encoder import ClipEncoder, check_clip_options
from .frozen import FrozenModel, check_checkpoint, check_dtype, is_path, load_model, load_pretrained
from .preprocessing import CLIP, HALF, load_preprocessing

MAX_TOKENS = {"clip": 77, "align": 64}  # by model type; what exceeds them is cut off
FALLBACKS = {"clip": CLIP, "align": replace(HALF, mode="bilinear", resize="squash")}  # where no processor comes along


class HfEncoder(FrozenModel):
    """Embeds images and prompts with a frozen CLIPModel or AlignModel; both L2-normalised, float32, (N, D).

    Args:
        model: a folder written by `save_pretrained`, or a hub id.
        processor: folder or id of the tokenizer and image settings; None: the model's. Without image settings there,
            the constants that the model type was trained with hold.
        device: where to run; None follows the images.
        dtype: of the model's weights: "float32", "bfloat16" or "float16". Embeddings are normalised in float32.
        download: fetch files that are not in the local cache; without it they are an error.

    Raises:
        ValueError: not there, of another type, or incomplete.
    """

    def __init__(
        self,
        model: str,
        processor: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        download: bool = False,
    ) -> None:
        from transformers import AutoConfig, AutoModel, AutoTokenizer

        check_hf_options(model, processor, dtype, download)
        config = load_pretrained("model", AutoConfig, model, download)
        kind = config.model_type
        if kind not in MAX_TOKENS:
            raise unknown_name(f"type of model {model!r}", str(kind), MAX_TOKENS)
        super().__init__(load_model(AutoModel, model, download), device, dtype)
        source = model if processor is None else processor
        self._tokenizer = load_pretrained("processor", AutoTokenizer, source, download)
        self._max_tokens = min(MAX_TOKENS[kind], config.text_config.max_position_embeddings)
        place = str(Path(source).expanduser()) if is_path(source) else source
        self.preprocess = load_preprocessing(place, FALLBACKS[kind], config.vision_config.image_size, download)
        self._texts: dict[str, Tensor] = {}  # each distinct prompt is encoded once

    @property
    def logit_scale(self) -> float:
        """The factor of the cosine in the model's own training loss (about 100)."""
        if hasattr(self.model, "temperature"):  # ALIGN's
            return float(1 / self.model.temperature.detach().float())
        return float(self.model.logit_scale.detach().float().exp())

    def embed_images(self, images: Tensor) -> Tensor:
        """images (N, 3, H, W) in [0, 1] to (N, D); gradients reach the images."""
        check_images(images)
        pixels = self.preprocess(self.follow(images)).to(self.dtype)
        return _normalised(self.model.get_image_features(pixel_values=pixels))

    def embed_texts(self, prompts: Sequence[str]) -> Tensor:
        """prompts to (N, D), no gradient; what exceeds the model's context is cut off."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        if new:
            # Not under inference_mode: these embeddings may later take part in a backward pass.
            with torch.inference_mode(False), torch.no_grad():
                tokens = self._tokenizer(
                    new, padding=True, truncation=True, max_length=self._max_tokens, return_tensors="pt"
                ).to(self.at)
                features = self.model.get_text_features(tokens["input_ids"], attention_mask=tokens["attention_mask"])
                self._texts.update(zip(new, _normalised(features)))
        return torch.stack([self._texts[prompt].to(self.at) for prompt in prompts])


def _normalised(features: Any) -> Tensor:
    return F.normalize(features.pooler_output.float(), dim=-1)


Encoder = HfEncoder | ClipEncoder


def is_hf(model: str) -> bool:
    """Whether `model` is a folder or id in transformers' layout; where a folder has both layouts, open_clip's holds."""
    if model.startswith(("hf-hub:", "local-dir:")):
        return False
    folder = Path(model).expanduser()
    if folder.is_dir():
        return (folder / "config.json").is_file() and not (folder / "open_clip_config.json").is_file()
    return "/" in model and not is_path(model)


def check_hf_options(model: str, processor: str | None, dtype: str, download: bool) -> None:
    """What can be said of these options without loading anything."""
    check_dtype(dtype)
    check_checkpoint("model", model, download)
    if processor is not None and is_path(processor) and not Path(processor).expanduser().is_dir():
        raise ValueError(f"processor: got {processor!r}, which is no folder")


def check_encoder(model: str, pretrained: str | None, dtype: str, download: bool = False) -> None:
    """What can be said of `load_encoder`'s options without loading anything."""
    if not is_hf(model):
        check_clip_options(model, pretrained, dtype)
        return
    if pretrained is not None:
        raise ValueError(f"pretrained: got {pretrained!r}, expected None: {model!r} brings its own weights")
    check_hf_options(model, None, dtype, download)


def load_encoder(
    model: str,
    pretrained: str | None = None,
    device: str | None = None,
    dtype: str = "float32",
    download: bool = False,
) -> Encoder:
    """An image and text encoder in either layout.

    Args:
        model: a folder in transformers' or open_clip's layout; "org/name", a hub id in transformers' layout;
            "hf-hub:org/name", one in open_clip's; or an open_clip model name, which then needs `pretrained`.
    """
    check_encoder(model, pretrained, dtype, download)
    if is_hf(model):
        return HfEncoder(model, None, device, dtype, download)
    return ClipEncoder(model, pretrained, device, dtype, download)
