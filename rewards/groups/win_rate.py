"""A reward from comparisons: how often a picture beats the others of its group, or given references."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from visalign.images import check_images, check_videos, is_video
from visalign.locations import load_location
from visalign.names import unknown_name
from visalign.rewards.base import (
    Context,
    Reward,
    RewardError,
    RewardOutput,
    as_output,
    as_reward,
    as_scores,
    check_prompts,
    register_reward,
)
from visalign.rewards.spec import make_reward, parse_spec
from visalign.statistics.bradley_terry import bradley_terry

from .pairwise import (
    PairJudge,
    Verdicts,
    all_pairs,
    ask_both,
    drawn_pairs,
    pair_ends,
    take_context,
    win_rates,
)

OUTCOMES = ("hard", "soft")
STRENGTHS = ("win_rate", "bradley_terry")


def make_judge(judge: "str | Mapping[str, Any] | Callable") -> PairJudge:
    """A pair judge from what a config says, or from an object.

    That is a function of (first, second, prompts[, context]) itself, or where to import one from; or a reward, or its
    spec: one with a method `compare(first, second, prompts, context)` judges by that, any other pointwise one by the
    difference of its scores as log-odds.
    """
    loaded = _imported(judge) if isinstance(judge, (str, Mapping)) else judge
    compare = getattr(loaded, "compare", None)
    if compare is not None:
        return compare
    if next(iter(inspect.signature(loaded).parameters), None) == "first":
        return loaded
    reward = as_reward(loaded)
    if reward.kind != "pointwise":
        raise ValueError(
            f"judge: got the {reward.kind} reward {reward.name!r}, expected one of pairs or a pointwise one"
        )

    return ScoreJudge(reward)


class ScoreJudge:
    """Judges by the difference of a pointwise reward's scores, as log-odds; the order shown means nothing to it."""

    def __init__(self, reward: Reward) -> None:
        self.reward = reward

    def __call__(self, first: Tensor, second: Tensor, prompts: Sequence[str], context: Context | None = None) -> Tensor:
        return self.scores(first, prompts, context) - self.scores(second, prompts, context)

    def scores(self, images: Tensor, prompts: Sequence[str], context: Context | None) -> Tensor:
        """(N,) on the CPU, NaN where the reward failed."""
        output = as_output(self.reward(images, prompts, context), self.reward.name, prompts)
        return torch.where(output.is_valid, output.scores.detach(), math.nan).cpu()


def _imported(judge: str | Mapping[str, Any]) -> Any:
    """What a spec names: of a file or module the attribute itself (an instance, if it is a class), else the reward."""
    terms = parse_spec(judge)
    if len(terms) == 1 and ":" in terms[0].name:
        loaded = load_location("judge", terms[0].name)
        loaded = loaded(**terms[0].options) if isinstance(loaded, type) else loaded
        if hasattr(loaded, "compare") or next(iter(inspect.signature(loaded).parameters), None) == "first":
            return loaded
    return make_reward(judge)


@register_reward("win_rate")
class WinRate:
    """How often a picture beats the others of its group in a judge's eyes: the pairwise preference reward of Pref-GRPO
    (Wang et al. 2025, arXiv:2508.20751). Higher is better; a group's win rates sum to half its size.

    Range [0, 1]; 1/2 for a group of one. With `strength="bradley_terry"` unbounded strengths around 0 instead. No
    gradient. Each pair is asked in both orders, and counts as a tie where they disagree ([R]; the paper's code asks
    once and rounds to 3 decimals). A sample all of whose comparisons failed is invalid; single failures are ties.
    The criteria are each sample's mean `consistency` and first-place `bias` (log-odds), where asked in both orders.

    Args:
        judge: see `make_judge`.
        opponents: how many others each is compared with, the same pairs of places in every group of a size
            (see `drawn_pairs`); None: all.
        references: compare with `context["references"]` of the sample instead of with its group.
        swap: ask in both orders. False halves the work; then who stands first alternates.
        outcome: "hard" counts wins, ties as half; "soft" adds up the judge's probabilities.
        batch_size: pairs in one call of the judge (twice as many pictures-in-order with `swap`).
        seed: of the drawing of opponents.
    """

    name = "win_rate"
    differentiable = False
    kind = "groupwise"
    range: tuple[float, float] = (0.0, 1.0)
    needs: tuple[str, ...] = ("prompts",)
    media = "both"
    licence = "that of the judge"
    source = "arXiv:2508.20751"

    def __init__(
        self,
        judge: "str | Mapping[str, Any] | Callable",
        opponents: int | None = None,
        references: bool = False,
        swap: bool = True,
        outcome: str = "hard",
        strength: str = "win_rate",
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        _check(opponents, references, outcome, strength, batch_size)
        self.judge = make_judge(judge)
        self.opponents, self.references, self.swap = opponents, references, swap
        self.outcome, self.strength, self.batch_size, self.seed = outcome, strength, batch_size, seed
        if references:
            self.needs = ("prompts", "references")
        if strength != "win_rate":
            self.range = (-math.inf, math.inf)

    @staticmethod
    def preflight(options: Mapping[str, Any]) -> None:
        """Raise ValueError for options that cannot work, without loading anything."""
        if isinstance(options["judge"], (str, Mapping)):
            parse_spec(options["judge"])
        _check(
            options.get("opponents"),
            options.get("references", False),
            options.get("outcome", "hard"),
            options.get("strength", "win_rate"),
            options.get("batch_size", 32),
        )

    def __call__(self, images: Tensor, prompts: Sequence[str], context: Context | None = None) -> RewardOutput:
        """images: (N, 3, H, W), or videos (N, F, 3, H, W), in [0, 1]. Returns (N,), float32 on the CPU."""
        (check_videos if is_video(images) else check_images)(images)
        check_prompts(images, prompts)
        pool, pairs = self._pairs(images, prompts, context or {})
        scores = self._scores(pool, pairs, prompts, context) if isinstance(self.judge, ScoreJudge) else None
        verdicts = [
            self._ask(pool, pairs[k : k + self.batch_size], prompts, context, scores)
            for k in range(0, len(pairs), self.batch_size)
        ]
        outcomes, known, consistent, bias = (
            (torch.cat(column) for column in zip(*verdicts)) if verdicts else [torch.ones(0)] * 4
        )
        if self.strength == "win_rate":
            scores = win_rates(pairs, outcomes, len(pool))
        else:
            first, second = (end.tolist() for end in pair_ends(pairs))
            strengths = bradley_terry(first, second, outcomes.tolist(), len(pool), prior=math.inf, virtual_games=0.5)
            scores = torch.from_numpy(strengths.values).float()
        n = len(images)
        criteria = {"consistency": _means(pairs, consistent, len(pool))[:n], "bias": _means(pairs, bias, len(pool))[:n]}
        valid = _means(pairs, known, len(pool))[:n] != 0  # NaN, where there was nothing to compare with, is no failure
        return RewardOutput(scores[:n], criteria if self.swap else {}, valid=valid)

    def _pairs(
        self, images: Tensor, prompts: Sequence[str], context: Context
    ) -> tuple[list[Tensor], list[tuple[int, int]]]:
        """The samples, then the references, and the places in that list of who is compared with whom."""
        pool, pairs = list(images), []
        if self.references:
            for n, pictures in enumerate(context["references"]):
                for picture in pictures:
                    if picture.shape != images.shape[1:]:
                        problem = f"got a reference of shape {tuple(picture.shape)}, expected {tuple(images.shape[1:])}"
                        raise RewardError(self.name, f"{problem}, as the picture", n, prompts[n])
                    pairs.append((len(pool), n))  # asked once, a judge sees the reference first for every sample
                    pool.append(picture.to(images))
            return pool, pairs
        groups: dict[int, list[int]] = {}
        ids = context.get("group_ids")
        for n, group in enumerate([0] * len(images) if ids is None else torch.as_tensor(ids).tolist()):
            groups.setdefault(group, []).append(n)
        for members in groups.values():
            if len({prompts[n] for n in members}) > 1:
                problem = "got different prompts in one group, expected context['group_ids'] to tell groups apart"
                raise RewardError(self.name, problem, members[0], prompts[members[0]])
            size, generator = len(members), torch.Generator().manual_seed(self.seed)
            places = all_pairs(size) if self.opponents is None else drawn_pairs(size, self.opponents, generator)
            pairs += [(members[i], members[j]) for i, j in places]
        return pool, pairs

    def _scores(
        self, pool: list[Tensor], pairs: Sequence[tuple[int, int]], prompts: Sequence[str], context: Context | None
    ) -> Tensor:
        """(len(pool),) of a judge that scores: each picture once, however many it is compared with."""
        assert isinstance(self.judge, ScoreJudge)
        samples = list(range(len(pool)))
        for i, j in pairs:  # a reference belongs to the sample it is compared with
            samples[max(i, j)] = min(i, j) if max(i, j) >= len(prompts) else samples[max(i, j)]
        parts = []
        for k in range(0, len(pool), self.batch_size):
            own = samples[k : k + self.batch_size]
            chosen = None if context is None else take_context(context, own, len(prompts))
            images = torch.stack(pool[k : k + self.batch_size])
            parts.append(self.judge.scores(images, [prompts[n] for n in own], chosen))
        return torch.cat(parts)

    def _ask(
        self,
        pool: list[Tensor],
        pairs: Sequence[tuple[int, int]],
        prompts: Sequence[str],
        context: Context | None,
        scores: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of each pair (P,): the first one's outcome, whether the judge said anything, its consistency and bias."""
        if scores is not None:
            difference = torch.stack([scores[i] - scores[j] for i, j in pairs])
            return self._outcomes(Verdicts(difference, -difference))
        first, second = (torch.stack([pool[pair[k]] for pair in pairs]) for k in (0, 1))
        samples = [min(pair) for pair in pairs]  # references stand after the samples
        words = [prompts[n] for n in samples]
        chosen = None if context is None else take_context(context, samples, len(prompts))
        if self.swap:
            verdicts = ask_both(self.judge, first, second, words, chosen, self.name)
        else:  # as if the judge had no bias
            forward = as_scores(self.judge(first, second, words, chosen), self.name, words).detach().cpu()
            verdicts = Verdicts(forward, -forward)
        return self._outcomes(verdicts)

    def _outcomes(self, verdicts: Verdicts) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        known = ~verdicts.log_odds.isnan()
        outcomes = verdicts.outcome if self.outcome == "hard" else torch.where(known, verdicts.probability, 0.5)
        return outcomes, known.float(), torch.where(known, verdicts.consistent.float(), math.nan), verdicts.bias


def _means(pairs: Sequence[tuple[int, int]], values: Tensor, size: int) -> Tensor:
    """Mean of the pairs' values over each member's pairs, NaN left out, (size,); NaN where nothing is left."""
    ends = torch.cat(pair_ends(pairs))
    known = ~values.isnan()
    sums = torch.zeros(size).index_add_(0, ends, torch.where(known, values, 0.0).repeat(2))
    return sums / torch.zeros(size).index_add_(0, ends, known.float().repeat(2))


def _check(opponents: int | None, references: bool, outcome: str, strength: str, batch_size: int) -> None:
    if opponents is not None and (references or opponents < 1):
        expected = "none together with references" if references else ">= 1"
        raise ValueError(f"opponents: got {opponents}, expected {expected}")
    if outcome not in OUTCOMES:
        raise unknown_name("outcome", outcome, OUTCOMES)
    if strength not in STRENGTHS:
        raise unknown_name("strength", strength, STRENGTHS)
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, expected >= 1")
