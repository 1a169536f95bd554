"""Critics: what is right and wrong with a picture, marked aspect by aspect, and a request that may bring a better one.

A critic is any callable (images, prompts, attempt) -> critiques, see `Critic`; `refine` asks one between its pictures.
"""

import copy
import inspect
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from visalign.locations import load_location
from visalign.names import unknown_name
from visalign.rewards.base import Context
from visalign.rewards.vlm.chat import Chat
from visalign.rewards.vlm.judging import source_images
from visalign.rewards.vlm.parsing import Unreadable
from visalign.rewards.written.rational_rewards import (
    ASPECTS,
    HEADINGS,
    RationalRewardsReward,
    rational_score,
    read_aspects,
    refined_prompt,
)

GOOD_ASPECTS = ("text_faithfulness", "physical_quality")  # what a picture must be good at to be left as it is


@dataclass(frozen=True)
class Critique:
    """What a critic says of a picture made for a request.

    Attributes:
        marks: by aspect, 4 no flaw, 3 a minor one, 2 some, 1 a severe one, or between; None: does not apply.
        reasons: by aspect, why.
        analysis, summary, comments: of the request, of the picture, and of how to ask better.
        refined: the request to try next; None: the critic has none.
        tokens: written for it by a language model.
        problem: why there is no critique; None: there is one.
    """

    marks: Mapping[str, float | None] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    analysis: str = ""
    summary: str = ""
    comments: str = ""
    refined: str | None = None
    tokens: int = 0
    problem: str | None = None

    @property
    def score(self) -> float:
        """`critique_score` of the marks."""
        return critique_score(self.marks)

    def is_good(self, threshold: float = 3.0) -> bool:
        """Whether the picture can stay as it is: both GOOD_ASPECTS are marked, and at least so."""
        marks = [self.marks.get(aspect) for aspect in GOOD_ASPECTS]
        return all(mark is not None and mark >= threshold for mark in marks)


class Critic(Protocol):
    """Criticises pictures (N, 3, H, W) in [0, 1] for the requests that they were meant for; nothing is raised.

    `attempt` counts the proposals it has been asked for these requests before: another one brings another proposal.
    """

    def __call__(
        self, images: Tensor, prompts: Sequence[str], attempt: int = 0, context: Context | None = None
    ) -> list[Critique]: ...


def critique_score(marks: Mapping[str, float | None]) -> float:
    """(mean - 1) / 3 of the marks there are, each clamped to [1, 4]: in [0, 1]; 0 without any (arXiv:2604.11626)."""
    known = {aspect: min(max(mark, 1.0), 4.0) for aspect, mark in marks.items() if mark is not None}
    return rational_score(known) if known else 0.0


def read_critique(text: str, aspects: Sequence[str] = ASPECTS["t2i"]) -> Critique:
    """The critique in a language model's words, laid out as OUR_TEMPLATES and RationalRewards' own say.

    Each part is read to the end of its section, over as many lines as it has.

    Raises:
        Unreadable: no mark at all.
    """
    refined = refined_prompt(text)
    return Critique(
        read_aspects(text, aspects),
        {aspect: _section(_aspect(text, aspect), "Justification") for aspect in aspects},
        _section(text, "User Request Analysis"),
        _section(text, "Summary"),
        _section(text, "Refinement Comments"),
        (re.split(r"\n\s*#", refined)[0].strip(" \n*[]") or None) if refined else None,
    )


def _section(text: str, title: str) -> str:
    """What stands under a heading, to the next one; "" without it."""
    head = rf"^[\s#*]*{title}[\s*]*(?::|$)"
    match = re.search(rf"{head}(.*?)(?=^\s*#|^[\s*]*Score\b|\Z)", text, re.MULTILINE | re.DOTALL | re.IGNORECASE)
    return match[1].strip(" \n*:") if match else ""


def _aspect(text: str, aspect: str) -> str:
    """From an aspect's numbered heading to the next numbered or larger one."""
    head = rf"^[\s#*]*\d+\.[\s*]*{re.escape(HEADINGS[aspect])}"
    match = re.search(rf"{head}(.*?)(?=^[\s#*]*\d+\.[\s*]*[A-Z]|^#\s|\Z)", text, re.MULTILINE | re.DOTALL)
    return match[1] if match else ""


_MARKING = (
    "Mark each aspect from 1 to 4. Choose the whole number first: 4 no flaw, 3 a minor flaw, 2 several flaws, 1 a "
    "severe flaw; then move it by a fraction if something you can name calls for that. Write N/A where the aspect does "
    "not apply, for text rendering whenever no text was asked for."
)
_LAYOUT = """{marking} Answer in this layout and nothing else:

# User Request Analysis
(what the request asks for)
# Detailed Judgement
{aspects}
# Summary
(one sentence)
# User Request Refinement
## Refinement Comments
(what the generator should be told otherwise, so that the next picture is right; add nothing that was not asked for)
## Refined Request: (the whole request, reworded)"""
_OPENINGS = {
    "t2i": "A generator was asked for: {prompt}\nIt made this picture: <image>\n",
    "edit": "An editor was asked: {prompt}\nIt was given this picture: <image>\nIt made this one: <image>\n",
}


def _layout(task: str) -> str:
    titles = [HEADINGS[aspect] for aspect in ASPECTS[task]]
    blocks = [f"{n}. {title}\n## Justification: ...\n## Score: ..." for n, title in enumerate(titles, start=1)]
    return _LAYOUT.format(marking=_MARKING, aspects="\n".join(blocks))


OUR_TEMPLATES = {  # for any vision-language model; RationalRewards' checkpoints were trained on words of their own
    task: {"system": "You judge pictures strictly and say exactly what you see.", "question": opening + _layout(task)}
    for task, opening in _OPENINGS.items()
}


class VLMCritic:
    """A vision-language model as critic: RationalRewards (Wang et al. 2026, arXiv:2604.11626), or any that chats.

    Args:
        task: "t2i", or "edit", whose source pictures come in context["references"].
        model, url, chat_options: of `rewards.vlm.judging.make_chat`, so a `url` is that of an OpenAI-compatible
            endpoint, which is tried again as `RemoteChat` says; model None: RationalRewards' checkpoint.
            `chat`: one already made.
        templates: as RationalRewardsReward's, "system" and "question"; None: OUR_TEMPLATES; "published": the files
            that the user has copied from the authors, the right ones for their checkpoints.
        retries: further questions, with other seeds, where an answer holds no mark.

    Raises:
        ValueError: options that cannot work.
    """

    def __init__(
        self,
        task: str = "t2i",
        model: str | None = None,
        url: str | None = None,
        chat: Chat | None = None,
        chat_options: Mapping[str, Any] | None = None,
        templates: Mapping[str, str | Path] | str | None = None,
        temperature: float = 0.1,
        max_tokens: int = 2048,
        seed: int = 0,
        retries: int = 1,
    ) -> None:
        if isinstance(templates, str) and templates != "published":
            raise ValueError(f"templates: got {templates!r}, expected None, 'published', or a mapping")
        words = OUR_TEMPLATES.get(task) if templates is None else None if isinstance(templates, str) else templates
        options: dict[str, Any] = dict(temperature=temperature, max_tokens=max_tokens, seed=seed, retries=retries)
        self.judge = RationalRewardsReward(task, model, url, chat, chat_options, words, **options)

    def __call__(
        self, images: Tensor, prompts: Sequence[str], attempt: int = 0, context: Context | None = None
    ) -> list[Critique]:
        """One critique a picture; what fails or cannot be read has its `problem`."""
        judge = copy.copy(self.judge)
        judge.params = replace(judge.params, seed=judge.params.seed + attempt)
        if "references" in judge.needs:
            source_images(context, len(images), judge.name)
        output = judge(images, prompts, context)
        return [self._critique(text or "", bool(ok)) for text, ok in zip(output.rationale or (), output.is_valid)]

    def _critique(self, text: str, valid: bool) -> Critique:
        if not valid:
            return Critique(problem=text)
        try:
            critique = read_critique(text, self.judge.aspects)
        except Unreadable as error:
            return Critique(problem=str(error))
        return replace(critique, tokens=count_tokens(self.judge.chat, text))


def count_tokens(chat: Chat, text: str) -> int:
    """Tokens of an answer: counted where the model runs here, else a token for every four characters."""
    tokenizer = getattr(chat, "tokenizer", None) or getattr(getattr(chat, "vlm", None), "tokenizer", None)
    return math.ceil(len(text) / 4) if tokenizer is None else len(tokenizer(text).input_ids)


CRITICS = {"shapes": "visalign.worlds.shapes.critic:ShapesCritic", "vlm": "visalign.search.prompts.critics:VLMCritic"}


def make_critic(critic: str | Critic, **options: Any) -> Critic:
    """A critic by its name in CRITICS or "module:attribute", made with `options`; or one that is made already.

    Raises:
        ValueError: no such name, or options for what is made already.
    """
    if not isinstance(critic, str):
        if not callable(critic) or options:
            raise ValueError(f"critic: got {critic!r} with options {options}, expected a name, or a callable without")
        return critic
    if critic not in CRITICS and ":" not in critic:
        raise unknown_name("critic", critic, CRITICS)
    factory = load_location("critic", CRITICS.get(critic, critic))
    names = inspect.signature(factory).parameters
    for option in options:
        if critic in CRITICS and option not in names:
            raise unknown_name(f"option of critic {critic!r}", option, names)
    return factory(**options)
