"""Ordinal probabilistic reward (OPRM; Chen et al. 2026, arXiv:2602.12660): a distribution over ratings 1 to 9.

The formulas are the paper's [P], which rates texts; no checkpoint judges pictures, so the question asked is ours [R].
Training it belongs to reward models.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visalign.images import check_images, check_videos, is_video
from visalign.rewards.base import Context, RewardOutput, check_prompts, register_reward
from visalign.rewards.vlm.chat import Chat, Message, Reply
from visalign.rewards.vlm.judging import SamplingParams, ask, column, fill, load_template, open_chat
from visalign.rewards.vlm.parsing import Unreadable, digit_probabilities

RATINGS = tuple(range(1, 10))
QUESTION = (
    "The picture, or the video whose frames are above, was made from this text: {prompt}\n\n"
    "Rate it as a whole from 1 (it fails) to 9 (it could not be better): does it show what the text asks for, does it "
    "make sense, and does it look good? Answer with one digit and nothing else."
)


def expected_rating(probabilities: Tensor) -> Tensor:
    """sum_s s p(s): probabilities (..., 9) over the ratings 1 to 9 to (...), in [1, 9]."""
    return probabilities @ _ratings(probabilities)


def rating_variance(probabilities: Tensor) -> Tensor:
    """sum_s (s - mean)^2 p(s), (..., 9) to (...): how sure the judge is; 0 for one certain rating."""
    deviation = _ratings(probabilities) - expected_rating(probabilities)[..., None]
    return (probabilities * deviation**2).sum(dim=-1)


def probability_better(chosen: Tensor, rejected: Tensor) -> Tensor:
    """P(c > r) = sum_{i > j} p_c(i) p_r(j) of independent ratings, (..., 9) each to (...).

    With its mirror image and `tie_mass` it sums to 1; of one distribution with itself it is below 1/2.
    """
    below = rejected.cumsum(dim=-1) - rejected  # P(r < i)
    return (chosen * below).sum(dim=-1)


def tie_mass(chosen: Tensor, rejected: Tensor) -> Tensor:
    """P(c = r) = sum_i p_c(i) p_r(i), (..., 9) each to (...)."""
    return (chosen * rejected).sum(dim=-1)


def _ratings(like: Tensor) -> Tensor:
    return torch.arange(1, like.shape[-1] + 1, dtype=like.dtype, device=like.device)


@register_reward("ordinal")
class OrdinalReward:
    """Expected rating of a picture or video, 1 to 9, higher is better; no gradient.

    One forward pass: the likeliest tokens at the answer's place, restricted to the digits 1 to 9. Uncertainty is the
    rating's standard deviation; extra["probabilities"] is (N, 9), for `probability_better` and `tie_mass`. Any
    vision-language model will do; none was published for this.

    Args:
        model, url, chat_options: of `make_chat`. `chat`: one already made; it must give log-probabilities.
        template: another question, with "{prompt}": a .txt file or the text.
    """

    name = "ordinal"
    differentiable = False
    kind = "pointwise"
    media = "both"
    needs = ("prompts",)
    range = (1.0, 9.0)
    stochastic = False
    checkpoints: tuple[str, ...] = ()
    licence = "that of the model"
    source = "arXiv:2602.12660; formulas only"

    def __init__(
        self,
        model: str = "Qwen/Qwen2.5-VL-7B-Instruct",
        url: str | None = None,
        chat: Chat | None = None,
        chat_options: Mapping[str, Any] | None = None,
        template: str | Path = QUESTION,
        retries: int = 3,
    ) -> None:
        self.preflight({"template": template, "retries": retries})
        self.params = SamplingParams(4, top_logprobs=20, retries=retries)  # a digit, maybe after a space
        self.chat = open_chat(chat, model, url, chat_options)
        self.template = load_template("", template)

    @staticmethod
    def preflight(options: Mapping[str, Any]) -> None:
        """Raise ValueError for options that cannot work, without loading anything."""
        if "{prompt}" not in load_template("", options.get("template", QUESTION)):
            raise ValueError("template: got a text without '{prompt}', expected it in the prompt's place")
        SamplingParams.of(options)

    def __call__(self, images: Tensor, prompts: Sequence[str], context: Context | None = None) -> RewardOutput:
        """images: (N, 3, H, W) or videos (N, F, 3, H, W) in [0, 1]; prompts: N strings."""
        (check_videos if is_video(images) else check_images)(images)
        check_prompts(images, prompts)
        answers = ask(
            self.chat,
            [
                [Message("user", fill(self.template, prompt, tuple(image) if image.ndim == 4 else (image,)))]
                for image, prompt in zip(images, prompts)
            ],
            _read,
            self.params,
        )
        rows = [column([None] * len(RATINGS) if answer.value is None else answer.value) for answer in answers]
        probabilities = torch.stack(rows)
        return RewardOutput(
            expected_rating(probabilities),
            {},
            [answer.problem for answer in answers],
            torch.tensor([answer.value is not None for answer in answers]),
            rating_variance(probabilities).sqrt(),
            {"probabilities": probabilities},
        )


def _read(reply: Reply) -> list[float]:
    for token in reply.tokens:
        if token.text.strip():
            return digit_probabilities(token, RATINGS)
    raise Unreadable("no tokens with log-probabilities came with the answer")
