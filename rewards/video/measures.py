"""Rewards of videos (N, F, 3, H, W): consistency, flicker, motion, and rewards of pictures applied to frames.

A frozen clip has full marks for consistency, flicker and smoothness, so each wants `dynamic_degree` beside it, e.g. as
a gate. Clips too short to judge (one frame; two for motion smoothness) are invalid, not zero.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visalign.images import check_videos
from visalign.locations import load_callable
from visalign.rewards.base import Context, RewardOutput, register_reward
from visalign.rewards.embedding.encoder import SHIPPED, ClipEncoder, check_clip_options

VBENCH = "arXiv:2311.17982"


def consistency(features: Tensor) -> Tensor:
    """Likeness of frames to the one before and to the first, (N,) in [0, 1], of features (N, F, D), F >= 2 (VBench).

    The mean over frames i >= 1 of (max(0, cos(f_{i-1}, f_i)) + max(0, cos(f_0, f_i))) / 2.
    """
    features = F.normalize(features.float(), dim=-1)
    before = (features[:, :-1] * features[:, 1:]).sum(dim=-1)
    start = (features[:, :1] * features[:, 1:]).sum(dim=-1)
    return ((before.clamp(min=0) + start.clamp(min=0)) / 2).mean(dim=1)


def mean_change(videos: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring frames, (N,) in [0, 1]; F >= 2."""
    return videos.float().diff(dim=1).abs().flatten(1).mean(dim=1)


def halfway(before: Tensor, after: Tensor) -> Tensor:
    """The plainest interpolation: the mean of two frames, which ghosts where VBench's network (AMT-S) moves."""
    return (before + after) / 2


def motion_smoothness(videos: Tensor, interpolate: Callable[[Tensor, Tensor], Tensor] = halfway) -> Tensor:
    """1 - mean |odd frame - its interpolation from its neighbours|, (N,) in [0, 1]; F >= 3 (VBench).

    Args:
        interpolate: frames before and after, (M, 3, H, W) each, to those between.
    """
    videos = videos[:, : (videos.shape[1] - 1) // 2 * 2 + 1].float()  # a last odd frame has no neighbour after it
    before, real, after = videos[:, :-2:2], videos[:, 1::2], videos[:, 2::2]
    guess = interpolate(before.flatten(0, 1), after.flatten(0, 1)).view_as(real)
    return 1 - (real - guess).abs().flatten(1).mean(dim=1)


def segment_frames(frames: int, segments: int, generator: torch.Generator | None = None) -> Tensor:
    """One frame of each of `segments` equal spans, int64 (segments,): a random one, or without generator the middle."""
    if not 1 <= segments <= frames:
        raise ValueError(f"segments: got {segments}, expected 1 to {frames}, the number of frames")
    span = frames // segments
    within = torch.full((segments,), span // 2)
    if generator is not None:
        within = torch.randint(span, (segments,), generator=generator)
    return torch.arange(segments) * span + within


def segment_weights(chosen: Tensor, frames: int, decay: float = 1.0, normalise: bool = False) -> Tensor:
    """exp(-decay |i - frames // 2|) / S of the chosen frames i, (S,): InstructVideo's weights of a sum.

    As published they do not sum to 1, so that frames away from the middle count for next to nothing and the reward's
    scale hangs on which were drawn; `normalise` makes them sum to 1.
    """
    weights = (-decay * (chosen - frames // 2).abs().float()).exp()
    return weights / (weights.sum() if normalise else len(chosen))


class _VideoReward:
    """Attributes of a reward of videos that looks at no prompt."""

    differentiable = True
    kind = "pointwise"
    media = "videos"
    needs: tuple[str, ...] = ()
    range: tuple[float, float] = (0.0, 1.0)


def _too_short(videos: Tensor, least: int) -> RewardOutput | None:
    n, frames = videos.shape[:2]
    if frames >= least:
        return None
    why = f"got {frames} frames, expected at least {least}"
    return RewardOutput(torch.full((n,), math.nan), rationale=[why] * n, valid=torch.zeros(n, dtype=torch.bool))


@register_reward("video_consistency")
class VideoConsistency(_VideoReward):
    """How much a clip's frames stay alike, by an encoder's features; 1 for a frozen clip (VBench).

    VBench's background consistency is this with CLIP ViT-B/32, its subject consistency with DINO ViT-B/16 (`dino`).

    Args:
        dino: folder or hub id of a DINO checkpoint in transformers' layout; excludes `encoder`.
        encoder: images (N, 3, H, W) to features (N, D), a callable or where one is found; None: open_clip's.
        model, pretrained, device, dtype, download: of the latter, as for `clip`.
    """

    name = "video_consistency"
    checkpoints = ("openai/clip-vit-base-patch32", "facebook/dino-vitb16")
    source = VBENCH

    def __init__(
        self,
        dino: str | None = None,
        encoder: str | Callable[[Tensor], Tensor] | None = None,
        model: str = str(SHIPPED),
        pretrained: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        download: bool = False,
    ) -> None:
        clip: dict[str, Any] = {
            "model": model,
            "pretrained": pretrained,
            "device": device,
            "dtype": dtype,
            "download": download,
        }
        self.preflight({"dino": dino, "encoder": encoder, **clip})
        self._embed: Callable[[Tensor], Tensor]
        if dino is not None:
            from visalign.rewards.embedding.similarity import DinoEncoder

            self._embed = DinoEncoder(dino, device, dtype, download).embed_images
        elif encoder is not None:
            self._embed = load_callable("encoder", encoder)
        else:
            self._embed = ClipEncoder(**clip).embed_images

    @staticmethod
    def preflight(options: Mapping[str, Any]) -> None:
        """Raise ValueError for options that cannot work, without loading anything."""
        dino, encoder = options.get("dino"), options.get("encoder")
        if dino is not None and encoder is not None:
            raise ValueError(f"encoder: got {encoder!r} beside dino, expected one of them")
        if dino is None and encoder is None:
            model = options.get("model", str(SHIPPED))
            check_clip_options(model, options.get("pretrained"), options.get("dtype", "float32"))

    def __call__(self, images: Tensor, prompts: Sequence[str], context: Context | None = None) -> Tensor | RewardOutput:
        """images: videos (N, F, 3, H, W) in [0, 1]. Returns (N,), float32."""
        check_videos(images)
        if (failed := _too_short(images, 2)) is not None:
            return failed
        return consistency(self._embed(images.flatten(0, 1)).unflatten(0, images.shape[:2]))


@register_reward("temporal_flicker")
class TemporalFlicker(_VideoReward):
    """1 - mean absolute difference of neighbouring frames; 1 for a frozen clip. Meant for static scenes (VBench).

    Reads floats where VBench rounds to bytes first, so it may differ by 1/255.
    """

    name = "temporal_flicker"
    source = VBENCH

    def __call__(self, images: Tensor, prompts: Sequence[str], context: Context | None = None) -> Tensor | RewardOutput:
        """images: videos (N, F, 3, H, W) in [0, 1]. Returns (N,), float32."""
        check_videos(images)
        return _too_short(images, 2) or 1 - mean_change(images)


@register_reward("motion_smoothness")
class MotionSmoothness(_VideoReward):
    """How well odd frames are foretold from their neighbours; 1 for a frozen clip (VBench).

    Args:
        interpolator: two frames (M, 3, H, W) to the one between, a callable or where one is found. None: their mean,
            which needs no weights but is not VBench's network (AMT-S), and so scores fast motion lower.
    """

    name = "motion_smoothness"
    source = VBENCH

    def __init__(self, interpolator: str | Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        self._interpolate: Callable[[Tensor, Tensor], Tensor] = halfway
        if interpolator is not None:
            self._interpolate = load_callable("interpolator", interpolator)

    def __call__(self, images: Tensor, prompts: Sequence[str], context: Context | None = None) -> Tensor | RewardOutput:
        """images: videos (N, F, 3, H, W) in [0, 1]. Returns (N,), float32."""
        check_videos(images)
        return _too_short(images, 3) or motion_smoothness(images, self._interpolate)


@register_reward("dynamic_degree")
class DynamicDegree(_VideoReward):
    """min(1, mean absolute difference of neighbouring frames / enough): 0 for a frozen clip (own design).

    VBench's measures optical flow; this one needs no network and cannot tell motion from flicker.

    Args:
        enough: the change at which more is not rewarded; 0.02 is about five grey levels.
    """

    name = "dynamic_degree"

    def __init__(self, enough: float = 0.02) -> None:
        self.preflight({"enough": enough})
        self.enough = enough

    @staticmethod
    def preflight(options: Mapping[str, Any]) -> None:
        """Raise ValueError for options that cannot work."""
        if not options.get("enough", 0.02) > 0:
            raise ValueError(f"enough: got {options['enough']}, expected > 0")

    def __call__(self, images: Tensor, prompts: Sequence[str], context: Context | None = None) -> Tensor | RewardOutput:
        """images: videos (N, F, 3, H, W) in [0, 1]. Returns (N,), float32."""
        check_videos(images)
        return _too_short(images, 2) or (mean_change(images) / self.enough).clamp(max=1)
