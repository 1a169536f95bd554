"""PromptEcho: how likely a vision-language model, asked to describe the picture, would say the prompt."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from visalign.images import check_images
from visalign.rewards.base import Context, check_prompts, register_reward
from visalign.rewards.vlm.chat import Message
from visalign.rewards.vlm.yes_token import check_judge_options, token_log_probs

from .vlm_yes import fill_in

QUERY = "Describe this image in detail"  # part of the metric; whether a full stop follows is not published


@register_reward("prompt_echo")
class PromptEcho:
    """mean_t log p(c_t | c_<t, picture, query) over the prompt's tokens c; higher is better; range (-inf, 0].

    The prompt is put into the model's mouth (teacher-forced); logits are made at its places only. Gradients reach the
    images of a local Qwen-VL. No code of it is public: formula and query follow the paper, that only the prompt's own
    tokens count (neither the template's nor the end of turn) is our reading. Needs a local model: endpoints do not
    give the likelihood of given text.

    Args:
        query: the user's turn after the picture.
        label: what the model is made to say, with {prompt} where the prompt goes, such as a JSON line for rendered
            text.
        reduction: "mean", or "sum", which is the mean times the prompt's number of tokens.
        end_of_turn: count the token that ends the turn as well.
        minus_text: subtract the likelihood without the picture: what the picture adds. Constant within a prompt.
        options: of `VLM`.
    """

    name = "prompt_echo"
    kind = "pointwise"
    media = "images"
    range = (-math.inf, 0.0)
    needs = ("prompts",)
    checkpoints = ("Qwen/Qwen3-VL-32B-Instruct", "Qwen/Qwen3-VL-8B-Instruct")
    licence = "that of the model"
    source = "PromptEcho (paper; no reward code is public)"

    def __init__(
        self,
        model: str,
        query: str = QUERY,
        label: str = "{prompt}",
        reduction: str = "mean",
        end_of_turn: bool = False,
        minus_text: bool = False,
        **options: Any,
    ) -> None:
        from visalign.rewards.vlm.model import VLM

        self.query, self.label, self.reduction = query, label, reduction
        self.end_of_turn, self.minus_text = end_of_turn, minus_text
        self.vlm = VLM(model, **options) if isinstance(model, str) else model
        self.differentiable = self.vlm.differentiable
        if minus_text:
            self.range = (-math.inf, math.inf)

    @staticmethod
    def preflight(options: Mapping[str, Any]) -> None:
        """Raise ValueError for options that cannot work, without loading anything."""
        if "url" in options:
            raise ValueError("url: got an endpoint, expected none: prompt_echo reads likelihoods of a local model")
        check_judge_options(options, PromptEcho)
        if options.get("reduction", "mean") not in ("mean", "sum"):
            raise ValueError(f"reduction: got {options['reduction']!r}, expected 'mean' or 'sum'")
        if "{prompt}" not in options.get("label", "{prompt}"):
            raise ValueError(f"label: got {options['label']!r}, expected {{prompt}} in it")

    def __call__(self, images: Tensor, prompts: Sequence[str], context: Context | None = None) -> Tensor:
        """images: (N, 3, H, W) in [0, 1]; prompts that are not empty. Returns (N,), float32."""
        check_images(images)
        check_prompts(images, prompts)
        scores = self._likelihood([(picture, self.query) for picture in images.unbind()], prompts)
        if self.minus_text:
            with torch.no_grad():
                scores = scores - self._likelihood([(self.query,)] * len(prompts), prompts)
        return scores

    def _likelihood(self, turns: Sequence[tuple[Tensor | str, ...]], prompts: Sequence[str]) -> Tensor:
        asked_prompts = [self.vlm.prompt([Message("user", turn)]) for turn in turns]
        labels = [self.vlm.continuation(p.text[-64:], fill_in(self.label, c)) for p, c in zip(asked_prompts, prompts)]
        if self.end_of_turn:
            labels = [[*label, self.vlm.tokenizer.eos_token_id] for label in labels]
        if not all(labels):
            raise ValueError(f"prompts: got an empty one at {[len(x) for x in labels].index(0)}, expected some words")
        sums = token_log_probs(self.vlm, asked_prompts, labels).sum(dim=1)
        lengths = torch.tensor([len(label) for label in labels], device=sums.device)
        return sums if self.reduction == "sum" else sums / lengths
