"""A reward of pictures as one of videos: over all frames, some, the worst, or InstructVideo's segments."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from visalign.images import check_videos
from visalign.names import unknown_name
from visalign.rewards.base import Context, Reward, RewardOutput, as_output, as_reward, check_prompts, register_reward

from .measures import segment_frames, segment_weights

HOW = ("mean", "first", "uniform", "min")


class _Frames:
    """Scores chosen frames of each clip by a pointwise reward of pictures."""

    media = "videos"
    kind = "pointwise"

    def _wrap(self, reward: Any, name: str) -> None:
        from visalign.rewards.spec import make_reward

        callable_ = callable(reward)
        self.reward: Reward = as_reward(reward) if callable_ else make_reward(reward)
        if self.reward.kind != "pointwise" or getattr(self.reward, "media", "images") == "videos":
            got = f"{self.reward.name!r}, which is {self.reward.kind} of {getattr(self.reward, 'media', 'images')}"
            raise ValueError(f"reward: got {got}, expected a pointwise reward of images")
        self.name = f"{name}({self.reward.name})"
        self.differentiable, self.range, self.needs = self.reward.differentiable, self.reward.range, self.reward.needs

    def _score(
        self, videos: Tensor, prompts: Sequence[str], context: Context | None, chosen: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Scores (N, K) of the frames `chosen` (K,), and which clips have all of them valid, (N,) bool."""
        check_prompts(videos, prompts)
        times, frames = len(chosen), videos[:, chosen.to(videos.device)]
        repeated = {  # what belongs to a clip belongs to each of its frames
            key: value.repeat_interleave(times)
            if isinstance(value, Tensor)
            else [item for item in value for _ in range(times)]
            for key, value in (context or {}).items()
            if key in ("references", "metadata", "group_ids")
        }
        given = None if context is None else {**context, **repeated}
        texts = [prompt for prompt in prompts for _ in range(times)]
        output = as_output(self.reward(frames.flatten(0, 1), texts, given), self.name, texts)
        return output.scores.view(-1, times), output.is_valid.view(-1, times).all(dim=1)


def _preflight_reward(options: Mapping[str, Any]) -> None:
    from visalign.rewards.spec import parse_spec

    if "reward" in options and not callable(options["reward"]):
        parse_spec(options["reward"])


@register_reward("over_frames")
class OverFrames(_Frames):
    """A pointwise reward of pictures, over the frames of a clip; range, needs and gradient are that reward's.

    Args:
        reward: a spec (e.g. "clip") or a reward.
        how: "mean" or "min" over all frames, "first" only, or "uniform", the mean over `frames` evenly spread ones.
        frames: for "uniform"; no more than a clip has are taken.
    """

    def __init__(self, reward: Any, how: str = "mean", frames: int | None = None) -> None:
        self.preflight({"how": how, "frames": frames})
        self.how, self.frames = how, frames
        self._wrap(reward, f"over_frames_{how}")

    @staticmethod
    def preflight(options: Mapping[str, Any]) -> None:
        """Raise ValueError for options that cannot work, without loading anything."""
        how, frames = options.get("how", "mean"), options.get("frames")
        if how not in HOW:
            raise unknown_name("how", how, HOW)
        if (how == "uniform") != (frames is not None) or frames is not None and not frames >= 1:
            raise ValueError(f"frames: got {frames} for how={how!r}, expected a number >= 1 for 'uniform', else None")
        _preflight_reward(options)

    def __call__(self, images: Tensor, prompts: Sequence[str], context: Context | None = None) -> RewardOutput:
        """images: videos (N, F, 3, H, W) in [0, 1]. Returns (N,); the frames taken are in `extra["frames"]`."""
        check_videos(images)
        count = images.shape[1]
        if self.how == "uniform":
            assert self.frames is not None
            chosen = torch.linspace(0, count - 1, min(self.frames, count)).round().long()
        else:
            chosen = torch.arange(1 if self.how == "first" else count)
        scores, valid = self._score(images, prompts, context, chosen)
        pooled = scores.amin(dim=1) if self.how == "min" else scores.mean(dim=1)
        return RewardOutput(pooled, valid=valid, extra={"frames": chosen, "how": self.how})


@register_reward("segmental")
class Segmental(_Frames):
    """InstructVideo's reward (arXiv:2312.12490): one frame of each segment, those near the middle counting most.

    Gradient and needs are those of the wrapped reward. Frames are the middle ones of their segments, or drawn by the
    integer `context["segment_seed"]`, which a trainer should change each step; all clips of a call share them.

    Args:
        reward: a spec (published: HPSv2) or a reward of pictures; "segmental" does no cropping of its own.
        segments: 4 in the published configuration.
        decay: of the weight away from the middle frame, a frame.
        normalise: weights sum to 1; published False, see `segment_weights`.
    """

    source = "arXiv:2312.12490"

    def __init__(self, reward: Any, segments: int = 4, decay: float = 1.0, normalise: bool = False) -> None:
        self.preflight({"segments": segments, "decay": decay})
        self.segments, self.decay, self.normalise = segments, decay, normalise
        self._wrap(reward, "segmental")
        low, high = self.reward.range
        self.range = (low, high) if normalise else (min(low, 0.0), max(high, 0.0))  # weights are at most 1 / segments

    @staticmethod
    def preflight(options: Mapping[str, Any]) -> None:
        """Raise ValueError for options that cannot work, without loading anything."""
        if not options.get("segments", 4) >= 1:
            raise ValueError(f"segments: got {options['segments']}, expected >= 1")
        if not options.get("decay", 1.0) >= 0:
            raise ValueError(f"decay: got {options['decay']}, expected >= 0")
        _preflight_reward(options)

    def __call__(self, images: Tensor, prompts: Sequence[str], context: Context | None = None) -> RewardOutput:
        """images: videos (N, F, 3, H, W) in [0, 1], F >= segments. Returns (N,)."""
        check_videos(images)
        seed = (context or {}).get("segment_seed")
        generator = None if seed is None else torch.Generator().manual_seed(int(seed))
        chosen = segment_frames(images.shape[1], self.segments, generator)
        scores, valid = self._score(images, prompts, context, chosen)
        weights = segment_weights(chosen, images.shape[1], self.decay, self.normalise).to(scores)
        return RewardOutput((scores * weights).sum(dim=1), valid=valid, extra={"frames": chosen})


def over_frames(reward: Any, how: str = "mean", frames: int | None = None) -> Reward:
    """`reward`, of pictures, as a reward of videos; see `OverFrames`."""
    return OverFrames(reward, how, frames)
