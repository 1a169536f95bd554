"""VQAScore: how likely a vision-language model says Yes when asked whether the picture shows the prompt."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from visalign.images import check_images
from visalign.names import unknown_name
from visalign.rewards.base import Context, RewardOutput, check_prompts, register_reward
from visalign.rewards.vlm.chat import Message
from visalign.rewards.vlm.yes_token import YesNo, check_judge_options

from .vlm_yes import chosen, fill_in, score_range

QUESTION = 'Does this figure show "{prompt}"? Please answer Yes or No.'  # these few words are part of the metric


@register_reward("vqascore")
class VqaScore:
    """P("Yes") over the whole vocabulary; higher is better; range (0, 1). Source: Lin et al. 2024, arXiv:2404.01291.

    The checkpoint's config.json tells the form. With CLIP-FlanT5 (model_type "clip_t5") it is the geometric mean over
    the answer's tokens and the end token, as published; with Qwen-VL and other chat models that of the answer's tokens
    alone, usually one. Gradients reach the images of a local CLIP-FlanT5 or Qwen-VL.

    Args:
        model: hub id or folder, or with `url` the server's name of it.
        question: with {prompt} where the prompt goes; None: the form's own. t2v_metrics asks some models in other
            words: 'Does this image show "{prompt}"?' of Qwen2.5-VL; scores of different questions do not compare.
        yes, no: the answer that is scored, and what `output="log_odds"` sets it against.
        options: of `ClipT5`, `VLM`, or with `url` of `RemoteChat`.
    """

    name = "vqascore"
    kind = "pointwise"
    media = "images"
    needs = ("prompts",)
    checkpoints = ("zhiqiulin/clip-flant5-xxl", "zhiqiulin/clip-flant5-xl", "Qwen/Qwen2.5-VL-7B-Instruct")
    licence = "that of the model"
    source = "arXiv:2404.01291"

    def __init__(
        self,
        model: str,
        url: str | None = None,
        question: str | None = None,
        yes: str = "Yes",
        no: str = "No",
        output: str = "probability",
        **options: Any,
    ) -> None:
        self.yes, self.no = yes, no
        self.judge = self.clip_t5 = None
        if _is_clip_t5(model, url, options):
            from visalign.rewards.vlm import clip_t5

            self.clip_t5 = clip_t5.ClipT5(model, **options)
            self.question, self.differentiable = clip_t5.QUESTION, True
        else:
            self.judge = YesNo(model, url, yes, no, "full", **options)
            self.question, self.differentiable = QUESTION, self.judge.differentiable
        self.question = self.question if question is None else question
        self.output, self.range = output, score_range(output)

    @staticmethod
    def preflight(options: Mapping[str, Any]) -> None:
        """Raise ValueError for options that cannot work, without loading anything."""
        if _is_clip_t5(options.get("model"), options.get("url"), options):
            from visalign.rewards.vlm.clip_t5 import ClipT5, check_options

            known = {*inspect.signature(VqaScore).parameters, *inspect.signature(ClipT5).parameters} - {"options"}
            for name in options:
                if name not in known:
                    raise unknown_name("option", name, known)
            check_judge_options({"output": options.get("output", "probability")}, VqaScore)
            check_options(options)
        else:
            check_judge_options(options, VqaScore)
        question = options.get("question")
        if question is not None and "{prompt}" not in question:
            raise ValueError(f"question: got {question!r}, expected {{prompt}} in it")

    def __call__(self, images: Tensor, prompts: Sequence[str], context: Context | None = None) -> RewardOutput:
        """images: (N, 3, H, W) in [0, 1]."""
        check_images(images)
        check_prompts(images, prompts)
        questions = [fill_in(self.question, prompt) for prompt in prompts]
        if self.clip_t5 is not None:
            return RewardOutput(self._ask_clip_t5(images, questions))
        assert self.judge is not None
        answers = self.judge([[Message("user", (picture, q))] for picture, q in zip(images.unbind(), questions)])
        return RewardOutput(chosen(answers, self.output), rationale=answers.errors, valid=answers.valid)

    def _ask_clip_t5(self, images: Tensor, questions: Sequence[str]) -> Tensor:
        assert self.clip_t5 is not None
        if self.output == "probability":
            [yes] = self.clip_t5(images, questions, [self.yes])
            return yes.mean(dim=1).exp()
        yes, no = self.clip_t5(images, questions, [self.yes, self.no])
        return yes.sum(dim=1) - no.sum(dim=1)


def _is_clip_t5(model: Any, url: str | None, options: Mapping[str, Any]) -> bool:
    if url is not None or not isinstance(model, str):
        return False
    from visalign.rewards.vlm.clip_t5 import is_clip_t5

    return is_clip_t5(model, bool(options.get("download", False)))
