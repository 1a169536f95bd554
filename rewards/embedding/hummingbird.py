"""Hummingbird's two evaluators (Le et al. 2025, arXiv:2502.05153): global and fine likeness to a text by BLIP-2."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visalign.images import check_images
from visalign.names import unknown_name
from visalign.rewards.base import Context, RewardOutput, check_prompts, register_reward

from .frozen import FrozenModel, check_checkpoint, check_dtype, is_path, load_model, load_pretrained
from .preprocessing import CLIP, load_preprocessing

MODEL = "Salesforce/blip2-itm-vit-g"
TEXTS = ("prompts", "descriptions")


@register_reward("hummingbird")
class HummingbirdReward:
    """w_global * R_global + w_fine * R_fine by a frozen BLIP-2 Q-Former; unbounded; gradients reach the images.

    R_global is the highest cosine, over the Q-Former's queries, with the text's embedding (range [-1, 1]); R_fine is
    the image-text matching head's logit for "match", averaged over queries. Both are criteria: "global" and "fine".
    From the paper without its code: the weights are not in its accessible text (1 and 1 here), and the average over
    queries is standard BLIP-2's.

    Args:
        global_weight, fine_weight: of the two parts.
        text: "prompts", or "descriptions": context["descriptions"], N strings, as the paper has a model write them from
            the reference picture and the guidance.
        model: folder or hub id of a `Blip2ForImageTextRetrieval`.
        device, dtype, download: as for HfEncoder; the Q-Former stays in float32.
    """

    name = "hummingbird"
    differentiable = True
    kind = "pointwise"
    range = (-math.inf, math.inf)
    media = "images"
    checkpoints = (MODEL,)
    licence = "MIT"
    source = "arXiv:2502.05153"

    def __init__(
        self,
        global_weight: float = 1.0,
        fine_weight: float = 1.0,
        text: str = "prompts",
        model: str = MODEL,
        device: str | None = None,
        dtype: str = "float32",
        download: bool = False,
    ) -> None:
        from transformers import AutoTokenizer, Blip2ForImageTextRetrieval

        self.preflight({"text": text, "model": model, "dtype": dtype, "download": download})
        self.global_weight, self.fine_weight = global_weight, fine_weight
        self.text, self.needs = text, (text,)
        loaded = load_model(Blip2ForImageTextRetrieval, model, download)
        self._frozen = FrozenModel(loaded, device)
        loaded.vision_model.to({"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype])
        self._tokenizer = load_pretrained("model", AutoTokenizer, model, download)
        self._max_tokens = loaded.config.qformer_config.max_position_embeddings
        place = str(Path(model).expanduser()) if is_path(model) else model
        fallback = replace(CLIP, resize="squash")
        self.preprocess = load_preprocessing(place, fallback, loaded.config.vision_config.image_size, download)

    @staticmethod
    def preflight(options: Mapping[str, Any]) -> None:
        """Raise ValueError for options that cannot work, without loading anything."""
        if options.get("text", "prompts") not in TEXTS:
            raise unknown_name("text", options["text"], TEXTS)
        check_dtype(options.get("dtype", "float32"))
        check_checkpoint("model", options.get("model", MODEL), options.get("download", False))

    def __call__(self, images: Tensor, prompts: Sequence[str], context: Context | None = None) -> RewardOutput:
        """images: (N, 3, H, W) in [0, 1]; prompts: N strings. Returns scores (N,), float32 on the model's device."""
        check_images(images)
        texts = prompts if self.text == "prompts" else list((context or {})["descriptions"])
        check_prompts(images, texts)
        pixels = self.preprocess(self._frozen.follow(images))
        model = self._frozen.model
        vision = model.vision_model(pixel_values=pixels.to(model.vision_model.dtype)).last_hidden_state.float()
        tokens = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=self._max_tokens, return_tensors="pt"
        ).to(vision.device)
        parts = {
            "global": global_likeness(model, vision, tokens["input_ids"], tokens["attention_mask"]),
            "fine": fine_likeness(model, vision, tokens["input_ids"], tokens["attention_mask"]),
        }
        return RewardOutput(self.global_weight * parts["global"] + self.fine_weight * parts["fine"], parts)


def global_likeness(model: Any, vision: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Highest cosine of a query's projection with the text's: vision (N, P, D), ids and mask (N, L), to (N,)."""
    queries = model.query_tokens.expand(len(vision), -1, -1)
    seen = model.qformer(query_embeds=queries, encoder_hidden_states=vision).last_hidden_state
    read = model.qformer(query_embeds=model.embeddings(input_ids=ids), query_length=0, attention_mask=mask)
    image = F.normalize(model.vision_projection(seen), dim=-1)
    text = F.normalize(model.text_projection(read.last_hidden_state[:, 0]), dim=-1)
    return torch.einsum("nqd,nd->nq", image, text).amax(dim=1)


def fine_likeness(model: Any, vision: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """The matching head's logit for "match", mean over queries that also attend to the text: to (N,)."""
    queries = model.query_tokens.expand(len(vision), -1, -1)
    both = model.qformer(
        query_embeds=model.embeddings(input_ids=ids, query_embeds=queries),
        query_length=queries.shape[1],
        attention_mask=torch.cat([mask.new_ones(queries.shape[:2]), mask], dim=1),
        encoder_hidden_states=vision,
    ).last_hidden_state
    return model.itm_head(both[:, : queries.shape[1]]).mean(dim=1)[:, 1]
