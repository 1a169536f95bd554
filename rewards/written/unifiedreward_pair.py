"""UnifiedReward's comparisons of two pictures (see unifiedreward.py), as rates of wins within groups."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visalign.images import check_images
from visalign.names import unknown_name
from visalign.rewards.base import Context, RewardError, RewardOutput, check_prompts, register_reward
from visalign.rewards.groups.pairwise import all_pairs, win_rates
from visalign.rewards.vlm.chat import Chat, Message
from visalign.rewards.vlm.judging import Answer, SamplingParams, ask, column, fill, load_template, open_chat

from .unifiedreward import UnifiedJudge
from .unifiedreward_answers import read_rank, read_shares, read_think

FORMATS = {  # of a comparison: its template, and how many tokens an answer may have
    "think": ("unifiedreward_think_image", 2048),
    "rank": ("unifiedreward_pair_rank_image", 512),
    "score": ("unifiedreward_pair_score_image", 512),
}
CERTAIN = 10.0  # log-odds that stand for a verdict without a degree


@register_reward("unifiedreward_pair")
class UnifiedRewardPair(UnifiedJudge):
    """Each picture's rate of wins against the others of its group, 0 to 1, higher is better; no gradient.

    All pairs of a group are compared once (Pref-GRPO, arXiv:2508.20751), the first place going round; unread
    comparisons count half to both, and a picture none of whose comparisons was read is invalid. By `format`: "think"
    (verdict after reasoning), "rank" (verdict), "score" (shares of three dimensions; their mean is the outcome [R]).
    `compare` judges single pairs, for swapped orders and other designs of `visalign.rewards.groups.pairwise`.

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
        self.preflight({"format": format, "template": template})
        name, limit = FORMATS[format]
        limit = limit if max_tokens is None else max_tokens
        self.params = SamplingParams(limit, temperature, seed=seed, retries=retries)
        self.chat = open_chat(chat, model, url, chat_options)
        self.format = format
        self._template = load_template(name, template)

    @staticmethod
    def preflight(options: Mapping[str, Any]) -> None:
        """Raise ValueError for options that cannot work, without loading anything."""
        if options.get("format", "think") not in FORMATS:
            raise unknown_name("format", options["format"], FORMATS)
        SamplingParams.of(options)
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
        conversations = [[Message("user", fill(self._template, prompt, (one, other)))] for one, other, prompt in pairs]
        return ask(self.chat, conversations, lambda reply: read(reply.text), self.params)


def _groups(context: Context | None, count: int, name: str) -> list[list[int]]:
    """Rows of each group, in order of first appearance."""
    ids = (context or {}).get("group_ids")
    if ids is not None and len(ids) != count:
        raise RewardError(name, f"got {len(ids)} group_ids, expected {count}, one per image")
    groups: dict[int, list[int]] = {}
    for n in range(count):
        groups.setdefault(0 if ids is None else int(ids[n]), []).append(n)
    return list(groups.values())
