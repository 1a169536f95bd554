"""HPSv3 (Ma et al. 2025, arXiv:2508.03789): human preference as a Gaussian, from a head on Qwen2-VL."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visalign.images import check_images
from visalign.rewards.base import Context, RewardOutput, check_prompts, register_reward
from visalign.rewards.vlm.chat import Message
from visalign.rewards.vlm.heads import (
    PIXELS,
    check_head_options,
    convert_state_dict,
    find_file,
    load_backbone,
    make_head,
    read_weights,
)
from visalign.rewards.vlm.judging import fill, load_template

REPO, FILE = "MizzenAI/HPSv3", "HPSv3.safetensors"


def uncertainty_loss(
    mean_chosen: Tensor,
    std_chosen: Tensor,
    mean_rejected: Tensor,
    std_rejected: Tensor,
    generator: torch.Generator | None = None,
    samples: int = 1000,
) -> Tensor:
    """-mean_s log sigmoid(z_s), z ~ N(m_c - m_r, s_c^2 + s_r^2), of pairs (N,) to (N,); HPSv3's training loss.

    With both deviations 0 it is the Bradley-Terry loss. Differentiable in all four (reparameterised).
    """
    noise = torch.randn(samples, *mean_chosen.shape, generator=generator, dtype=mean_chosen.dtype)
    std = (std_chosen**2 + std_rejected**2).sqrt()
    return -F.logsigmoid(mean_chosen - mean_rejected + std * noise.to(mean_chosen.device)).mean(dim=0)


@register_reward("hpsv3")
class HPSv3Reward:
    """Human preference for a picture of its prompt; higher is better; gradients reach the images.

    Unbounded; only differences within a prompt mean something. `uncertainty` is the predicted standard deviation. The
    checkpoint is a whole Qwen2-VL-7B, about 16 GB in bfloat16, with the head `rm_head` on the state at `<|Reward|>`.
    Pictures are resized to 200704 pixels, bicubic, as its processor does, without rounding to 8 bits.

    Args:
        weights: HPSv3.safetensors (or a .pth); None: that of MizzenAI/HPSv3 in the hub's cache.
        base: folder or hub id with configuration and processor of the backbone; its weights are not read.
        template: the question the checkpoint was trained on, with "{prompt}" and one <|Reward|> (HPSv3++ has another):
            a .txt file or the text; None: hpsv3.txt in the folder of templates, see `load_template`.
        device: where to run; None follows the images. dtype: of the backbone; the head is float32.
        pixels: of a picture, as trained.
        batch_size: sequences the language model runs at once.
    """

    name = "hpsv3"
    differentiable = True
    kind = "pointwise"
    media = "images"
    needs = ("prompts",)
    range = (-math.inf, math.inf)
    checkpoints = (REPO,)
    licence = "MIT; base model Apache-2.0"
    source = "arXiv:2508.03789"

    def __init__(
        self,
        weights: str | Path | None = None,
        base: str = "Qwen/Qwen2-VL-7B-Instruct",
        template: str | Path | None = None,
        device: str | None = None,
        dtype: str = "bfloat16",
        pixels: int = PIXELS,
        batch_size: int = 8,
        download: bool = False,
    ) -> None:
        options = {"weights": weights, "template": template, "dtype": dtype, "pixels": pixels}
        self.preflight({**options, "batch_size": batch_size})
        self.template = load_template("hpsv3", template)
        state = convert_state_dict(read_weights(weights or find_file(REPO, [FILE], download)))
        self.vlm = load_backbone(base, state, device, dtype, download, pixels, batch_size)
        self.head = make_head(state, "rm_head", self.vlm.model.config.get_text_config().hidden_size)

    @staticmethod
    def preflight(options: Mapping[str, Any]) -> None:
        """Raise ValueError for options that cannot work, without loading anything."""
        check_head_options(options)
        load_template("hpsv3", options.get("template"))

    def __call__(self, images: Tensor, prompts: Sequence[str], context: Context | None = None) -> RewardOutput:
        """images: (N, 3, H, W) in [0, 1]; prompts: N strings. Scores and uncertainty (N,), float32."""
        check_images(images)
        check_prompts(images, prompts)
        chats = [[Message("user", fill(self.template, prompt, (image,)))] for image, prompt in zip(images, prompts)]
        hidden = self.vlm.at_token(chats, self.name)
        mean, log_std = self.head.to(hidden.device)(hidden).unbind(dim=-1)
        return RewardOutput(mean, uncertainty=log_std.exp())
