"""Calling rewards safely: the weighted sum of several, and `score`, which lets no unusable score through."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from visalign.images import check_images, check_pixels

from .base import Context, Reward, RewardError, as_reward, as_scores, check_prompts

ADVICE = "fix the reward or leave this sample's prompt out; nothing was updated with these scores"


@dataclass(frozen=True)
class Member:
    """One reward of a weighted sum. Weight 0 reports a score without using it."""

    label: str
    weight: float
    reward: Reward


class CombinedReward:
    """sum_k weight_k * score_k over its members' raw scores; `score` reports each member's scores as well."""

    kind = "pointwise"

    def __init__(self, members: Sequence[Member]) -> None:
        labels = [m.label for m in members]
        if not labels or len(set(labels)) < len(labels):
            raise ValueError(f"members: got labels {labels}, expected at least one, all different")
        self.members = tuple(members)
        self.name = "+".join(f"{m.label}:{m.weight:g}" for m in members)
        used = [m for m in members if m.weight]
        self.differentiable = bool(used) and all(m.reward.differentiable for m in used)
        self.needs = tuple(dict.fromkeys(need for m in members for need in m.reward.needs))
        ends = [sorted(m.weight * end for end in m.reward.range) for m in used]
        self.range: tuple[float, float] = (float(sum(e[0] for e in ends)), float(sum(e[1] for e in ends)))

    def __call__(self, images: Tensor, prompts: Sequence[str], context: Context | None = None) -> Tensor:
        """(N,), float32 on the images' device; members of weight 0 are not called."""
        total = torch.zeros(len(images), device=images.device)
        for m in self.members:
            if m.weight:
                scores = as_scores(m.reward(images, prompts, context), m.label, prompts)
                total = total + m.weight * scores.to(images.device)
        return total


@dataclass(frozen=True)
class ScoreResult:
    """Scores of N images, float32 on the CPU, all finite."""

    total: Tensor  # (N,), the reward
    parts: dict[str, Tensor]  # raw scores (N,) of each member by label; of a single reward, its own under its name


def score(reward: Callable, images: Tensor, prompts: Sequence[str], context: Context | None = None) -> ScoreResult:
    """Score images without gradient, checking what goes in and what comes out.

    Args:
        reward: a Reward, or a function of (images[, prompts[, context]]).
        images: (N, 3, H, W), float in [0, 1], on any device.
        prompts: N strings.
        context: whatever else the reward needs, by name.

    Raises:
        ValueError: unusable images or prompts, before any reward is called.
        RewardError: a reward raised, or gave the wrong shape, NaN or infinity; names the reward, sample and prompt.
    """
    check_images(images)
    check_prompts(images, prompts)
    check_pixels(images)
    prompts = list(prompts)
    if not isinstance(reward, CombinedReward):
        single = as_reward(reward)
        scores = _checked_scores(single, single.name, images, prompts, context)
        return ScoreResult(scores, {single.name: scores})
    parts = {m.label: _checked_scores(m.reward, m.label, images, prompts, context) for m in reward.members}
    total = torch.zeros(len(images))
    for m in reward.members:
        total = total + m.weight * parts[m.label]
    _check_finite(total, reward.name, prompts)
    return ScoreResult(total, parts)


def _checked_scores(reward: Reward, label: str, images: Tensor, prompts: list[str], context: Context | None) -> Tensor:
    missing = [need for need in reward.needs if need != "prompts" and need not in (context or {})]
    if missing:
        raise RewardError(label, f"got a context without {missing[0]!r}, expected {list(reward.needs)} with the images")
    try:
        with torch.no_grad():
            scores = reward(images, prompts, context)
    except RewardError:
        raise
    except Exception as error:
        sample = _failing_sample(reward, images, prompts) if context is None else None
        summary = f"raised {type(error).__name__}: {str(error)[:300]}"
        if sample is None:
            summary += f" (on the batch of {len(prompts)}; no single sample is to blame: is the batch too large?)"
        prompt = prompts[0 if sample is None else sample]
        raise RewardError(label, f"{summary}; {ADVICE}", sample, prompt) from error
    checked = as_scores(scores, label, prompts).detach().cpu()
    _check_finite(checked, label, prompts)
    return checked


def _check_finite(scores: Tensor, label: str, prompts: list[str]) -> None:
    bad = ~scores.isfinite()
    if bad.any():
        n = int(bad.nonzero()[0])
        problem = f"got {scores[n].item()} ({int(bad.sum())} of {len(scores)} scores not finite), expected a number"
        raise RewardError(label, f"{problem}; {ADVICE}", n, prompts[n])


def _failing_sample(reward: Reward, images: Tensor, prompts: list[str]) -> int | None:
    """The first sample that the reward, having failed on the batch, also fails on alone."""
    for n in range(len(prompts)):
        try:
            with torch.no_grad():
                reward(images[n : n + 1], prompts[n : n + 1], None)
        except Exception:
            return n
    return None
