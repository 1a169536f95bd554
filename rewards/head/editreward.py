"""EditReward (Wu et al. 2025, arXiv:2509.26346): two heads on Qwen2.5-VL, for an edit's faithfulness and its looks."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visalign.images import check_images
from visalign.names import unknown_name
from visalign.rewards.base import Context, RewardOutput, check_prompts, register_reward
from visalign.rewards.vlm.chat import Message
from visalign.rewards.vlm.heads import (
    PIXELS,
    check_head_options,
    convert_state_dict,
    load_backbone,
    make_head,
    read_weights,
)
from visalign.rewards.vlm.judging import fill, load_templates, source_images

WHERE = "https://huggingface.co/collections/TIGER-Lab/editreward-68ddf026ef9eb1510458abc6"
POOLING = ("mean", "min", "sum")
DIMENSIONS = ("following", "quality")
TEMPLATES = {dimension: f"editreward_{dimension}" for dimension in DIMENSIONS}


def pool_heads(outputs: Tensor, pooling: str) -> Tensor:
    """What the heads say, (H, N, 2) of mean and log standard deviation, as one: (N, 2).

    "mean" and "min" take either column for itself; "sum" adds the means, and the variances.
    """
    if pooling == "sum":
        return torch.stack([outputs[..., 0].sum(0), torch.logsumexp(2 * outputs[..., 1], dim=0) / 2], dim=-1)
    return outputs.mean(dim=0) if pooling == "mean" else outputs.amin(dim=0)


@register_reward("editreward")
class EditRewardReward:
    """How well an edit follows its instruction and how good it looks; higher is better; gradients reach the images.

    Unbounded. Images are edits, prompts their instructions, `references` hold each source image first. Each head reads
    the hidden state at `<|Reward|>` under a question of its own; the criteria are their means, the uncertainty is the
    pooled standard deviation.

    Args:
        weights: a checkpoint's model.safetensors or model.pth; see WHERE.
        base: folder or hub id with configuration and processor of the backbone; its weights are not read. The other
            checkpoint's is "XiaomiMiMo/MiMo-VL-7B-SFT-2508".
        templates: the questions "following" and "quality", with "{prompt}", each a .txt file or the text; those left
            out are editreward_*.txt in the folder of templates, see `load_template`.
        pooling: "mean" (as trained), "min" or "sum"; see `pool_heads`.
        device, dtype, pixels, batch_size, download: as for `hpsv3`.
    """

    name = "editreward"
    differentiable = True
    kind = "pointwise"
    media = "images"
    needs = ("prompts", "references")
    range = (-math.inf, math.inf)
    checkpoints = (WHERE,)
    licence = "see the models' pages"
    source = "arXiv:2509.26346"

    def __init__(
        self,
        weights: str | Path,
        base: str = "Qwen/Qwen2.5-VL-7B-Instruct",
        templates: Mapping[str, str | Path] | None = None,
        pooling: str = "mean",
        device: str | None = None,
        dtype: str = "bfloat16",
        pixels: int = PIXELS,
        batch_size: int = 8,
        download: bool = False,
    ) -> None:
        options = {"weights": weights, "templates": templates, "pooling": pooling, "dtype": dtype, "pixels": pixels}
        self.preflight({**options, "batch_size": batch_size})
        self.pooling = pooling
        self._templates = load_templates(TEMPLATES, templates)
        state = convert_state_dict(read_weights(weights))
        self.vlm = load_backbone(base, state, device, dtype, download, pixels, batch_size)
        width = self.vlm.model.config.get_text_config().hidden_size
        self.heads = torch.nn.ModuleList(make_head(state, f"rm_heads.head_{k}", width) for k in range(2))

    @staticmethod
    def preflight(options: Mapping[str, Any]) -> None:
        """Raise ValueError for options that cannot work, without loading anything."""
        if not options.get("weights"):
            raise ValueError(f"weights: got none, expected a file model.safetensors or model.pth from {WHERE}")
        check_head_options(options)
        if options.get("pooling", POOLING[0]) not in POOLING:
            raise unknown_name("pooling", options["pooling"], POOLING)
        load_templates(TEMPLATES, options.get("templates"))

    def __call__(self, images: Tensor, prompts: Sequence[str], context: Context | None = None) -> RewardOutput:
        """images: (N, 3, H, W) edits in [0, 1]; prompts: N instructions; context["references"]: the source images."""
        check_images(images)
        check_prompts(images, prompts)
        sources = source_images(context, len(images), self.name)
        conversations = [
            [Message("user", fill(template, prompt, (source, edit)))]
            for template in self._templates.values()
            for source, edit, prompt in zip(sources, images, prompts)
        ]
        hidden = self.vlm.at_token(conversations, self.name).view(2, len(images), -1)
        outputs = torch.stack([head(h) for head, h in zip(self.heads.to(hidden.device), hidden)])
        mean, log_std = pool_heads(outputs, self.pooling).unbind(dim=-1)
        return RewardOutput(mean, dict(zip(DIMENSIONS, outputs[..., 0])), uncertainty=log_std.exp())
