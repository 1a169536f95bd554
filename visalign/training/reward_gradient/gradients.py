"""A reward to be differentiated: refused early if it cannot be, called with its regularisers, its gradient checked."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visalign.objectives.reward_gradient import (
    Objective,
    augment,
    normalised_mix,
    relative_reward,
    reward_loss,
    worst_case,
)
from visalign.rewards import CombinedReward, Reward, RewardError, make_reward, parse_spec
from visalign.rewards.base import as_output, reward_factory
from visalign.sampling.seeds import derived_seed
from visalign.trainers import TRAINERS

OTHERS = tuple(sorted(name for name, entry in TRAINERS.items() if not entry.gradient))


def check_differentiable(spec: Any, others: Sequence[str]) -> None:
    """Refuse a reward without gradient before a model loads: by what its class says, or a user's function by itself.

    A reward of videos is asked for the one that it wraps. Judges whose model decides are left to `check_built`.

    Args:
        others: trainers that can use such a reward.

    Raises:
        ValueError: names the reward and the trainers.
    """
    for term in parse_spec(spec):
        if isinstance(wrapped := term.options.get("reward"), (str, list, dict)):
            check_differentiable(wrapped, others)
        known = ":" not in term.name
        differentiable = getattr(reward_factory(term.name), "differentiable", None) if known else None
        if not known:
            differentiable = make_reward({"name": term.name, **term.options}).differentiable
        if differentiable is False and term.weight:
            declare = "" if known else "; if its scores have a gradient, set NAME.differentiable = True on it"
            raise ValueError(_refusal(term.name, others) + declare)


def check_built(reward: Reward, others: Sequence[str]) -> None:
    """As `check_differentiable`, of a reward that was built; also refuses one that compares samples."""
    if not reward.differentiable:
        raise ValueError(_refusal(reward.name, others))
    if reward.kind != "pointwise":
        raise ValueError(
            f"reward: got {reward.name!r}, which is {reward.kind}, expected a pointwise one: a gradient must not "
            "depend on the batch"
        )


def _refusal(name: str, others: Sequence[str]) -> str:
    return f"reward: got {name!r}, which has no gradient, expected a differentiable one; it can be used by " + (
        ", ".join(others) or "no other trainer"
    )


@dataclass(frozen=True)
class RewardGradient:
    """Of N images: the loss (N,), whose gradient reaches them, and the rewards (N,), without."""

    loss: Tensor
    rewards: Tensor


@dataclass(frozen=True)
class GradedReward:
    """A differentiable reward with what guards it; see `visalign.objectives.reward_gradient` for each.

    Attributes:
        mix: "plain" differentiates the reward; "normalised" each member's gradient by its norm (objective "reward").
        radius: of the shift against the reward before it is asked; 0: none.
        copies: augmented copies over which it is averaged; 0: the image itself.
        positive, negative: words put before the prompt; the reward is then the difference of the two. None: plain.
    """

    reward: Reward
    objective: Objective = "reward"
    threshold: float | None = None
    mix: str = "plain"
    radius: float = 0.0
    copies: int = 0
    crop: float = 0.9
    noise: float = 0.02
    flip: bool = False
    positive: str | None = None
    negative: str | None = None

    def __call__(
        self,
        images: Tensor,
        prompts: Sequence[str],
        seeds: Sequence[int],
        context: dict[str, Any] | None = None,
        excess: float = 0.0,
        swap: bool = False,
    ) -> RewardGradient:
        """Loss and rewards of images (N, 3, H, W), or videos.

        Args:
            seeds: N, of the augmentation.
            excess, swap: of the relative reward: (1 + excess) on the first prompt, the unwanted one first with `swap`.

        Raises:
            ValueError: the result has no grad_fn where the images require grad.
            RewardError: the reward failed; names it.
        """
        shifted = images
        if self.radius:
            with torch.enable_grad():
                leaf = images.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(self._scores(self.reward, leaf, prompts, context).sum(), leaf)
            shifted = worst_case(images, gradient, self.radius)
        versions = [shifted]
        if self.copies:
            own = [[derived_seed(seed, 17, c) for seed in seeds] for c in range(self.copies)]
            versions = [augment(shifted, s, self.crop, self.noise, self.flip) for s in own]
        if self.mix == "normalised":
            return self._normalised(images, versions, prompts, context)
        rewards = torch.stack([self._relative(v, prompts, context, excess, swap) for v in versions]).mean(0)
        return RewardGradient(reward_loss(rewards, self.objective, self.threshold), rewards.detach())

    def _relative(
        self, images: Tensor, prompts: Sequence[str], context: dict[str, Any] | None, excess: float, swap: bool
    ) -> Tensor:
        if self.positive is None:
            return self._scores(self.reward, images, prompts, context)
        first, second = (self.negative, self.positive) if swap else (self.positive, self.negative)
        scores = [self._scores(self.reward, images, [f"{w}. {p}" for p in prompts], context) for w in (first, second)]
        return relative_reward(scores[0], scores[1], excess)

    def _normalised(
        self, images: Tensor, versions: list[Tensor], prompts: Sequence[str], context: dict[str, Any] | None
    ) -> RewardGradient:
        """The loss' gradient is minus the mix; its value has no meaning."""
        members = self.reward.members if isinstance(self.reward, CombinedReward) else ()
        pairs = [(m.reward, m.weight) for m in members if m.weight] or [(self.reward, 1.0)]
        gradients, total = [], torch.zeros(len(images), device=images.device)
        for reward, weight in pairs:
            scores = torch.stack([self._scores(reward, v, prompts, context) for v in versions]).mean(0)
            if images.requires_grad:
                gradients.append(torch.autograd.grad(scores.sum(), images, retain_graph=True)[0])
            total = total + weight * scores.detach().to(total)
        if not gradients:
            return RewardGradient(-total, total)
        mixed = normalised_mix(gradients, [weight for _, weight in pairs])
        return RewardGradient(-(images * mixed).flatten(1).sum(1), total)

    def _scores(self, reward: Reward, images: Tensor, prompts: Sequence[str], context: dict[str, Any] | None) -> Tensor:
        name = reward.name
        try:
            output = as_output(reward(images, list(prompts), context), name, list(prompts))
        except RewardError:
            raise
        except Exception as error:
            raise RewardError(name, f"raised {type(error).__name__}: {error}", prompt=prompts[0]) from error
        if images.requires_grad and not output.scores.requires_grad:
            raise ValueError(f"rewards: got a result of {name!r} without grad_fn, expected a differentiable reward")
        scores = output.scores.to(images.device)
        return scores if output.valid is None else torch.where(output.is_valid.to(scores.device), scores, 0.0)
