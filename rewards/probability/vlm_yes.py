"""A vision-language model asked yes/no questions about each picture: the generic judge."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from visalign.images import check_images
from visalign.rewards.base import Context, RewardOutput, check_prompts, register_reward
from visalign.rewards.vlm.chat import Message
from visalign.rewards.vlm.yes_token import Answers, YesNo, check_judge_options

CRITERIA = {
    "faithful": 'Does this image show all of "{prompt}", with the right objects, counts, colours and positions, and '
    "nothing that contradicts it? Answer Yes or No.",
    "quality": "Is this a high-quality image: sharp, well composed, and free of distortions and artefacts? "
    "Answer Yes or No.",
}


def fill_in(template: str, prompt: str) -> str:
    """The template with the prompt in it. Not `str.format`: prompts hold braces and quotes."""
    return template.replace("{prompt}", prompt)


def chosen(answers: Answers, output: str) -> Tensor:
    """(N,) probabilities or log-odds."""
    return answers.probability if output == "probability" else answers.log_odds


def score_range(output: str) -> tuple[float, float]:
    return (0.0, 1.0) if output == "probability" else (-math.inf, math.inf)


@register_reward("vlm_yes")
class VlmYes:
    """Mean over questions of P(yes) about each picture; higher is better; range (0, 1).

    Each question is a criterion in the output. The picture comes first and runs once for all its questions. Gradients
    reach the images of a local Qwen-VL; at an endpoint (`url`) there are none. Any vision-language model will do; none
    is shipped, see its own licence. Formula: rewards of Flow-Factory's `vllm_evaluate` and others; the questions are
    ours.

    Args:
        model: hub id or folder, or with `url` the server's name of it.
        criteria: questions, with {prompt} where the prompt goes, by name or in a list; None: faithfulness and quality.
        convention: "full", "binary" or "canonical"; see `yes_token`.
        output: "probability", or "log_odds", unbounded, whose gradient does not fade.
        options: of `VLM` (device, dtype, download, batch_size, max_pixels, ...) or, with `url`, of `RemoteChat`.
    """

    name = "vlm_yes"
    kind = "pointwise"
    media = "images"
    needs = ("prompts",)
    checkpoints = ("Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen3-VL-8B-Instruct")
    licence = "that of the model"
    source = "Flow-Factory, vllm_evaluate"

    def __init__(
        self,
        model: str,
        url: str | None = None,
        criteria: Mapping[str, str] | Sequence[str] | None = None,
        yes: str = "Yes",
        no: str = "No",
        convention: str = "binary",
        output: str = "probability",
        **options: Any,
    ) -> None:
        self.criteria = named_questions(criteria)
        self.judge = YesNo(model, url, yes, no, convention, **options)
        self.differentiable = self.judge.differentiable
        self.output, self.range = output, score_range(output)

    @staticmethod
    def preflight(options: Mapping[str, Any]) -> None:
        """Raise ValueError for options that cannot work, without loading anything."""
        check_judge_options(options, VlmYes)
        named_questions(options.get("criteria"))

    def __call__(self, images: Tensor, prompts: Sequence[str], context: Context | None = None) -> RewardOutput:
        """images: (N, 3, H, W) in [0, 1]."""
        check_images(images)
        check_prompts(images, prompts)
        answers = self.judge(
            [
                [Message("user", (picture, fill_in(question, prompt)))]
                for picture, prompt in zip(images.unbind(), prompts)
                for question in self.criteria.values()
            ]
        )
        values = chosen(answers, self.output).view(len(prompts), -1)
        errors = [answers.errors[k : k + len(self.criteria)] for k in range(0, len(answers.errors), len(self.criteria))]
        return RewardOutput(
            values.mean(dim=1),
            criteria=dict(zip(self.criteria, values.detach().unbind(dim=1))),
            rationale=[next((error for error in row if error), None) for row in errors],
            valid=answers.valid.view(len(prompts), -1).all(dim=1),
        )


def named_questions(criteria: Mapping[str, str] | Sequence[str] | None) -> dict[str, str]:
    """Questions by name; those of a list are named by their number.

    Raises:
        ValueError: no question, or something else than text.
    """
    if criteria is None:
        return dict(CRITERIA)
    if isinstance(criteria, str):
        criteria = [criteria]
    pairs = list(criteria.items()) if isinstance(criteria, Mapping) else [(f"{k}", q) for k, q in enumerate(criteria)]
    if not pairs or not all(isinstance(q, str) and q.strip() for _, q in pairs):
        raise ValueError(f"criteria: got {criteria!r}, expected at least one question in words")
    return dict(pairs)
