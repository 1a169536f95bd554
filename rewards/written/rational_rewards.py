"""RationalRewards (Wang et al. 2026, arXiv:2604.11626): a judge that reasons, marks aspects, refines the prompt."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visalign.images import check_images
from visalign.names import unknown_name
from visalign.rewards.base import Context, RewardOutput, check_prompts, register_reward
from visalign.rewards.vlm.chat import Chat, Message, Part
from visalign.rewards.vlm.judging import (
    SamplingParams,
    ask,
    column,
    fill,
    load_templates,
    open_chat,
    source_images,
)
from visalign.rewards.vlm.parsing import Unreadable, leading_number

HEADINGS = {
    "text_faithfulness": "Text Faithfulness",
    "image_faithfulness": "Image Faithfulness",
    "physical_quality": "Physical and Visual Quality",
    "text_rendering": "Text Rendering",
}
ASPECTS = {
    "t2i": ("text_faithfulness", "physical_quality", "text_rendering"),
    "edit": tuple(HEADINGS),
}


def read_aspects(text: str, aspects: Sequence[str]) -> dict[str, float | None]:
    """The mark of each aspect, clamped to [1, 4]; None where it is N/A or missing. Read up to the summary only.

    Raises:
        Unreadable: no mark at all.
    """
    body = re.split(r"^#+\s*Summary", text, flags=re.MULTILINE)[0]
    titles = "|".join(re.escape(title) for title in HEADINGS.values())
    heading = re.compile(rf"^[\s#*]*\d+\.[\s*]*({titles})", re.MULTILINE)
    starts = list(heading.finditer(body))
    marks: dict[str, float | None] = dict.fromkeys(aspects)
    for start, stop in zip(starts, [*(match.start() for match in starts[1:]), len(body)]):
        aspect = next(key for key, title in HEADINGS.items() if title == start[1])
        if aspect in marks:
            marks[aspect] = _mark(body[start.end() : stop])
    if all(mark is None for mark in marks.values()):
        raise Unreadable("no mark for any aspect")
    return marks


def _mark(block: str) -> float | None:
    for match in re.finditer(r"^[\s#*]*Score\s*\**\s*:\s*(.+)$", block, re.MULTILINE | re.IGNORECASE):
        try:
            mark = leading_number(match[1])
        except Unreadable:
            continue
        return None if mark is None else min(max(mark, 1.0), 4.0)
    return None


def rational_score(marks: Mapping[str, float | None]) -> float:
    """(mean - 1) / 3 of the marks there are: in [0, 1]."""
    known = [mark for mark in marks.values() if mark is not None]
    return (sum(known) / len(known) - 1) / 3


def refined_prompt(text: str) -> str | None:
    """The better prompt that the judge proposes, or None."""
    match = re.search(r"^[\s#*]*Refined Request\s*\**\s*:\s*(.+)", text, re.MULTILINE | re.DOTALL)
    return match[1].strip(" \n*[]") or None if match else None


def _templates(task: str, given: Mapping[str, str | Path] | None) -> dict[str, str]:
    names = {"system": f"rational_rewards_{task}_system", "question": f"rational_rewards_{task}"}
    texts, pictures = load_templates(names, given), 1 if task == "t2i" else 2
    if texts["question"].count("<image>") not in (0, pictures):  # without any, the pictures stand in front
        raise ValueError(f"template: got {texts['question'].count('<image>')} <image>, expected {pictures}")
    return texts


@register_reward("rational_rewards")
class RationalRewardsReward:
    """How well a picture (or an edit) serves its prompt, 0 to 1, higher is better; no gradient.

    The mean of the aspects' marks, 1 to 4, which are the criteria (NaN where not applicable), scaled to [0, 1]. The
    judge's words are the rationale; extra["refined_prompt"] has its better prompt for each sample, or None. An answer
    without any mark is invalid; the published code gives it 0, as `on_fail="zero"` does.

    Args:
        task: "t2i", or "edit", which needs the source images as references; each has its own checkpoint.
        model, url, chat_options: of `make_chat`; model None: the task's checkpoint. `chat`: one already made.
        templates: "system", and the "question" with "{prompt}" and "<image>" for each picture, a .txt file or the text;
            those left out are rational_rewards_*.txt in the folder of templates, see `load_template`.
        aspects: those to average; None: all of the task.
    """

    name = "rational_rewards"
    differentiable = False
    kind = "pointwise"
    media = "images"
    needs: tuple[str, ...] = ("prompts",)  # and "references" for edits
    range = (0.0, 1.0)
    stochastic = True
    checkpoints = ("TIGER-Lab/RationalRewards-8B-T2I", "TIGER-Lab/RationalRewards-8B-Edit")
    licence = "see the models' pages"
    source = "arXiv:2604.11626"

    def __init__(
        self,
        task: str = "t2i",
        model: str | None = None,
        url: str | None = None,
        chat: Chat | None = None,
        chat_options: Mapping[str, Any] | None = None,
        templates: Mapping[str, str | Path] | None = None,
        aspects: Sequence[str] | None = None,
        temperature: float = 0.1,
        max_tokens: int = 2048,
        seed: int = 0,
        retries: int = 3,
    ) -> None:
        self.preflight({"task": task, "templates": templates, "aspects": aspects})
        default = "TIGER-Lab/RationalRewards-8B-" + ("T2I" if task == "t2i" else "Edit")
        self.params = SamplingParams(max_tokens, temperature, seed=seed, retries=retries)
        self.chat = open_chat(chat, model or default, url, chat_options)
        self.needs = ("prompts",) if task == "t2i" else ("prompts", "references")
        self.aspects = tuple(aspects or ASPECTS[task])
        texts = _templates(task, templates)
        self._system, self._question = texts["system"], texts["question"]

    @staticmethod
    def preflight(options: Mapping[str, Any]) -> None:
        """Raise ValueError for options that cannot work, without loading anything."""
        task = options.get("task", "t2i")
        if task not in ASPECTS:
            raise unknown_name("task", task, ASPECTS)
        for aspect in options.get("aspects") or ():
            if aspect not in ASPECTS[task]:
                raise unknown_name("aspects", aspect, ASPECTS[task])
        SamplingParams.of(options)
        _templates(task, options.get("templates"))

    def __call__(self, images: Tensor, prompts: Sequence[str], context: Context | None = None) -> RewardOutput:
        """images: (N, 3, H, W) in [0, 1]; prompts: N strings; for edits context["references"]: the source images."""
        check_images(images)
        check_prompts(images, prompts)
        pictures: list[tuple[Part, ...]] = [(image,) for image in images]
        if "references" in self.needs:
            pictures = list(zip(source_images(context, len(images), self.name), images))
        answers = ask(
            self.chat,
            [
                [Message("system", (self._system,)), Message("user", fill(self._question, prompt, seen))]
                for prompt, seen in zip(prompts, pictures)
            ],
            lambda reply: read_aspects(reply.text, self.aspects),
            self.params,
        )
        marks = [answer.value for answer in answers]
        return RewardOutput(
            column([None if own is None else rational_score(own) for own in marks]),
            {aspect: column([None if own is None else own[aspect] for own in marks]) for aspect in self.aspects},
            [answer.problem or answer.reply.text for answer in answers],
            torch.tensor([own is not None for own in marks]),
            extra={"refined_prompt": [refined_prompt(answer.reply.text) for answer in answers]},
        )
