"""UnifiedReward (Wang et al. 2025, arXiv:2503.05236; Think: arXiv:2505.03318): scores in writing."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visalign.images import check_images, check_videos, is_video
from visalign.rewards.base import Context, RewardOutput, check_prompts, register_reward
from visalign.rewards.vlm.chat import Chat, Message, Reply
from visalign.rewards.vlm.judging import (
    SamplingParams,
    ask,
    column,
    fill,
    load_templates,
    open_chat,
    template_folder,
)
from visalign.rewards.vlm.parsing import Unreadable

from .unifiedreward_answers import DIMENSIONS, read_dimensions, read_final_score

VERSIONS = ("2.0", "1")
QUESTIONS = {  # the templates of each version
    "2.0": {"image": "unifiedreward_point_v2_image", "video": "unifiedreward_point_v2_video"},
    "1": {"image": "unifiedreward_point_v1"},
}


class UnifiedJudge:
    """What the rewards of single samples and of pairs share."""

    differentiable = False
    needs = ("prompts",)
    stochastic = False
    licence = "see the models' pages"
    source = "arXiv:2503.05236, arXiv:2505.03318"


def _questions(version: str, given: Mapping[str, str | Path] | None) -> dict[str, str]:
    """By medium, those that are given or in the folder; without any, the error is about the first."""
    if given is not None and (not isinstance(given, Mapping) or set(given) - set(QUESTIONS[version])):
        return load_templates(QUESTIONS[version], given)  # which refuses it
    names = QUESTIONS[version].items()
    there = {key: name for key, name in names if key in (given or {}) or (template_folder() / f"{name}.txt").is_file()}
    return load_templates(there or QUESTIONS[version], given)


@register_reward("unifiedreward")
class UnifiedReward(UnifiedJudge):
    """A picture's or video's written score, higher is better; no gradient.

    Version "2.0": the mean [R] of three dimensions, which are the criteria, 0 to 5 (asked for 1 to 5); pictures:
    alignment, coherence, style; videos: alignment, physics, style. Version "1": one number from 1 to 5, pictures only.

    Args:
        version: that of the model.
        model, url, chat_options: of `make_chat`. `chat`: one already made.
        fill_missing: as published, let a missing dimension take the mean of the batch, which makes scores depend on
            their company; without it the question is put again, and an answer still incomplete is invalid.
        templates: the questions "image" and "video", with "{prompt}", each a .txt file or the text; those left out are
            unifiedreward_point_*.txt in the folder of templates, see `load_template`. Version 2.0 makes do with one,
            and then scores that medium alone.
    """

    name = "unifiedreward"
    kind = "pointwise"
    media = "both"
    checkpoints = (
        "CodeGoat24/UnifiedReward-7b-v1.5",
        "CodeGoat24/UnifiedReward-qwen-7b",
        "CodeGoat24/UnifiedReward-2.0-qwen-7b",
        "CodeGoat24/UnifiedReward-2.0-qwen3vl-8b",
    )

    def __init__(
        self,
        version: str = "2.0",
        model: str = "CodeGoat24/UnifiedReward-2.0-qwen3vl-8b",
        url: str | None = None,
        chat: Chat | None = None,
        chat_options: Mapping[str, Any] | None = None,
        fill_missing: bool = False,
        templates: Mapping[str, str | Path] | None = None,
        temperature: float = 0.0,
        max_tokens: int = 512,
        seed: int = 0,
        retries: int = 3,
    ) -> None:
        self.preflight({"version": version, "fill_missing": fill_missing, "templates": templates})
        self.params = SamplingParams(max_tokens, temperature, seed=seed, retries=retries)
        self.chat = open_chat(chat, model, url, chat_options)
        self.version, self.fill_missing = version, fill_missing
        self._questions = _questions(version, templates)
        self.media = "both" if len(self._questions) == 2 else f"{next(iter(self._questions))}s"
        self.range: tuple[float, float] = (1.0, 5.0) if version == "1" else (0.0, 5.0)

    @staticmethod
    def preflight(options: Mapping[str, Any]) -> None:
        """Raise ValueError for options that cannot work, without loading anything."""
        version = options.get("version", VERSIONS[0])
        if version not in VERSIONS:
            raise ValueError(f"version: got {version!r}, expected one of {VERSIONS}, in quotes")
        if version == "1" and options.get("fill_missing"):
            raise ValueError("fill_missing: got True with version '1', which has one number, expected False")
        SamplingParams.of(options)
        _questions(version, options.get("templates"))

    def __call__(self, images: Tensor, prompts: Sequence[str], context: Context | None = None) -> RewardOutput:
        """images: (N, 3, H, W), with version 2.0 also videos (N, F, 3, H, W), in [0, 1]; prompts: N strings."""
        video = self.media == "videos" or (is_video(images) and self.media == "both")
        (check_videos if video else check_images)(images)
        check_prompts(images, prompts)
        kind = "video" if video else "image"
        dimensions = DIMENSIONS[f"{kind}s"] if self.version == "2.0" else ("Final",)
        answers = ask(
            self.chat,
            [
                [Message("user", fill(self._questions[kind], p, tuple(image) if video else (image,)))]
                for image, p in zip(images, prompts)
            ],
            lambda reply: self._read(reply, dimensions),
            self.params,
        )
        marks = [[None] * len(dimensions) if a.value is None else list(a.value.values()) for a in answers]
        table = torch.stack([column(row) for row in marks])
        if self.fill_missing:  # an answer with none stays invalid
            table = torch.where(table.isnan(), table.nanmean(dim=0), table)
        return RewardOutput(
            table.mean(dim=1),
            {} if self.version == "1" else {d.lower(): table[:, k] for k, d in enumerate(dimensions)},
            [answer.problem or answer.reply.text for answer in answers],
            torch.tensor([answer.value is not None for answer in answers]),
        )

    def _read(self, reply: Reply, dimensions: Sequence[str]) -> dict[str, float | None]:
        if self.version == "1":
            return {"Final": read_final_score(reply.text)}
        marks = read_dimensions(reply.text, dimensions)
        missing = [d for d, mark in marks.items() if mark is None]
        if missing and not self.fill_missing:
            raise Unreadable(f"no score for {', '.join(missing)}")
        return marks
