"""VideoScore2 (He et al. 2025, arXiv:2509.22799): a judge of videos that thinks, then writes three marks, 1 to 5."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visalign.images import check_videos
from visalign.names import unknown_name
from visalign.rewards.base import Context, RewardOutput, check_prompts, register_reward
from visalign.rewards.vlm.chat import Chat, Message, Reply
from visalign.rewards.vlm.judging import SamplingParams, ask, column, fill, load_template, open_chat
from visalign.rewards.vlm.parsing import Unreadable, digit_probabilities, labelled_number, token_after_label

MARKS = (1, 2, 3, 4, 5)
LABELS = {
    "visual_quality": "visual quality",
    "text_alignment": "text-to-video alignment",
    "physical_consistency": "physical/common-sense consistency",
}
SOFT = ("expected", "published", "written")
WHERE = "https://github.com/TIGER-AI-Lab/VideoScore2, VS2_QUERY_TEMPLATE in vs2_inference.py"


def expected_mark(probabilities: Sequence[float]) -> float:
    """sum_s s p(s) over the marks 1 to 5, p summing to 1; in [1, 5]."""
    return sum(mark * p for mark, p in zip(MARKS, probabilities))


def published_mark(probabilities: Sequence[float]) -> float:
    """s* p(s*) with s* the likeliest mark, as the authors' script has it: no expectation; in (0, 5].

    Moving mass from s* to a higher mark lowers it. At temperature 0, s* is the mark written; above, it need not be.
    """
    best = max(range(len(MARKS)), key=lambda k: probabilities[k])
    return MARKS[best] * probabilities[best]


@register_reward("videoscore2")
class VideoScore2Reward:
    """Mean of three marks for a video: visual quality, fit to the text, physical sense; higher is better; no gradient.

    Criteria: the three marks. By `soft`: "expected" in [1, 5], smooth, for training; "published" in (0, 5]; "written"
    the integers, which needs no log-probabilities. The mean as overall score is ours [R]: the authors report the three.

    Args:
        template: the question the model was taught, with "{prompt}" in the prompt's place: a .txt file or the text. It
            is not shipped, as its source names no licence; see WHERE.
        model, url, chat_options: of `make_chat`; `chat`: one already made. Without a `url`, a Qwen2-VL or Qwen2.5-VL
            run here, whose option `fps` says how fast the videos are; the model was taught 2 frames a second.
    """

    name = "videoscore2"
    differentiable = False
    kind = "pointwise"
    media = "videos"
    needs = ("prompts",)
    stochastic = True
    checkpoints = ("TIGER-Lab/VideoScore2",)
    licence = "see the model's page"
    source = "arXiv:2509.22799"

    def __init__(
        self,
        template: str | Path | None = None,
        model: str = "TIGER-Lab/VideoScore2",
        url: str | None = None,
        chat: Chat | None = None,
        chat_options: Mapping[str, Any] | None = None,
        soft: str = "expected",
        temperature: float = 0.7,
        max_tokens: int = 1024,
        seed: int = 0,
        retries: int = 3,
    ) -> None:
        self.preflight({"template": template, "soft": soft})
        self.template = load_template("", template)
        self.params = SamplingParams(
            max_tokens, temperature, seed=seed, top_logprobs=0 if soft == "written" else 20, retries=retries
        )
        self.chat = open_chat(chat, model, url, chat_options)
        if not getattr(self.chat, "takes_videos", True):
            raise ValueError(
                f"model: got {self.chat.name!r}, which takes no videos here, expected a Qwen2.5-VL or a url"
            )
        self.soft = soft
        self.range: tuple[float, float] = (0.0 if soft == "published" else 1.0, 5.0)

    @staticmethod
    def preflight(options: Mapping[str, Any]) -> None:
        """Raise ValueError for options that cannot work, without loading anything."""
        if options.get("template") is None:
            raise ValueError(f"template: got None, expected the model's own question with '{{prompt}}', from {WHERE}")
        if "{prompt}" not in load_template("", options["template"]):
            raise ValueError("template: got a text without '{prompt}', expected it in the prompt's place")
        if options.get("soft", SOFT[0]) not in SOFT:
            raise unknown_name("soft", options["soft"], SOFT)
        SamplingParams.of(options)

    def __call__(self, images: Tensor, prompts: Sequence[str], context: Context | None = None) -> RewardOutput:
        """images: videos (N, F, 3, H, W) in [0, 1]; prompts: N strings."""
        check_videos(images)
        check_prompts(images, prompts)
        answers = ask(
            self.chat,
            [[Message("user", fill(self.template, prompt, (video,)))] for video, prompt in zip(images, prompts)],
            self._read,
            self.params,
        )
        marks = {
            key: column([None if answer.value is None else answer.value[k] for answer in answers])
            for k, key in enumerate(LABELS)
        }
        return RewardOutput(
            torch.stack(list(marks.values())).mean(dim=0),
            marks,
            [answer.problem or answer.reply.text for answer in answers],
            torch.tensor([answer.value is not None for answer in answers]),
        )

    def _read(self, reply: Reply) -> list[float]:
        if self.soft == "written":
            return [labelled_number(reply.text, label, MARKS[0], MARKS[-1]) for label in LABELS.values()]
        marks = []
        for label in LABELS.values():
            place, written = token_after_label(reply.tokens, label)
            if written not in MARKS:
                raise Unreadable(f"{label}: got {written}, expected within {list(MARKS)}")
            probabilities = digit_probabilities(reply.tokens[place], MARKS)
            marks.append((expected_mark if self.soft == "expected" else published_mark)(probabilities))
        return marks
