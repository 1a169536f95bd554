"""UnifiedReward-Flex (Wang et al. 2026, arXiv:2602.02380): pairs compared by fitting categories, then win rates."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visalign.advantages.group import group_advantages
from visalign.images import check_images
from visalign.rewards.base import Context, RewardOutput, check_prompts, register_reward
from visalign.rewards.failures import fill_invalid
from visalign.rewards.groups.candidates import group_places, picture_digest, shown_pairs
from visalign.rewards.groups.pairwise import win_rates
from visalign.rewards.vlm.chat import Chat, Message, Reply
from visalign.rewards.vlm.judging import SamplingParams, ask, fill, load_template, open_chat
from visalign.rewards.vlm.parsing import read_json

from .auto_rubric import check_judge

CATEGORIES = ("alignment", "quality", "aesthetics")  # the fixed ones, in the order of the answer
TEMPLATE = """Compare Image 1 with Image 2, both made for the prompt below.

Judge in three categories, in this order: "A. Semantic alignment" (are the prompt's things, attributes and relations
there), "B. Image quality and realism" (is it clean, possible, well made), "C. Aesthetics" (does it please as a
picture). Add a fourth, "D", only where the prompt asks for something that belongs to none of them. In each category
choose three to five dimensions in which these two differ; give evidence for both images, and share ten points between
them.

Prompt: [{prompt}]

Answer with one JSON object:
{"categories": [{"name": "A. Semantic alignment", "dims": [{"name": "...", "reason_1": "...", "reason_2": "...",
"score_1": 7, "score_2": 3}], "cat_reason": "...", "cat_winner": "Image 1"}], "reason": "...", "winner": "Image 1"}
"""


@dataclass(frozen=True)
class Comparison:
    """Who won, 1 or 2, or 0 for a tie or an unclear word: overall, and in each of the first three categories named."""

    winner: int
    categories: tuple[int, ...]


def read_comparison(reply: Reply) -> Comparison:
    """The comparison in a model's JSON.

    Raises:
        Unreadable: no JSON object with a winner.
    """
    value = read_json(reply.text, ["winner"])
    categories = value.get("categories")
    named = [c for c in categories if isinstance(c, Mapping)] if isinstance(categories, list) else []
    return Comparison(_winner(value["winner"]), tuple(_winner(c.get("cat_winner")) for c in named[: len(CATEGORIES)]))


def _winner(text: object) -> int:
    """1 or 2 where only that image is named, else 0."""
    named = {int(k) for k in re.findall(r"\b(?:image|picture)\s*([12])\b", str(text).lower())}
    return named.pop() if len(named) == 1 else 0


@dataclass(frozen=True)
class FlexScores:
    """Of a group: the blend, and what went into it, (n,) each; NaN where a sample was compared in no category."""

    reward: Tensor
    overall: Tensor
    dim_mean: Tensor
    categories: Tensor  # (3, n) win rates


def flex_scores(
    pairs: Sequence[tuple[int, int]],
    comparisons: Sequence[Comparison | None],
    size: int,
    overall_weight: float = 1.0,
    dim_weight: float = 1.0,
    category_weights: Sequence[float] = (1.0, 1.0, 1.0),
) -> FlexScores:
    """(w_o overall + w_d dim_mean) / (w_o + w_d): overall win rate and weighted mean of three categories' win rates.

    Ties are half a win, and so is, overall, a comparison that could not be read (None), which has no categories. A
    sample without any category has its overall win rate as reward. Categories are told by their place in the answer
    (the reference code tells them by the names the model gives); win rates are not rounded to 3 decimals as there.
    """
    points = {1: 1.0, 2: 0.0, 0: 0.5}
    overall = win_rates(pairs, torch.tensor([points[c.winner if c else 0] for c in comparisons]), size)
    rows = []
    for k in range(len(CATEGORIES)):
        rated = [(pair, points[c.categories[k]]) for pair, c in zip(pairs, comparisons) if c and len(c.categories) > k]
        rates = win_rates([pair for pair, _ in rated], torch.tensor([p for _, p in rated]), size)
        compared = torch.bincount(
            torch.tensor([n for pair, _ in rated for n in pair], dtype=torch.long), minlength=size
        )
        rows.append(torch.where(compared > 0, rates, math.nan))
    categories, weights = torch.stack(rows), torch.tensor(category_weights)[:, None]
    known = ~categories.isnan()
    dim_mean = (torch.where(known, categories, 0.0) * weights).sum(0) / (known * weights).sum(0)
    blend = (overall_weight * overall + dim_weight * dim_mean) / (overall_weight + dim_weight)
    return FlexScores(torch.where(dim_mean.isnan(), overall, blend), overall, dim_mean, categories)


def decoupled_advantages(
    overall: Tensor, dim_mean: Tensor, group_ids: Tensor, overall_weight: float = 1.0, dim_weight: float = 1.0
) -> Tensor:
    """The reference's decoupled mode: each component is standardised in its group, then they are blended, (N,).

    Args:
        overall, dim_mean: the reward's criteria (N,); a NaN in the latter counts as its group's mean.
    """
    known = ~dim_mean.isnan()
    filled = fill_invalid(dim_mean, known, group_ids) if known.any() else torch.zeros_like(overall)
    parts = group_advantages(overall, group_ids), group_advantages(filled, group_ids)
    blend = (overall_weight * parts[0] + dim_weight * parts[1]) / (overall_weight + dim_weight)
    return torch.where(known, blend, parts[0])


@register_reward("unifiedreward_flex")
class UnifiedRewardFlex:
    """How often a picture beats the others of its group, overall and by category; range [0, 1], 1/2 in a group of one.

    Each two pictures of a group are compared once, in random order; see `flex_scores`. Criteria: "overall", "dim_mean"
    (both also for `decoupled_advantages`) and the three categories. A sample none of whose comparisons could be read
    is invalid (with 1/2). No gradient.

    Args:
        model, url, chat, chat_options: the judge, as for `auto_rubric`.
        template: text with {prompt}, or a .txt file of it; None: our wording, for any model. The published checkpoints
            were trained on the text `problem` in UnifiedReward-Flex/flex_pair_rank_image_generation.py of
            github.com/CodeGoat24/UnifiedReward: give them that.
        overall_weight, dim_weight, category_weights: see `flex_scores`.
        max_tokens, retries, seed: as for `auto_rubric`.
    """

    name = "unifiedreward_flex"
    differentiable = False
    kind = "groupwise"
    range = (0.0, 1.0)
    needs = ("prompts",)
    media = "images"
    checkpoints = ("CodeGoat24/UnifiedReward-Flex-qwen3vl-*", "any vision-language model that follows instructions")
    licence = "the model's own"
    source = "Wang et al. 2026, arXiv:2602.02380; win rates: Pref-GRPO, arXiv:2508.20751"

    def __init__(
        self,
        model: str = "",
        url: str | None = None,
        chat: Chat | None = None,
        chat_options: Mapping[str, Any] | None = None,
        template: str | Path | None = None,
        overall_weight: float = 1.0,
        dim_weight: float = 1.0,
        category_weights: Sequence[float] = (1.0, 1.0, 1.0),
        max_tokens: int = 4096,
        retries: int = 3,
        seed: int = 0,
    ) -> None:
        options = {"model": model, "chat": chat, "template": template, "max_tokens": max_tokens, "retries": retries}
        weights = {"overall_weight": overall_weight, "dim_weight": dim_weight, "category_weights": category_weights}
        self.preflight({**options, **weights})
        self._template = _template(template)
        self._weights = (overall_weight, dim_weight, tuple(category_weights))
        self._params = SamplingParams(max_tokens, seed=seed, retries=retries)
        self._chat = open_chat(chat, model, url, chat_options)

    @staticmethod
    def preflight(options: Mapping[str, Any]) -> None:
        """Raise ValueError for options that cannot work, without loading anything."""
        check_judge(options)
        _template(options.get("template"))
        both = (options.get("overall_weight", 1.0), options.get("dim_weight", 1.0))
        if min(both) < 0 or sum(both) == 0:
            raise ValueError(f"overall_weight, dim_weight: got {both}, expected two of at least 0, not both 0")
        own = options.get("category_weights", (1.0, 1.0, 1.0))
        if len(own) != len(CATEGORIES) or min(own) <= 0:
            raise ValueError(f"category_weights: got {own}, expected three numbers above 0, for {CATEGORIES}")

    def __call__(self, images: Tensor, prompts: Sequence[str], context: Context | None = None) -> RewardOutput:
        """images: (N, 3, H, W) in [0, 1]; context["group_ids"]: (N,). Returns (N,), float32 on the CPU."""
        check_images(images)
        check_prompts(images, prompts)
        groups, digests = group_places(prompts, context, self.name), [picture_digest(image) for image in images]
        pairs = [shown_pairs([digests[n] for n in members], self._params.seed) for members in groups]
        conversations = [
            [Message("user", fill(self._template, prompts[m[i]], [images[m[i]].detach(), images[m[j]].detach()]))]
            for m, own in zip(groups, pairs)
            for i, j in own
        ]
        answers = iter(ask(self._chat, conversations, read_comparison, self._params))
        columns = torch.full((3 + len(CATEGORIES), len(images)), math.nan)
        valid = torch.ones(len(images), dtype=torch.bool)
        for members, own in zip(groups, pairs):
            answered = [next(answers).value for _ in own]
            result = flex_scores(own, answered, len(members), *self._weights)
            columns[:, members] = torch.cat(
                [torch.stack([result.reward, result.overall, result.dim_mean]), result.categories]
            )
            read = {n for pair, comparison in zip(own, answered) if comparison for n in pair}
            valid[members] = torch.tensor([len(members) == 1 or n in read for n in range(len(members))])
        return RewardOutput(columns[0], dict(zip(("overall", "dim_mean", *CATEGORIES), columns[1:])), valid=valid)


def _template(given: str | Path | None) -> str:
    text = TEMPLATE if given is None else load_template("", given)
    if "{prompt}" not in text:
        raise ValueError(f"template: got {text[:60]!r}..., expected text with {{prompt}} in it")
    return text
