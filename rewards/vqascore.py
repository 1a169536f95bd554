"""VQAScore: how likely a vision-language model says Yes when asked whether the picture shows the prompt."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from visalign.images import check_images

from .base import Context, check_prompts, register_reward
from .chat import Message
from .output import RewardOutput
from .vlm_yes import chosen, fill_in, score_range
from .yes_token import YesNo, check_judge_options

QUESTION = 'Does this figure show "{prompt}"? Please answer Yes or No.'  # these few words are part of the metric


@register_reward("vqascore")
class VqaScore:
    """P("Yes") over the whole vocabulary at the answer's first token; higher is better; range (0, 1).

    The decoder-only form, for Qwen-VL and other chat models; an answer of several tokens scores the geometric mean of
    theirs. Gradients reach the images of a local Qwen-VL. The encoder-decoder form with CLIP-FlanT5 is not part of
    this. Source: Lin et al. 2024, arXiv:2404.01291.

    Args:
        model: hub id or folder, or with `url` the server's name of it.
        question: with {prompt} where the prompt goes. t2v_metrics asks some models in other words: 'Does this image
            show "{prompt}"?' of Qwen2.5-VL; scores of different questions do not compare.
        yes, no: the answer that is scored, and what `output="log_odds"` sets it against.
        options: of `VLM`, or with `url` of `RemoteChat`.
    """

    name = "vqascore"
    kind = "pointwise"
    media = "images"
    needs = ("prompts",)
    checkpoints = ("Qwen/Qwen2.5-VL-7B-Instruct",)
    licence = "that of the model"
    source = "arXiv:2404.01291"

    def __init__(
        self,
        model: str,
        url: str | None = None,
        question: str = QUESTION,
        yes: str = "Yes",
        no: str = "No",
        output: str = "probability",
        **options: Any,
    ) -> None:
        self.question = question
        self.judge = YesNo(model, url, yes, no, "full", **options)
        self.differentiable = self.judge.differentiable
        self.output, self.range = output, score_range(output)

    @staticmethod
    def preflight(options: Mapping[str, Any]) -> None:
        """Raise ValueError for options that cannot work, without loading anything."""
        check_judge_options(options, VqaScore)
        if "{prompt}" not in options.get("question", QUESTION):
            raise ValueError(f"question: got {options['question']!r}, expected {{prompt}} in it")

    def __call__(self, images: Tensor, prompts: Sequence[str], context: Context | None = None) -> RewardOutput:
        """images: (N, 3, H, W) in [0, 1]."""
        check_images(images)
        check_prompts(images, prompts)
        pairs = zip(images.unbind(), prompts)
        answers = self.judge([[Message("user", (picture, fill_in(self.question, p)))] for picture, p in pairs])
        return RewardOutput(chosen(answers, self.output), rationale=answers.errors, valid=answers.valid)
