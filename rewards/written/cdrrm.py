"""Contrast, then synthesise (CDRRM): a rubric from what the better picture of a pair has and the worse one lacks.

From the paper alone: profile the labelled pair, distil a rubric from the contrast, let a frozen judge apply it.
Keeping only the rubrics by which the judge recovers the label is our reading of how they were selected; the wording of
the prompts is our own. The rubrics serve as targets for training a writer of rubrics or, put together by
`auto_rubric.gather`, as the rubric of the reward `auto_rubric`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from visalign.rewards.vlm.chat import Chat, Message, Reply
from visalign.rewards.vlm.judging import SamplingParams, ask
from visalign.rewards.vlm.parsing import Unreadable, read_json

from .auto_rubric import bullets, judge_ranks, read_strings, show
from .rubric_learning import Preference

PROFILE = (
    "People prefer picture {better} to picture {worse}.\n"
    "Describe each by what stands out: its strengths, and its weaknesses. Keep to what can be seen.\n"
    'Answer with JSON: {"preferred": {"strengths": [...], "weaknesses": [...]}, '
    '"other": {"strengths": [...], "weaknesses": [...]}}'
)
SYNTHESISE = (
    'Two pictures were made for this prompt:\n"{prompt}"\n'
    "The better one:\n{better}\nThe worse one:\n{worse}\n"
    "Distil the contrast into a compact rubric of at most {count} criteria for pictures of this prompt. Each stands by "
    "itself: it does not point at one of these two pictures.\n"
    'Answer with JSON: {"rubrics": ["criterion", ...]}'
)
NO_RUBRIC = "- the better picture as people would see it"  # what the judge goes by without a rubric
MAX_CRITERIA = 5
_NOUN = r"(?:images?|pictures?|photos?|figures?|candidates?|options?|responses?)"
IDENTIFIER = re.compile(
    rf"\b{_NOUN}\s*(?:[#(]?\d|one\b|two\b|(?-i:[AB])\b)"
    rf"|\b(?:first|second|left|right|former|latter|chosen|rejected|preferred|other)\s+(?:one\b|{_NOUN})",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Profile:
    """What stands out in the better and the worse picture of a pair: lines that begin with + or -."""

    better: tuple[str, ...]
    worse: tuple[str, ...]


def contrast_rubrics(
    chat: Chat, items: Sequence[Preference], judge: Chat | None = None, seed: int = 0
) -> list[tuple[str, ...] | None]:
    """A rubric for each pair by which the judge (None: `chat`) recovers its label; None where that failed."""
    written = synthesise(chat, items, profiles(chat, items, seed), seed)
    places = [n for n, rubric in enumerate(written) if rubric is not None]
    texts = [bullets(written[n] or ()) for n in places]
    own = [items[n] for n in places]
    params = SamplingParams(seed=seed)
    judged = judge_ranks(judge or chat, texts, [i.prompt for i in own], [i.images for i in own], params)
    accepted: list[tuple[str, ...] | None] = [None] * len(items)
    for n, ranks in zip(places, judged):
        accepted[n] = written[n] if ranks == items[n].ranks else None
    return accepted


def profiles(chat: Chat, items: Sequence[Preference], seed: int = 0) -> list[Profile | None]:
    """Contrastive profiles of labelled pairs; None where the answer could not be read."""
    conversations = []
    for item in items:
        if len(item.images) != 2:
            raise ValueError(f"items: got a preference among {len(item.images)} images, expected pairs")
        better, worse = (str(item.ranks.index(rank) + 1) for rank in (1, 2))
        text = PROFILE.replace("{better}", better).replace("{worse}", worse)
        conversations.append(show(text, item.prompt, item.images))
    return [answer.value for answer in ask(chat, conversations, _read_profile, SamplingParams(1024, seed=seed))]


def synthesise(
    chat: Chat, items: Sequence[Preference], profiles: Sequence[Profile | None], seed: int = 0
) -> list[tuple[str, ...] | None]:
    """Rubrics from profiles; None where there is no profile, or no answer without identifiers of the candidates."""
    places = [n for n, profile in enumerate(profiles) if profile is not None]
    conversations = []
    for n in places:
        profile = profiles[n]
        assert profile is not None
        text = SYNTHESISE.replace("{count}", str(MAX_CRITERIA)).replace("{better}", "\n".join(profile.better))
        text = text.replace("{worse}", "\n".join(profile.worse)).replace("{prompt}", items[n].prompt)
        conversations.append([Message("user", (text,))])
    rubrics: list[tuple[str, ...] | None] = [None] * len(items)
    for n, answer in zip(places, ask(chat, conversations, _read_rubric, SamplingParams(512, seed=seed))):
        rubrics[n] = answer.value
    return rubrics


def judge_accuracy(
    chat: Chat, items: Sequence[Preference], rubrics: Sequence[Sequence[str]] | None = None, seed: int = 0
) -> float:
    """Share of preferences whose ranks the judge finds, by a rubric each, or without; unreadable counts as wrong."""
    texts = [NO_RUBRIC] * len(items) if rubrics is None else [bullets(rubric) for rubric in rubrics]
    pictures, params = [i.images for i in items], SamplingParams(seed=seed)
    judged = judge_ranks(chat, texts, [i.prompt for i in items], pictures, params)
    return sum(ranks == item.ranks for ranks, item in zip(judged, items)) / len(items)


def _read_profile(reply: Reply) -> Profile:
    value = read_json(reply.text, ["preferred", "other"])
    return Profile(_read_side(value["preferred"], "preferred"), _read_side(value["other"], "other"))


def _read_side(side: object, name: str) -> tuple[str, ...]:
    if not isinstance(side, dict):
        raise Unreadable(f"{name}: got {str(side)[:80]}, expected strengths and weaknesses")
    lines = []
    for key, sign in (("strengths", "+"), ("weaknesses", "-")):
        entry = side.get(key)
        lines += [f"{sign} {line}" for line in (read_strings(entry, f"{name} {key}") if entry else ())]
    if not lines:
        raise Unreadable(f"{name}: got neither strengths nor weaknesses")
    return tuple(lines)


def _read_rubric(reply: Reply) -> tuple[str, ...]:
    criteria = read_strings(read_json(reply.text, ["rubrics"])["rubrics"], "rubrics")
    if len(criteria) > MAX_CRITERIA:
        raise Unreadable(f"rubrics: got {len(criteria)}, expected at most {MAX_CRITERIA}")
    for criterion in criteria:
        if match := IDENTIFIER.search(criterion):
            raise Unreadable(f"rubrics: {match[0]!r} points at one of the pictures")
    return criteria
