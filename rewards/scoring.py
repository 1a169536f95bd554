"""Calling rewards safely: several combined into one, and `score`, which lets no unusable score through."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from visalign.images import check_images, check_pixels, check_references, check_videos, is_video

from .base import KINDS, Context, Reward, RewardError, RewardOutput, as_output, as_reward, check_prompts
from .combine import Combine, check_members
from .failures import fill_invalid
from .groups.pairwise import take_context
from .shaping import Transform

ADVICE = "fix the reward or leave this sample's prompt out; nothing was updated with these scores"


@dataclass(frozen=True)
class Member:
    """One reward of several. Weight 0 reports a score without using it (but a gate may)."""

    label: str
    weight: float
    reward: Reward
    transform: tuple[Transform, ...] = ()  # of its scores, in order, before they are combined

    def shaped(self, scores: Tensor, output: RewardOutput, group_ids: Tensor | None) -> Tensor:
        """Its scores (N,), those of failed samples filled in, after its transforms."""
        doubt = output.uncertainty
        if doubt is not None and not output.is_valid.all():
            doubt = fill_invalid(doubt.cpu(), output.is_valid, group_ids)
        for transform in self.transform:
            scores = transform(scores, doubt, self.label)
        return scores


class CombinedReward:
    """Several rewards as one: by default sum_k weight_k * score_k; `score` reports each member's raw scores as well.

    Other ways to combine them are `Combine`'s. Some look at whole groups or all samples of an iteration: a trainer that
    scores in batches or on several processes then gathers `Scores.shaped` from all and calls `combine` once.

    Args:
        members: all labels different.
        combine: None: the weighted sum.
    """

    def __init__(self, members: Sequence[Member], combine: Combine | None = None) -> None:
        labels = [m.label for m in members]
        if not labels or len(set(labels)) < len(labels):
            raise ValueError(f"members: got labels {labels}, expected at least one, all different")
        self.combiner = Combine() if combine is None else combine
        check_members(self.combiner, labels, [m.weight for m in members])
        self.members = tuple(members)
        self.used = tuple(m for m in members if m.weight or m.label in self.combiner.gates)  # those `combine` takes
        terms = "+".join(f"{m.label}:{m.weight:g}" for m in members)
        self.name = terms if self.combiner.name == "weighted" else f"{self.combiner.name}({terms})"
        weighted = [m for m in members if m.weight]
        # What the least local of them needs.
        self.kind = max((self.combiner.kind, *(m.reward.kind for m in members)), key=KINDS.index)
        self.output_kind = self.combiner.output_kind  # "scores" or "advantages"
        self.differentiable = (
            bool(weighted) and all(m.reward.differentiable for m in weighted) and self.output_kind == "scores"
        )
        self.needs = tuple(dict.fromkeys(need for m in members for need in m.reward.needs))
        self.range: tuple[float, float] = self.combiner.bounds(
            [_shaped_range(m) for m in self.used], [m.weight for m in self.used]
        )

    def __call__(self, images: Tensor, prompts: Sequence[str], context: Context | None = None) -> Tensor:
        """(N,), float32 on the images' device; members of weight 0 that are no gates are not called."""
        ids, rows, scored = (context or {}).get("group_ids"), [], []
        for m in self.used:
            output = as_output(m.reward(images, prompts, context), m.label, prompts)
            scores = output.scores.to(images.device)
            if output.valid is not None and not output.valid.all():
                scores = fill_invalid(scores.cpu(), output.is_valid, ids).to(images.device)
            rows.append(m.shaped(scores, output, ids))
            scored.append(output.is_valid)
        if not rows:
            return torch.zeros(len(images), device=images.device)
        return self.combine(torch.stack(rows), ids, torch.stack(scored).to(images.device))

    def combine(self, scores: Tensor, group_ids: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
        """Scores of the members in `used`, (K, N), to (N,): rewards or, where `output_kind` says so, advantages.

        Args:
            scores: as `Scores.shaped` holds them: filled in and transformed; of as many samples as `kind` needs.
            group_ids: (N,) int64; None: all are one group.
            valid: (K, N) bool: what could be scored; the rest is in no statistic of a group. None: all.

        Raises:
            RewardError: scores that cannot be combined so, e.g. negative ones by their harmonic mean.
        """
        ids = torch.zeros(scores.shape[1:], dtype=torch.long) if group_ids is None else group_ids
        labels, weights = [m.label for m in self.used], [m.weight for m in self.used]
        if len(scores) != len(labels):
            raise ValueError(f"scores: got shape {tuple(scores.shape)}, expected ({len(labels)}, N) for {labels}")
        try:
            return self.combiner(scores, weights, labels, ids.to(scores.device), valid)
        except ValueError as error:
            raise RewardError(self.name, f"{error} (rewards in order: {labels})") from error


def _shaped_range(member: Member) -> tuple[float, float]:
    low, high = member.reward.range
    for transform in member.transform:
        low, high = transform.bounds((low, high))
    return low, high


@dataclass(frozen=True)
class Scores:
    """Scores of N samples, on the CPU, all finite: those of failed samples are filled in.

    The one record from the reward to the advantages: `score` makes it of a batch, float32; trainers `split` and join
    it, and gather it from all processes (`training.loop.batches.GatheredScores`).
    """

    total: Tensor  # (N,), the reward; of a combination that needs all samples, as if these were all
    parts: dict[str, Tensor]  # raw scores (N,) of each member by label; of a single reward, its own under its name
    shaped: Tensor  # (K, N): what `CombinedReward.combine` takes; of a single reward its scores, (1, N)
    valid: Tensor  # (N,) bool: no member that counts failed on the sample
    scored: dict[str, Tensor]  # (N,) bool of each member by label: it could score the sample
    problem: str | None = None  # why a sample failed, where one did and the reward says so
    outputs: dict[str, RewardOutput] = field(default_factory=dict)  # of each member in full (criteria, reasons, doubts)

    def split(self, sizes: Sequence[int]) -> "list[Scores]":
        """Cut into batches of these sizes, without `outputs`."""
        parts = [{k: v[rows] for k, v in self.parts.items()} for rows in _places(sizes)]
        scored = [{k: v[rows] for k, v in self.scored.items()} for rows in _places(sizes)]
        pieces = zip(self.total.split(sizes), parts, self.shaped.split(sizes, 1), self.valid.split(sizes), scored)
        return [Scores(*piece, self.problem) for piece in pieces]

    @property
    def failed(self) -> dict[str, int]:
        """How many samples each member could not score, where any."""
        counts = {label: int((~output.is_valid).sum()) for label, output in self.outputs.items()}
        return {label: count for label, count in counts.items() if count}


def _places(sizes: Sequence[int]) -> list[slice]:
    ends = list(itertools.accumulate(sizes))
    return [slice(end - size, end) for end, size in zip(ends, sizes)]


def score(
    reward: Callable,
    images: Tensor,
    prompts: Sequence[str],
    context: Context | None = None,
    on_fail: str = "group_mean",
) -> Scores:
    """Score images without gradient, checking what goes in and what comes out.

    Args:
        reward: a Reward, or a function of (images[, prompts[, context]]).
        images: (N, 3, H, W), or videos (N, F, 3, H, W), float in [0, 1], on any device.
        prompts: N strings.
        context: whatever else the reward needs, by name.
        on_fail: what stands for samples that a reward could not score; see `fill_invalid`.

    Raises:
        ValueError: unusable images or prompts, before any reward is called.
        RewardError: a reward raised, gave the wrong shape, NaN or infinity, or failed on all samples; names the reward,
            and where it can, sample and prompt.
    """
    (check_videos if is_video(images) else check_images)(images)
    combined = reward if isinstance(reward, CombinedReward) else None
    single = as_reward(reward)
    members = [Member(single.name, 1.0, single)] if combined is None else list(combined.members)
    for m in members:
        _check_media(m, images)
    check_prompts(images, prompts)
    check_pixels(images)
    prompts = list(prompts)
    outputs = {m.label: _checked_output(m.reward, m.label, images, prompts, context) for m in members}
    parts = {m.label: _filled(m, outputs[m.label], context, on_fail) for m in members}
    scored = {label: output.is_valid for label, output in outputs.items()}
    problem = next((found for m in members if (found := _problem(m.label, outputs[m.label]))), None)
    if combined is None:
        total = parts[single.name]
        return Scores(total, parts, total[None], scored[single.name], scored, problem, outputs)
    ids, everyone = (context or {}).get("group_ids"), torch.ones(len(images), dtype=torch.bool)
    shaped = torch.zeros(len(combined.used), len(images))
    for k, m in enumerate(combined.used):
        shaped[k] = m.shaped(parts[m.label], outputs[m.label], ids)
        _check_finite(shaped[k], everyone, m.label, prompts)
    total = torch.zeros(len(images))
    if combined.used:
        total = combined.combine(shaped, ids, torch.stack([scored[m.label] for m in combined.used]))
    _check_finite(total, everyone, combined.name, prompts)
    valid = everyone.clone()
    for m in combined.used:  # a member that is only reported may fail
        valid &= scored[m.label]
    return Scores(total, parts, shaped, valid, scored, problem, outputs)


def _problem(label: str, output: RewardOutput) -> str | None:
    """Why the first failed sample failed, if any did."""
    reasons = output.rationale or [None] * len(output.scores)
    failed = (reason for reason, valid in zip(reasons, output.is_valid.tolist()) if not valid)
    return next((f"{label}: {reason or 'gave no reason'}" for reason in failed), None)


def _filled(member: Member, output: RewardOutput, context: Context | None, on_fail: str) -> Tensor:
    ids = (context or {}).get("group_ids")
    try:
        return fill_invalid(output.scores, output.is_valid, ids, on_fail, member.reward.range)
    except ValueError as error:
        example = next((reason for reason in output.rationale or () if reason), None)
        raise RewardError(member.label, f"{error}{f' (e.g. {example[:200]})' if example else ''}; {ADVICE}") from error


def _checked_output(
    reward: Reward, label: str, images: Tensor, prompts: list[str], context: Context | None
) -> RewardOutput:
    missing = [need for need in reward.needs if need != "prompts" and need not in (context or {})]
    if missing:
        raise RewardError(label, f"got a context without {missing[0]!r}, expected {list(reward.needs)} with the images")
    _check_context(context, label, images)
    if reward.kind != "pointwise" and "group_ids" not in (context or {}):
        context = {**(context or {}), "group_ids": torch.zeros(len(prompts), dtype=torch.long)}
    try:
        with torch.no_grad():
            result = reward(images, prompts, context)
    except RewardError:
        raise
    except Exception as error:
        pointwise = reward.kind == "pointwise"
        sample = _failing_sample(reward, images, prompts, context) if pointwise else None
        summary = f"raised {type(error).__name__}: {str(error)[:300]}"
        if sample is None:
            why = "; no single sample is to blame: is the batch too large?" if pointwise else ""
            summary += f" (on the batch of {len(prompts)}{why})"
        prompt = prompts[0 if sample is None else sample]
        raise RewardError(label, f"{summary}; {ADVICE}", sample, prompt) from error
    output = _on_cpu(as_output(result, label, prompts))
    _check_finite(output.scores, output.is_valid, label, prompts)
    return output


def _check_media(member: Member, images: Tensor) -> None:
    media, got = getattr(member.reward, "media", "images"), "videos" if is_video(images) else "images"
    if media not in ("both", got):
        advice = " (or give over_frames(reward))" if media == "images" else ", (N, F, 3, H, W)"
        problem = f"scores {media}, got {got} of shape {tuple(images.shape)}, expected {media}{advice}"
        raise RewardError(member.label, problem)


def _check_context(context: Context | None, label: str, images: Tensor) -> None:
    for name, value in (context or {}).items():
        if name in ("references", "metadata", "group_ids") and hasattr(value, "__len__") and len(value) != len(images):
            raise RewardError(label, f"got {len(value)} {name} in the context, expected {len(images)}, one per image")
        if name == "references":
            try:
                _check_references(value, images)
            except ValueError as error:
                raise RewardError(label, str(error)) from error


def _check_references(references: Any, images: Tensor) -> None:
    check_references(references, len(images), is_video(images))
    owners = {id(picture): (n, picture) for n, pictures in enumerate(references) for picture in pictures}
    for n, picture in owners.values():  # a picture that many share is read once
        try:
            check_pixels(picture[None])
        except ValueError as error:
            raise ValueError(f"references for image {n}: {error}") from error


def _on_cpu(output: RewardOutput) -> RewardOutput:
    valid = None if output.valid is None else output.valid.cpu()
    scores = output.scores.detach().cpu()
    return replace(
        output,
        scores=scores if valid is None else torch.where(valid, scores, math.nan),
        criteria={key: value.detach().cpu() for key, value in output.criteria.items()},
        valid=valid,
        uncertainty=None if output.uncertainty is None else output.uncertainty.detach().cpu(),
    )


def _check_finite(scores: Tensor, valid: Tensor, label: str, prompts: list[str]) -> None:
    bad = valid & ~scores.isfinite()
    if bad.any():
        n = int(bad.nonzero()[0])
        problem = f"got {scores[n].item()} ({int(bad.sum())} of {len(scores)} scores not finite), expected a number"
        raise RewardError(label, f"{problem}; {ADVICE}", n, prompts[n])


def _failing_sample(reward: Reward, images: Tensor, prompts: list[str], context: Context | None) -> int | None:
    """The first sample that the reward, having failed on the batch, also fails on alone."""
    if len(prompts) == 1:
        return 0
    for n in range(len(prompts)):
        try:
            with torch.no_grad():
                reward(images[n : n + 1], prompts[n : n + 1], context and take_context(context, [n], len(prompts)))
        except Exception:  # of any type: which sample raises is all that is asked
            return n
    return None
