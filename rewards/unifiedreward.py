"""UnifiedReward (Wang et al. 2025, arXiv:2503.05236; Think: arXiv:2505.03318): scores and comparisons in writing."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visalign.images import check_images, check_videos, is_video
from visalign.names import unknown_name

from .base import Context, RewardError, check_prompts, register_reward
from .chat import Chat, Message, Reply
from .judging import (
    Answer,
    ask,
    check_count,
    check_temperature,
    column,
    fill,
    load_template,
    load_templates,
    open_chat,
    template_folder,
)
from .output import RewardOutput
from .pairwise import all_pairs, win_rates
from .parsing import Unreadable, as_numbers

VERSIONS = ("2.0", "1")
QUESTIONS = {  # the templates of each version
    "2.0": {"image": "unifiedreward_point_v2_image", "video": "unifiedreward_point_v2_video"},
    "1": {"image": "unifiedreward_point_v1"},
}
FORMATS = {  # of a comparison: its template, and how many tokens an answer may have
    "think": ("unifiedreward_think_image", 2048),
    "rank": ("unifiedreward_pair_rank_image", 512),
    "score": ("unifiedreward_pair_score_image", 512),
}
DIMENSIONS = {"images": ("Alignment", "Coherence", "Style"), "videos": ("Alignment", "Physics", "Style")}
CERTAIN = 10.0  # log-odds that stand for a verdict without a degree
_SHARE = r"\s*:?\s*Image\s*1\s*:\s*([\d.]+)\s*Image\s*2\s*:\s*([\d.]+)"


def read_final_score(text: str) -> float:
    """The number after the last "Final Score:", 1 to 5 (version 1)."""
    found = re.findall(r"Final Score:\s*\**\s*(\d+(?:\.\d+)?)", text)
    if not found:
        raise Unreadable("no 'Final Score:'")
    return as_numbers(float(found[-1]), 1, 1, 5, "Final Score")[0]


def read_dimensions(text: str, dimensions: Sequence[str]) -> dict[str, float | None]:
    """The numbers, 0 to 5, after "<Dimension> Score (1-5):" (version 2.0); None for those that are missing.

    Raises:
        Unreadable: all are missing, or one is out of range.
    """
    found = dict(re.findall(r"(\w+) Score \(1-5\):\s*\**\s*(\d+(?:\.\d+)?)", text))
    if not set(found) & set(dimensions):
        raise Unreadable(f"no score for any of {list(dimensions)}")
    return {d: as_numbers(float(found[d]), 1, 0, 5, d)[0] if d in found else None for d in dimensions}


def read_rank(text: str) -> float:
    """1 where the text says that image 1 is better, 0 for image 2, 1/2 for neither or both."""
    said = {number for number in "12" if re.search(rf"\bImage {number} is better\b", text, re.IGNORECASE)}
    if len(said) == 1:
        return 1.0 if said == {"1"} else 0.0
    if said or re.search(r"\bBoth images are equally good\b", text, re.IGNORECASE):
        return 0.5
    raise Unreadable("no verdict")


def read_think(text: str) -> float:
    """As `read_rank`, of the last <answer>...</answer> after the thinking; an unfinished one counts for nothing."""
    answers = re.findall(r"<answer>(.*?)</answer>", text.rpartition("</think>")[2], re.DOTALL)
    if not answers:
        raise Unreadable("no finished <answer>")
    return read_rank(answers[-1])


def read_shares(text: str) -> float:
    """Image 1's share, 0 to 1: the mean over dimensions of x / (x + y), which the judge is told to make sum to 1."""
    shares = []
    for dimension in DIMENSIONS["images"]:
        match = re.search(rf"{dimension} Score{_SHARE}", text)
        if match is None:
            raise Unreadable(f"no shares for {dimension}")
        try:
            first, second = as_numbers([float(match[1]), float(match[2])], 2, 0, 1, dimension)
        except ValueError as error:
            raise Unreadable(f"{dimension}: got {match[1]} and {match[2]}, expected numbers within [0, 1]") from error
        if abs(first + second - 1) > 0.05:
            raise Unreadable(f"{dimension}: got shares {first:g} and {second:g}, expected a sum of 1")
        shares.append(first / (first + second))
    return math.fsum(shares) / len(shares)


class _Judge:
    """What the two rewards share: their chat and how it is asked."""

    differentiable = False
    needs = ("prompts",)
    stochastic = False
    licence = "see the models' pages"
    source = "arXiv:2503.05236, arXiv:2505.03318"

    def _open(self, chat: Chat, max_tokens: int, temperature: float, seed: int, retries: int) -> None:
        self.chat, self.max_tokens = chat, max_tokens
        self.temperature, self.seed, self.retries = temperature, seed, retries

    def _ask(self, conversations: Sequence[Sequence[Message]], read: Any) -> list[Answer]:
        return ask(
            self.chat,
            conversations,
            read,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            seed=self.seed,
            retries=self.retries,
        )


def _questions(version: str, given: Mapping[str, str | Path] | None) -> dict[str, str]:
    """By medium, those that are given or in the folder; without any, the error is about the first."""
    if given is not None and (not isinstance(given, Mapping) or set(given) - set(QUESTIONS[version])):
        return load_templates(QUESTIONS[version], given)  # which refuses it
    names = QUESTIONS[version].items()
    there = {key: name for key, name in names if key in (given or {}) or (template_folder() / f"{name}.txt").is_file()}
    return load_templates(there or QUESTIONS[version], given)


@register_reward("unifiedreward")
class UnifiedReward(_Judge):
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
        options = {"version": version, "fill_missing": fill_missing, "templates": templates, "retries": retries}
        self.preflight({**options, "temperature": temperature, "max_tokens": max_tokens})
        self._open(open_chat(chat, model, url, chat_options), max_tokens, temperature, seed, retries)
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
        check_count(options, max_tokens=1, retries=0)
        check_temperature(options)
        _questions(version, options.get("templates"))

    def __call__(self, images: Tensor, prompts: Sequence[str], context: Context | None = None) -> RewardOutput:
        """images: (N, 3, H, W), with version 2.0 also videos (N, F, 3, H, W), in [0, 1]; prompts: N strings."""
        video = self.media == "videos" or (is_video(images) and self.media == "both")
        (check_videos if video else check_images)(images)
        check_prompts(images, prompts)
        kind = "video" if video else "image"
        dimensions = DIMENSIONS[f"{kind}s"] if self.version == "2.0" else ("Final",)
        answers = self._ask(
            [
                [Message("user", fill(self._questions[kind], p, tuple(image) if video else (image,)))]
                for image, p in zip(images, prompts)
            ],
            lambda reply: self._read(reply, dimensions),
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
        found = read_dimensions(reply.text, dimensions)
        missing = [d for d, mark in found.items() if mark is None]
        if missing and not self.fill_missing:
            raise Unreadable(f"no score for {', '.join(missing)}")
        return found


@register_reward("unifiedreward_pair")
class UnifiedRewardPair(_Judge):
    """Each picture's rate of wins against the others of its group, 0 to 1, higher is better; no gradient.

    All pairs of a group are compared once (Pref-GRPO, arXiv:2508.20751), the first place going round; unread
    comparisons count half to both, and a picture none of whose comparisons was read is invalid. By `format`: "think"
    (verdict after reasoning), "rank" (verdict), "score" (shares of three dimensions; their mean is the outcome [R]).
    `compare` judges single pairs, for swapped orders and other designs of `visalign.rewards.pairwise`.

    Args:
        format: what the model was taught to write.
        template: the question it was taught, with "{prompt}": a .txt file or the text; None: the format's in the folder
            of templates, see `load_template`.
        model, url, chat_options: of `make_chat`. `chat`: one already made.
        max_tokens: of an answer; None: 2048 with reasoning, else 512.
    """

    name = "unifiedreward_pair"
    kind = "groupwise"
    media = "images"
    range = (0.0, 1.0)
    checkpoints = (
        "CodeGoat24/UnifiedReward-Think-7b",
        "CodeGoat24/UnifiedReward-Think-qwen-7b",
        "CodeGoat24/UnifiedReward-Think-qwen3vl-8b",
        "CodeGoat24/UnifiedReward-2.0-qwen3vl-8b",
        "CodeGoat24/UnifiedReward-qwen-7b",
    )

    def __init__(
        self,
        format: str = "think",
        template: str | Path | None = None,
        model: str = "CodeGoat24/UnifiedReward-Think-qwen3vl-8b",
        url: str | None = None,
        chat: Chat | None = None,
        chat_options: Mapping[str, Any] | None = None,
        temperature: float = 0.0,
        max_tokens: int | None = None,
        seed: int = 0,
        retries: int = 3,
    ) -> None:
        options: dict[str, Any] = {"format": format, "template": template, "retries": retries}
        options["temperature"] = temperature
        self.preflight(options if max_tokens is None else {**options, "max_tokens": max_tokens})
        name, limit = FORMATS[format]
        limit = limit if max_tokens is None else max_tokens
        self._open(open_chat(chat, model, url, chat_options), limit, temperature, seed, retries)
        self.format = format
        self._template = load_template(name, template)

    @staticmethod
    def preflight(options: Mapping[str, Any]) -> None:
        """Raise ValueError for options that cannot work, without loading anything."""
        if options.get("format", "think") not in FORMATS:
            raise unknown_name("format", options["format"], FORMATS)
        if options.get("max_tokens") is not None:
            check_count(options, max_tokens=1)
        check_count(options, retries=0)
        check_temperature(options)
        load_template(FORMATS[options.get("format", "think")][0], options.get("template"))

    def __call__(self, images: Tensor, prompts: Sequence[str], context: Context | None = None) -> RewardOutput:
        """images: (N, 3, H, W) in [0, 1]; prompts: N strings; context["group_ids"] (N,); without, all are one group."""
        check_images(images)
        check_prompts(images, prompts)
        pairs, groups = [], _groups(context, len(images), self.name)
        for group in groups:
            if len({prompts[n] for n in group}) > 1:
                raise RewardError(self.name, "got different prompts in one group, expected the same", sample=group[0])
            pairs += [(group[i], group[j]) for i, j in all_pairs(len(group))]
        answers = self._compare([(images[i], images[j], prompts[i]) for i, j in pairs])
        outcomes = torch.tensor([0.5 if answer.value is None else answer.value for answer in answers])
        read = {n for pair, answer in zip(pairs, answers) if answer.value is not None for n in pair}
        lines: list[list[str]] = [[] for _ in prompts]
        for (i, j), answer in zip(pairs, answers):
            for n in (i, j):
                lines[n].append(f"{i} against {j}: {answer.problem or answer.reply.text}")
        return RewardOutput(
            win_rates(pairs, outcomes, len(images)),
            {},
            ["\n".join(own) or "no other in its group" for own in lines],
            torch.tensor([n in read for n in range(len(images))]),
            extra={"pairs": pairs, "outcomes": outcomes},
        )

    def compare(self, first: Tensor, second: Tensor, prompts: Sequence[str], context: Context | None = None) -> Tensor:
        """Log-odds (N,) that the first of each pair is better, within +-CERTAIN; NaN where the answer stays unread."""
        answers = self._compare(list(zip(first, second, prompts)))
        shares = column([answer.value for answer in answers])
        return torch.logit(shares.double()).clamp(-CERTAIN, CERTAIN).float()

    def _compare(self, pairs: Sequence[tuple[Tensor, Tensor, str]]) -> list[Answer]:
        read = {"think": read_think, "rank": read_rank, "score": read_shares}[self.format]
        conversations = [[Message("user", fill(self._template, told, (one, other)))] for one, other, told in pairs]
        return self._ask(conversations, lambda reply: read(reply.text))


def _groups(context: Context | None, count: int, name: str) -> list[list[int]]:
    """Rows of each group, in order of first appearance."""
    ids = (context or {}).get("group_ids")
    if ids is not None and len(ids) != count:
        raise RewardError(name, f"got {len(ids)} group_ids, expected {count}, one per image")
    groups: dict[int, list[int]] = {}
    for n in range(count):
        groups.setdefault(0 if ids is None else int(ids[n]), []).append(n)
    return list(groups.values())
