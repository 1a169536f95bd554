import math

import numpy as np
import pytest
import torch
from tiny_clip import save_tiny_clip

from visalign.rewards import RewardError, RewardOutput, as_reward, make_reward, parse_spec, score
from visalign.rewards.video.frames import over_frames
from visalign.rewards.video.measures import consistency, motion_smoothness, segment_frames, segment_weights

VIDEOS = torch.rand(3, 6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a", "b", "c"]
FROZEN = VIDEOS[:, :1].expand(-1, 6, -1, -1, -1)


def colours(images: torch.Tensor) -> torch.Tensor:
    return images.mean(dim=(2, 3)) - 0.5


REWARDS = {
    "video_consistency": {"encoder": colours},
    "temporal_flicker": {},
    "motion_smoothness": {},
    "dynamic_degree": {"enough": 0.5},
    "over_frames": {"reward": lambda images: images[:, 0].mean(dim=(1, 2)), "how": "min"},
    "segmental": {"reward": lambda images: images[:, 0].mean(dim=(1, 2)), "segments": 3},
}


@pytest.mark.parametrize("name", REWARDS)
def test_a_batch_scores_as_its_clips_do_one_by_one_within_the_range(name):
    reward = make_reward(name, **REWARDS[name])
    batch = score(reward, VIDEOS, PROMPTS).total
    singles = torch.cat([score(reward, VIDEOS[n : n + 1], PROMPTS[n : n + 1]).total for n in range(3)])
    torch.testing.assert_close(batch, singles)
    assert (batch >= reward.range[0]).all() and (batch <= reward.range[1]).all() and len(set(batch.tolist())) == 3


@pytest.mark.parametrize("name", [n for n in REWARDS if n not in ("over_frames", "segmental")])
def test_gradients_reach_the_pixels(name):
    leaf = VIDEOS.clone().requires_grad_()
    reward = make_reward(name, **REWARDS[name])
    (gradient,) = torch.autograd.grad(reward(leaf, PROMPTS).sum(), leaf)
    assert reward.differentiable and (gradient.abs().amax(dim=(1, 2, 3, 4)) > 0).all()


def test_a_frozen_clip_exploits_all_but_the_dynamic_degree():
    for name in ("video_consistency", "temporal_flicker", "motion_smoothness"):
        torch.testing.assert_close(score(make_reward(name, **REWARDS[name]), FROZEN, PROMPTS).total, torch.ones(3))
    assert score(make_reward("dynamic_degree"), FROZEN, PROMPTS).total.tolist() == [0, 0, 0]
    assert score(make_reward("dynamic_degree"), VIDEOS, PROMPTS).total.tolist() == [1, 1, 1]
    slow = FROZEN[:1] * 0.5 + torch.arange(6).view(1, 6, 1, 1, 1) * 0.005
    got = score(make_reward("dynamic_degree", enough=0.02), slow, ["a"]).total
    torch.testing.assert_close(got, torch.tensor([0.25]))


def test_a_clip_too_short_to_judge_is_invalid():
    for name, frames in (
        ("video_consistency", 1),
        ("temporal_flicker", 1),
        ("dynamic_degree", 1),
        ("motion_smoothness", 2),
    ):
        reward = make_reward(name, **REWARDS[name])
        output = reward(VIDEOS[:, :frames], PROMPTS)
        assert not output.is_valid.any()
        with pytest.raises(RewardError, match=f"{name}.*none of 3 samples.*got {frames} frames, expected at least"):
            score(reward, VIDEOS[:, :frames], PROMPTS)


def test_pictures_are_refused():
    with pytest.raises(RewardError, match="reward 'temporal_flicker': scores videos, got images"):
        score(make_reward("temporal_flicker"), VIDEOS[:, 0], PROMPTS)


# The formulas


def test_consistency_in_numpy():
    features = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(1))
    f = features.numpy() / np.linalg.norm(features.numpy(), axis=-1, keepdims=True)
    expected = []
    for clip in f:
        shares = [(max(0, clip[i - 1] @ clip[i]) + max(0, clip[0] @ clip[i])) / 2 for i in range(1, 5)]
        expected.append(np.mean(shares))
    np.testing.assert_allclose(consistency(features).numpy(), expected, rtol=1e-5)


def test_consistency_reads_each_frame_of_its_own_clip():
    reward = make_reward("video_consistency", encoder=colours)
    expected = consistency(torch.stack([colours(clip) for clip in VIDEOS]))
    torch.testing.assert_close(score(reward, VIDEOS, PROMPTS).total, expected)


def test_flicker_is_the_mean_byte_difference_of_neighbours_and_the_same_backwards():
    pixels = (VIDEOS * 255).round()
    expected = [1 - np.mean([np.abs(a - b).mean() for a, b in zip(v, v[1:])]) / 255 for v in pixels.numpy()]
    reward = make_reward("temporal_flicker")
    got = score(reward, pixels / 255, PROMPTS).total
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5)
    torch.testing.assert_close(score(reward, (pixels / 255).flip(1), PROMPTS).total, got)
    assert (got - score(reward, VIDEOS, PROMPTS).total).abs().max() < 1 / 255


def test_motion_smoothness_compares_odd_frames_with_what_their_neighbours_foretell():
    for frames, odd in ((6, (1, 3)), (5, (1, 3)), (3, (1,))):
        v = VIDEOS[:, :frames].numpy()
        gaps = [np.abs(v[:, k] - (v[:, k - 1] + v[:, k + 1]) / 2).mean(axis=(1, 2, 3)) for k in odd]
        np.testing.assert_allclose(motion_smoothness(VIDEOS[:, :frames]).numpy(), 1 - np.mean(gaps, 0), rtol=1e-5)
    fade = torch.linspace(0, 1, 7).view(1, 7, 1, 1, 1).expand(1, 7, 3, 4, 4)
    torch.testing.assert_close(motion_smoothness(fade), torch.ones(1))
    torch.testing.assert_close(
        motion_smoothness(VIDEOS, lambda before, after: before),
        1 - torch.stack([(VIDEOS[:, k] - VIDEOS[:, k - 1]).abs().mean(dim=(1, 2, 3)) for k in (1, 3)]).mean(0),
    )


def test_an_interpolator_can_be_a_users_file(tmp_path):
    (tmp_path / "mine.py").write_text("def last(before, after):\n    return after\n")
    reward = make_reward("motion_smoothness", interpolator=f"{tmp_path}/mine.py:last")
    torch.testing.assert_close(
        score(reward, VIDEOS, PROMPTS).total, motion_smoothness(VIDEOS, lambda before, after: after)
    )


# Rewards of pictures


@pytest.mark.parametrize(
    "how, frames, chosen",
    [
        ("mean", None, range(6)),
        ("min", None, range(6)),
        ("first", None, [0]),
        ("uniform", 3, [0, 2, 5]),
        ("uniform", 9, range(6)),
    ],
)
def test_over_frames_pools_the_frames_it_says(how, frames, chosen):
    chosen = list(chosen)
    brightness = as_reward(lambda images: images.mean(dim=(1, 2, 3)), "bright")
    output = score(over_frames(brightness, how, frames), VIDEOS, PROMPTS).outputs[f"over_frames_{how}(bright)"]
    each = VIDEOS.mean(dim=(2, 3, 4))[:, chosen]
    torch.testing.assert_close(output.scores, each.amin(dim=1) if how == "min" else each.mean(dim=1))
    assert output.extra["frames"].tolist() == chosen


def test_over_frames_repeats_prompts_and_context_for_each_frame_of_a_clip():
    seen = {}

    def spy(images, prompts, context):
        seen.update(prompts=prompts, **context)
        return torch.zeros(len(images))

    context = {"group_ids": torch.tensor([7, 8, 9]), "metadata": [{"n": k} for k in range(3)], "fps": 8}
    score(over_frames(spy, "uniform", 2), VIDEOS, PROMPTS, context)
    assert seen["prompts"] == ["a", "a", "b", "b", "c", "c"] and seen["fps"] == 8
    assert seen["group_ids"].tolist() == [7, 7, 8, 8, 9, 9] and [m["n"] for m in seen["metadata"]] == [0, 0, 1, 1, 2, 2]


def test_a_clip_with_a_failed_frame_is_invalid():
    def fails(images):
        return RewardOutput(images.mean(dim=(1, 2, 3)), valid=torch.arange(len(images)) != 7)

    result = score(over_frames(fails), VIDEOS, PROMPTS)
    assert result.outputs["over_frames_mean(fails)"].is_valid.tolist() == [True, False, True]


def test_over_frames_of_clip_has_its_gradient_and_range(tmp_path):
    folder = save_tiny_clip(tmp_path / "clip")
    reward = make_reward("over_frames", reward={"name": "clip", "model": str(folder)})
    assert reward.differentiable and reward.range == (-1.0, 1.0) and reward.needs == ("prompts",)
    leaf = VIDEOS.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(reward(leaf, PROMPTS).scores.sum(), leaf)
    assert (gradient.abs().amax(dim=(2, 3, 4)) > 0).all()


def test_segments_are_equal_spans_with_one_frame_each():
    assert segment_frames(16, 4).tolist() == [2, 6, 10, 14] and segment_frames(5, 2).tolist() == [1, 3]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([segment_frames(16, 4, generator) for _ in range(200)])
    for s in range(4):
        assert set(drawn[:, s].tolist()) == set(range(4 * s, 4 * s + 4))
    with pytest.raises(ValueError, match="segments: got 7, expected 1 to 6"):
        segment_frames(6, 7)


def test_segment_weights_in_numpy_as_published_and_normalised():
    chosen = torch.tensor([2, 6, 10, 14])
    expected = np.exp(-0.5 * np.abs(chosen.numpy() - 8)) / 4
    np.testing.assert_allclose(segment_weights(chosen, 16, 0.5).numpy(), expected, rtol=1e-6)
    torch.testing.assert_close(segment_weights(chosen, 16, 0.5, True).sum(), torch.tensor(1.0))
    assert segment_weights(torch.tensor([8]), 16).tolist() == [1.0]


def test_segmental_weighs_the_frames_of_its_segments_and_draws_by_the_seed():
    bright = as_reward(lambda images: images.mean(dim=(1, 2, 3)), "bright")
    each = VIDEOS.mean(dim=(2, 3, 4))
    for normalise in (False, True):
        reward = make_reward("segmental", reward=bright, segments=3, normalise=normalise)
        weights = np.exp(-np.abs(np.array([1, 3, 5]) - 3.0))
        weights = weights / (weights.sum() if normalise else 3)
        expected = each[:, [1, 3, 5]].numpy() @ weights
        np.testing.assert_allclose(score(reward, VIDEOS, PROMPTS).total.numpy(), expected, rtol=1e-5)
    frames = {s: tuple(reward(VIDEOS, PROMPTS, {"segment_seed": s}).extra["frames"].tolist()) for s in range(20)}
    assert len(set(frames.values())) > 3
    assert frames[3] == tuple(reward(VIDEOS, PROMPTS, {"segment_seed": 3}).extra["frames"].tolist())
    low, high = make_reward("segmental", reward="jpeg_compressibility").range
    assert low == -math.inf and high == 0


@pytest.mark.parametrize(
    "name, options, says",
    [
        ("over_frames", {"reward": "clip", "how": "max"}, "how: got 'max', expected one of"),
        ("over_frames", {"reward": "clip", "how": "uniform"}, "frames: got None for how='uniform'"),
        ("over_frames", {"reward": "clip", "frames": 3}, "frames: got 3 for how='mean'"),
        ("over_frames", {"reward": "clop"}, "did you mean 'clip'"),
        ("over_frames", {}, "missing a required argument: 'reward'"),
        ("segmental", {"reward": "clip", "segments": 0}, "segments: got 0"),
        ("segmental", {"reward": "clip", "decay": -1}, "decay: got -1"),
        ("dynamic_degree", {"enough": 0}, "enough: got 0"),
        ("video_consistency", {"dino": "x", "encoder": "y"}, "encoder: got 'y' beside dino"),
        ("video_consistency", {"model": "ViT-B-32"}, "pretrained: got None"),
    ],
)
def test_bad_options_are_one_clear_line_before_anything_loads(name, options, says):
    with pytest.raises(ValueError, match=says):
        parse_spec(name, **options)


def test_only_pointwise_rewards_of_pictures_go_over_frames():
    with pytest.raises(ValueError, match="reward: got 'temporal_flicker', which is pointwise of videos"):
        over_frames("temporal_flicker")
