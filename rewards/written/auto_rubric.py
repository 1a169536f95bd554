"""Auto-Rubric as Reward: pictures ranked by criteria that a model wrote from labelled preferences.

The reward `auto_rubric` ranks each group of pictures by such a rubric; `rubric_learning` makes one. Both follow the
published method; the wording of the prompts is our own, as are the reader's retries. Not here: rubrics of a prompt's
own, fetched when it comes up again.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from visalign.files import read_yaml
from visalign.images import check_images
from visalign.rewards.base import Context, RewardOutput, check_prompts, register_reward
from visalign.rewards.groups.candidates import group_places, picture_digest, shown_order
from visalign.rewards.vlm.chat import Chat, Message, Part, Reply
from visalign.rewards.vlm.judging import DEFAULTS, SamplingParams, ask, open_chat
from visalign.rewards.vlm.parsing import Unreadable, as_numbers, read_json

TASK = 'All pictures were made for this prompt:\n"{prompt}"\n'
JUDGE = (
    "Rank the pictures by this rubric and by nothing else:\n{rubric}\n"
    "Give each picture its rank in the order shown; 1 is the best, no two share a rank.\n"
    'Answer with JSON: {"rank": [rank of picture 1, rank of picture 2, ...]}'
)


@dataclass(frozen=True)
class Theme:
    name: str
    tips: tuple[str, ...]


@dataclass(frozen=True)
class AutoRubric:
    """What a judge is told to look for. In YAML: {themes: [{name: ..., tips: [...]}, ...]}."""

    themes: tuple[Theme, ...]

    @property
    def text(self) -> str:
        return "\n".join(f"{k}. {t.name}\n" + bullets(t.tips) for k, t in enumerate(self.themes, start=1))

    def save(self, path: str | Path) -> None:
        themes = [{"name": theme.name, "tips": list(theme.tips)} for theme in self.themes]
        Path(path).write_text(yaml.safe_dump({"themes": themes}, sort_keys=False, allow_unicode=True), encoding="utf-8")


def load_auto_rubric(path: str | Path) -> AutoRubric:
    """Read what `AutoRubric.save` wrote.

    Raises:
        ValueError: no such file, or other content.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"rubric: got {str(path)!r}, which is no file")
    try:
        return AutoRubric(read_themes(read_yaml(file, "rubric")))
    except Unreadable as error:
        raise ValueError(f"rubric: could not read {str(path)!r}: {' '.join(str(error).split())}") from error


def rank_rewards(ranks: Tensor) -> Tensor:
    """1 - 1.1 (rank - 1) / (worst rank - 1): ranks (n,) to rewards (n,), 1.0 for the best, -0.1 for the worst."""
    if len(ranks) < 2 or ranks.sort().values.tolist() != list(range(1, len(ranks) + 1)):
        raise ValueError(f"ranks: got {ranks.tolist()}, expected 1 to n without ties, n at least 2")
    return 1 - 1.1 * (ranks.float() - 1) / (len(ranks) - 1)


def bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def show(instruction: str, prompt: str, pictures: Sequence[Tensor]) -> list[Message]:
    """One question about numbered pictures of a prompt."""
    parts: list[Part] = [TASK.replace("{prompt}", prompt)]
    for k, picture in enumerate(pictures, start=1):
        parts += [f"Picture {k}:", picture]
    return [Message("user", (*parts, instruction))]


def judge_ranks(
    chat: Chat,
    rubrics: Sequence[str],
    prompts: Sequence[str],
    groups: Sequence[Sequence[Tensor]],
    params: SamplingParams = DEFAULTS,
) -> list[tuple[int, ...] | None]:
    """The judge's ranks of each group's pictures by its rubric's text; None where its answer was no permutation.

    The judge sees prompt, pictures and rubric, nothing else, in a random order (see `shown_order`).
    """
    orders = [shown_order([picture_digest(p) for p in pictures], params.seed) for pictures in groups]
    sizes = [len(order) for order in orders]
    conversations = [
        show(JUDGE.replace("{rubric}", rubric), prompt, [pictures[n] for n in order])
        for rubric, prompt, pictures, order in zip(rubrics, prompts, groups, orders, strict=True)
    ]
    ranks: list[tuple[int, ...] | None] = [None] * len(groups)
    for size in dict.fromkeys(sizes):  # the reader has to know how many ranks to expect
        places = [n for n, s in enumerate(sizes) if s == size]
        answers = ask(chat, [conversations[n] for n in places], _rank_reader(size), params)
        for n, answer in zip(places, answers):
            if answer.value is not None:
                by_place = dict(zip(orders[n], answer.value))
                ranks[n] = tuple(by_place[k] for k in range(size))
    return ranks


def _rank_reader(size: int) -> Callable[[Reply], tuple[int, ...]]:
    def read(reply: Reply) -> tuple[int, ...]:
        ranks = as_numbers(read_json(reply.text, ["rank"])["rank"], size, 1, size, "rank")
        if sorted(ranks) != list(range(1, size + 1)):
            raise Unreadable(f"rank: got {ranks}, expected each of 1 to {size} once")
        return tuple(int(rank) for rank in ranks)

    return read


def read_strings(value: Any, name: str) -> tuple[str, ...]:
    """`value` as a list of at least one non-empty string.

    Raises:
        Unreadable: it is not.
    """
    if not isinstance(value, list) or not value or not all(isinstance(v, str) and v.strip() for v in value):
        raise Unreadable(f"{name}: got {str(value)[:80]}, expected a list of sentences")
    return tuple(" ".join(v.split()) for v in value)


def read_themes(value: Any) -> tuple[Theme, ...]:
    themes = value.get("themes") if isinstance(value, Mapping) else None
    if not isinstance(themes, list) or not themes:
        raise Unreadable(f"themes: got {str(themes)[:80]}, expected a list")
    for theme in themes:
        if not isinstance(theme, Mapping) or not isinstance(theme.get("name"), str):
            raise Unreadable(f"themes: got {str(theme)[:80]}, expected a name and tips")
    return tuple(Theme(theme["name"], read_strings(theme.get("tips"), "tips")) for theme in themes)


@register_reward("auto_rubric")
class AutoRubricReward:
    """A picture's rank in its group by a rubric, as 1 - 1.1 (rank - 1) / (n - 1); higher is better, range [-0.1, 1].

    A model is shown prompt, rubric and the group's pictures in random order and ranks them. Invalid are groups of one
    and those whose answer was no ranking. No gradient.

    Args:
        rubric: a file as `AutoRubric.save` writes it, or an AutoRubric.
        model, url, chat_options: the judge, as for `make_chat`; or `chat`, one that is there already.
        max_tokens: of an answer.
        retries: how often an unreadable answer is asked for again.
        seed: of the order shown, and of retries.
    """

    name = "auto_rubric"
    differentiable = False
    kind = "groupwise"
    range = (-0.1, 1.0)
    needs = ("prompts",)
    media = "images"
    checkpoints = ("any vision-language model that follows instructions",)
    licence = "the model's own"
    source = "Auto-Rubric as Reward, and Rubric Policy Optimization"

    def __init__(
        self,
        rubric: str | Path | AutoRubric,
        model: str = "",
        url: str | None = None,
        chat: Chat | None = None,
        chat_options: Mapping[str, Any] | None = None,
        max_tokens: int = 512,
        retries: int = 3,
        seed: int = 0,
    ) -> None:
        options = {"rubric": rubric, "model": model, "chat": chat, "max_tokens": max_tokens, "retries": retries}
        self.preflight(options)
        self.rubric = rubric if isinstance(rubric, AutoRubric) else load_auto_rubric(rubric)
        self._params = SamplingParams(max_tokens, seed=seed, retries=retries)
        self._chat = open_chat(chat, model, url, chat_options)

    @staticmethod
    def preflight(options: Mapping[str, Any]) -> None:
        """Raise ValueError for options that cannot work, without loading anything."""
        if not isinstance(options["rubric"], AutoRubric):
            load_auto_rubric(options["rubric"])
        check_judge(options)

    def __call__(self, images: Tensor, prompts: Sequence[str], context: Context | None = None) -> RewardOutput:
        """images: (N, 3, H, W) in [0, 1]; context["group_ids"]: (N,). Returns (N,), float32 on the CPU."""
        check_images(images)
        check_prompts(images, prompts)
        groups = [members for members in group_places(prompts, context, self.name) if len(members) > 1]
        pictures = [[images[n].detach() for n in members] for members in groups]
        first = [prompts[members[0]] for members in groups]
        judged = judge_ranks(self._chat, [self.rubric.text] * len(groups), first, pictures, self._params)
        scores, valid = torch.zeros(len(images)), torch.zeros(len(images), dtype=torch.bool)
        reasons: list[str | None] = ["a group of one has no ranking"] * len(images)
        for members, ranks in zip(groups, judged):
            for place, n in enumerate(members):
                reasons[n] = "the judge gave no ranking" if ranks is None else f"rank {ranks[place]} of {len(members)}"
            if ranks is not None:
                scores[members] = rank_rewards(torch.tensor(ranks))
                valid[members] = True
        return RewardOutput(scores, rationale=reasons, valid=valid)


def check_judge(options: Mapping[str, Any]) -> None:
    """Raise ValueError unless a model or a chat is given, and the limits of its answers are numbers that make sense."""
    if options.get("chat") is None and not options.get("model"):
        raise ValueError("model: got none, expected a model's name or folder (with url, one that an endpoint serves)")
    SamplingParams.of(options)
