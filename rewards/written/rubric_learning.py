"""Rubrics for `auto_rubric` from labelled preferences: written by a model, kept only if they reproduce the labels.

`build_rubric` goes the whole way: generate, verify, revise, gather into themes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from visalign.rewards.vlm.chat import Chat, Message, Reply
from visalign.rewards.vlm.judging import SamplingParams, ask
from visalign.rewards.vlm.parsing import Unreadable, read_json

from .auto_rubric import AutoRubric, Theme, bullets, judge_ranks, read_strings, read_themes, show

EPOCHS = 5  # of revision
THEMES = 5
GENERATE = (
    "People ranked these pictures, 1 being the best: {ranks}\n"
    "Write criteria that explain this ranking and would rank other pictures of this kind. Each names one quality that "
    "can be seen in a picture, says what is better, and does not speak of these pictures.\n"
    'Answer with JSON: {"rubrics": ["criterion", ...], "reason": "why these"}'
)
REVISE = (
    "You had written these criteria:\n{criteria}\n"
    "Someone who knew only the criteria ranked the pictures {actual}. People ranked them {expected}, 1 is the best.\n"
    "Rewrite the criteria so that they lead to the people's ranking, still without speaking of these pictures.\n"
    'Answer with JSON: {"rubrics": ["criterion", ...], "reason": "what was changed"}'
)
GATHER = (
    "Below are criteria for judging pictures, written for many single cases.\n{criteria}\n"
    "Gather them into {count} themes that cover them without overlap. Give each theme a short name and tips: single "
    "sentences that tell a judge what to look for. Merge what is said twice.\n"
    'Answer with JSON: {"themes": [{"name": "theme", "tips": ["tip", ...]}, ...]}'
)


@dataclass(frozen=True)
class Preference:
    """Pictures (3, H, W) of one prompt with the ranks people gave them: a permutation of 1 (best) to n."""

    prompt: str
    images: tuple[Tensor, ...]
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.images) < 2 or sorted(self.ranks) != list(range(1, len(self.images) + 1)):
            got = f"{len(self.images)} images ranked {self.ranks}"
            raise ValueError(f"ranks: got {got}, expected at least two, ranked 1 to n without ties")


def learn_criteria(
    chat: Chat, items: Sequence[Preference], epochs: int = EPOCHS, seed: int = 0, max_tokens: int = 1024
) -> list[tuple[str, ...] | None]:
    """Criteria for each preference that lead the judge to its ranks; None where `epochs` revisions did not get it."""
    params = SamplingParams(max_tokens, seed=seed)
    chats = [show(GENERATE.replace("{ranks}", str(list(i.ranks))), i.prompt, i.images) for i in items]
    criteria = [answer.value for answer in ask(chat, chats, _read_criteria, params)]
    accepted: list[tuple[str, ...] | None] = [None] * len(items)
    open_ = [n for n, one in enumerate(criteria) if one]
    for epoch in range(epochs + 1):
        texts = [bullets(criteria[n] or ()) for n in open_]
        own = [items[n] for n in open_]
        again = SamplingParams(seed=seed + epoch)
        ranks = judge_ranks(chat, texts, [i.prompt for i in own], [i.images for i in own], again)
        wrong = []
        for n, got in zip(open_, ranks):
            if got == items[n].ranks:
                accepted[n] = criteria[n]
            else:
                wrong.append((n, got))
        if not wrong or epoch == epochs:
            break
        conversations = [_revision(items[n], criteria[n] or (), got) for n, got in wrong]
        for (n, _), answer in zip(wrong, ask(chat, conversations, _read_criteria, params)):
            criteria[n] = answer.value or criteria[n]
        open_ = [n for n, _ in wrong]
    return accepted


def gather(chat: Chat, criteria: Sequence[str], themes: int = THEMES, seed: int = 0) -> AutoRubric:
    """Criteria of many cases as one rubric of `themes` themes.

    Raises:
        ValueError: no criteria, or no readable answer.
    """
    if not criteria:
        raise ValueError("criteria: got none, expected at least one verified criterion")
    text = GATHER.replace("{criteria}", bullets(criteria)).replace("{count}", str(themes))

    def read(reply: Reply) -> tuple[Theme, ...]:
        theme_list = read_themes(read_json(reply.text, ["themes"]))
        if len(theme_list) > themes:
            raise Unreadable(f"themes: got {len(theme_list)}, expected at most {themes}")
        return theme_list

    (answer,) = ask(chat, [[Message("user", (text,))]], read, SamplingParams(2048, seed=seed))
    if answer.value is None:
        raise ValueError(f"chat {chat.name!r}: {answer.problem}")
    return AutoRubric(answer.value)


def build_rubric(
    chat: Chat, items: Sequence[Preference], epochs: int = EPOCHS, themes: int = THEMES, seed: int = 0
) -> AutoRubric:
    """A rubric from labelled preferences: criteria that were verified on their own case, gathered into themes.

    Raises:
        ValueError: not one case could be verified.
    """
    learned = [wanted for wanted in learn_criteria(chat, items, epochs, seed) if wanted]
    if not learned:
        raise ValueError(f"items: none of {len(items)} got criteria that reproduce its ranks in {epochs} revisions")
    return gather(chat, [criterion for wanted in learned for criterion in wanted], themes, seed)


def _revision(item: Preference, criteria: Sequence[str], got: tuple[int, ...] | None) -> list[Message]:
    actual = "in no usable way" if got is None else str(list(got))
    text = REVISE.replace("{criteria}", bullets(criteria)).replace("{expected}", str(list(item.ranks)))
    return show(text.replace("{actual}", actual), item.prompt, item.images)


def _read_criteria(reply: Reply) -> tuple[str, ...]:
    return read_strings(read_json(reply.text, ["rubrics"])["rubrics"], "rubrics")
