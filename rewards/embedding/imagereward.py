"""ImageReward (Xu et al. 2023, arXiv:2304.05977): BLIP, reading the prompt with an eye on the picture, and a head
taught which of two pictures people prefer."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visalign.images import check_images
from visalign.rewards.base import Context, check_prompts, register_reward

from .encoder import preprocess
from .frozen import FrozenModel, check_checkpoint, check_dtype, hub_file, load_pretrained
from .preprocessing import CLIP

REPO, FILE, CONFIG, TOKENIZER = "THUDM/ImageReward", "ImageReward.pt", "med_config.json", "bert-base-uncased"
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of raw scores on the training prompts, as published
MAX_TOKENS = 35
HEAD_WIDTH = 64  # of the vision transformer's attention heads, which the file does not tell
VISION_NAMES = (  # timm's names in BLIP's file, transformers' here
    (r"cls_token$", "embeddings.class_embedding"),
    (r"pos_embed$", "embeddings.position_embedding"),
    (r"patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"norm\.", "post_layernorm."),
    (r"blocks\.(\d+)\.norm([12])\.", r"encoder.layers.\1.layer_norm\2."),
    (r"blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
)


def convert_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """ImageReward.pt's keys (`blip.visual_encoder.`, `blip.text_encoder.`, `mlp.layers.`) to `build_model`'s.

    Whatever else is under `blip.` (projections that pretraining used) is left out, as is the list of positions.

    Raises:
        ValueError: a key that is none of these; names it.
    """
    converted = {}
    for key, value in state.items():
        if key.startswith("blip.visual_encoder."):
            name = key.removeprefix("blip.visual_encoder.")
            renamed = [re.sub("^" + old, new, name) for old, new in VISION_NAMES if re.match(old, name)]
            if not renamed:
                raise ValueError(f"weights: got an unknown key {key!r}")
            converted[f"vision.{renamed[0]}"] = value
        elif key.startswith("blip.text_encoder."):
            if not key.endswith("position_ids"):
                converted[key.replace("blip.text_encoder.", "text.", 1)] = value
        elif key.startswith("mlp.layers."):
            converted[key.replace("mlp.layers.", "head.", 1)] = value
        elif not key.startswith("blip."):
            raise ValueError(f"weights: got an unknown key {key!r}")
    return converted


def build_model(weights: Mapping[str, Tensor], text_config: Mapping[str, Any]) -> nn.ModuleDict:
    """`vision`, `text` and `head` with the converted weights; their sizes are read off the weights.

    Raises:
        ValueError: missing or extra keys, or shapes that do not fit; names one.
    """
    from transformers import BlipTextConfig, BlipVisionConfig
    from transformers.models.blip.modeling_blip import BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    needed = ("vision.embeddings.patch_embedding.weight", "vision.embeddings.position_embedding", "head.0.weight")
    for key in needed:
        if key not in weights:
            raise ValueError(f"weights: got none for {key!r}, expected the layout of {FILE}")
    width, _, patch, _ = weights[needed[0]].shape
    vision_config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=weights["vision.encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=len({key.split(".")[3] for key in weights if key.startswith("vision.encoder.layers.")}),
        num_attention_heads=max(1, width // HEAD_WIDTH),
        image_size=patch * math.isqrt(weights[needed[1]].shape[1] - 1),
        patch_size=patch,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes_given = {key: text_config[key] for key in (*sizes, "max_position_embeddings", "hidden_act", "layer_norm_eps")}
    # is_decoder makes the layers that look at the picture; the text is read in both directions all the same.
    config = BlipTextConfig(**sizes_given, encoder_hidden_size=width, is_decoder=True, pad_token_id=0)
    model = nn.ModuleDict(
        {
            "vision": BlipVisionModel(vision_config),
            "text": BlipTextModel(config, add_pooling_layer=False),
            "head": make_head(config.hidden_size),
        }
    )
    try:
        model.load_state_dict(dict(weights), strict=True)
    except RuntimeError as error:
        raise ValueError(f"weights: {' '.join(str(error).split())[:400]}") from error
    return model


def make_head(width: int) -> nn.Sequential:
    """The published head: linear layers 0, 2, 4, 6 and 7 with dropout between, no activations, so one affine map."""
    return nn.Sequential(
        nn.Linear(width, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )


@register_reward("imagereward")
class ImageReward:
    """How much people prefer the picture for its prompt, standardised; higher is better; gradients reach the images.

    Unbounded, about -2.3 to 2. Prompts are cut off at 35 tokens.

    Args:
        weights: the published ImageReward.pt; None: from the hub's cache.
        config: med_config.json; None: the one beside the weights.
        tokenizer: folder or id of BERT's uncased tokenizer, to which BLIP's two extra tokens are added here.
        device: where to run; None follows the images.
        dtype: of BLIP's weights; the head is float32.
        download: fetch files that are not in the local cache; without it they are an error.
    """

    name = "imagereward"
    differentiable = True
    kind = "pointwise"
    range = (-math.inf, math.inf)
    needs = ("prompts",)
    media = "images"
    checkpoints = (f"{REPO}: {FILE}", f"{REPO}: {CONFIG}", TOKENIZER)
    licence = "Apache-2.0"
    source = "arXiv:2304.05977"

    def __init__(
        self,
        weights: str | Path | None = None,
        config: str | Path | None = None,
        tokenizer: str = TOKENIZER,
        device: str | None = None,
        dtype: str = "float32",
        download: bool = False,
    ) -> None:
        from transformers import AutoTokenizer

        check_dtype(dtype)
        path, settings = _files(weights, config, download)
        model = build_model(convert_state_dict(_read(path)), json.loads(settings.read_text(encoding="utf-8")))
        self._frozen = FrozenModel(model, device, dtype)
        self._frozen.model["head"].float()
        self._tokenizer = load_pretrained("tokenizer", AutoTokenizer, tokenizer, download)
        self._tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
        vocabulary = self._frozen.model["text"].config.vocab_size
        if len(self._tokenizer) > vocabulary:
            raise ValueError(f"tokenizer: got {len(self._tokenizer)} tokens, expected at most the model's {vocabulary}")

    @staticmethod
    def preflight(options: Mapping[str, Any]) -> None:
        """Raise ValueError for options that cannot work, without loading anything."""
        check_dtype(options.get("dtype", "float32"))
        download = options.get("download", False)
        check_checkpoint("tokenizer", options.get("tokenizer", TOKENIZER), download, "tokenizer_config.json")
        if options.get("weights") is not None or not download:
            _files(options.get("weights"), options.get("config"), download)

    def __call__(self, images: Tensor, prompts: Sequence[str], context: Context | None = None) -> Tensor:
        """images: (N, 3, H, W) in [0, 1]; prompts: N strings. Returns (N,), float32 on the model's device."""
        check_images(images)
        check_prompts(images, prompts)
        images = self._frozen.follow(images)
        model = self._frozen.model
        pixels = preprocess(images, model["vision"].config.image_size, CLIP.mean, CLIP.std, "bicubic", "shortest")
        seen = model["vision"](pixel_values=pixels.to(self._frozen.dtype)).last_hidden_state
        tokens = self._tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(images.device)
        read = model["text"](tokens["input_ids"], attention_mask=tokens["attention_mask"], encoder_hidden_states=seen)
        raw = model["head"](read.last_hidden_state[:, 0].float()).squeeze(-1)
        return (raw - MEAN) / STD


def _files(weights: str | Path | None, config: str | Path | None, download: bool) -> tuple[Path, Path]:
    path = hub_file("weights", weights, REPO, FILE, download)
    beside = path.parent / CONFIG
    return path, hub_file("config", beside if config is None and beside.is_file() else config, REPO, CONFIG, download)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"weights: could not read {str(path)!r}: {' '.join(str(error).split())[:200]}") from error
