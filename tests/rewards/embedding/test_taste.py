"""The world's taste: known answers of the formula, and how well the shipped head tells it from pictures."""

import numpy as np
import pytest
import torch
from scipy import stats

from visalign.rewards import make_reward, parse_spec, score
from visalign.worlds.shapes.building.taste import tasted_scenes, train_taste
from visalign.worlds.shapes.drawing import draw
from visalign.worlds.shapes.scenes import Placed, Scene, place, sample_spec
from visalign.worlds.shapes.taste import balance, contrast, lightness, room, taste

WHITE = (1.0, 1.0, 1.0)


def scene(*objects, ground=WHITE, gradient=(0.0, 0.0)):
    return Scene(tuple(Placed(*o) for o in objects), ground, gradient)


@pytest.fixture(scope="module")
def reward():
    return make_reward("shapes_taste")


# The formula ------------------------------------------------------------------------------------------------------


def test_lightness_of_known_colours():
    """Black 0, white 100, sRGB's middle grey 53.39, pure red and blue as in the tables of CIELAB under D65."""
    known = {(0, 0, 0): 0, (1, 1, 1): 100, (0.5, 0.5, 0.5): 53.39, (1, 0, 0): 53.24, (0, 0, 1): 32.30, (0.02,) * 3: 1.4}
    for colour, value in known.items():
        assert lightness(np.array(colour, dtype=float)) == pytest.approx(value, abs=0.02)


def test_contrast_is_of_lightness_and_stops_at_enough():
    circle = ("circle", 32, 32, 10)
    assert contrast(scene(("blue", *circle))) == 1  # L* 37 on 100
    yellow = contrast(scene(("yellow", *circle)))
    assert yellow == pytest.approx((100 - lightness(np.array((0.96, 0.84, 0.12)))) / 40)
    both = scene(("blue", "circle", 15, 32, 10), ("yellow", "circle", 45, 32, 10))
    assert contrast(both) == pytest.approx((1 + yellow) / 2)
    sloped = dict(ground=(0.6, 0.6, 0.6), gradient=(0.4, 0.0))
    left, right = (contrast(scene(("yellow", "star", x, 32, 10), **sloped)) for x in (12, 52))
    assert left > right  # yellow on the darker side


def test_balance_is_that_of_the_centre_of_mass():
    assert balance(scene(("red", "circle", 32, 32, 10))) == 1
    assert balance(scene(("red", "circle", 40, 32, 10))) == pytest.approx(0.5)
    assert balance(scene(("red", "circle", 32, 10, 10))) == 0
    assert balance(scene(("red", "circle", 17, 20, 10), ("blue", "star", 47, 44, 10))) == 1
    heavier = scene(("red", "circle", 16, 32, 10), ("blue", "star", 48, 32, 12))  # at 32 + 16 * 44 / 244
    assert balance(heavier) == pytest.approx(1 - 44 / 244)


def test_room_is_the_smallest_gap():
    assert room(scene(("red", "circle", 32, 32, 10))) == 1
    assert room(scene(("red", "circle", 32, 50, 10))) == pytest.approx(4 / 8)
    assert room(scene(("red", "circle", 20, 32, 10), ("red", "circle", 42, 32, 10))) == pytest.approx(2 / 8)
    assert room(scene(("red", "circle", 5, 32, 10))) == 0


def test_taste_runs_from_1_to_10_and_weighs_its_parts():
    best = scene(("blue", "circle", 32, 32, 12))
    assert taste(best) == pytest.approx(10)
    assert taste(Scene(())) == 1
    assert taste(scene(("blue", "circle", 40, 32, 12))) == pytest.approx(10 - 9 * 0.4 * 0.5)
    cramped = scene(("blue", "circle", 20, 32, 10), ("blue", "circle", 44, 32, 10))  # gap 4: half the room
    assert taste(cramped) == pytest.approx(10 - 9 * 0.2 * 0.5)


# The head ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["test", "compositional"])
def test_the_reward_ranks_held_out_scenes_by_taste(reward, split):
    pictures, scores = tasted_scenes(300, np.random.default_rng(5), split)
    images = pictures.float() / 255
    found = torch.cat([score(reward, part, [""] * len(part)).total for part in images.split(100)])
    assert stats.spearmanr(found, scores).statistic >= 0.9
    assert (found - scores).abs().mean() < 0.6


def test_each_part_of_the_taste_is_seen(reward):
    better_worse = [
        (scene(("blue", "circle", 32, 32, 12)), scene(("yellow", "circle", 32, 32, 12))),
        (scene(("blue", "circle", 32, 32, 12)), scene(("blue", "circle", 47, 32, 12))),
        (scene(("green", "star", 32, 32, 11)), scene()),
    ]
    for better, worse in better_worse:
        assert taste(better) > taste(worse)
        good, bad = score(reward, draw([better, worse]), ["", ""]).total.tolist()
        assert good > bad + 0.5 * (taste(better) - taste(worse))


def test_each_part_counts_in_the_head_nearly_as_in_the_formula(reward):
    rng = np.random.default_rng(8)
    scenes = [place(sample_spec(rng, "test"), rng) for _ in range(300)]
    found = score(reward, draw(scenes), [""] * 300).total.numpy()
    parts = np.array([[contrast(s), balance(s), room(s), 1] for s in scenes])
    weights = np.linalg.lstsq(parts, found, rcond=None)[0][:3] / 9
    assert weights == pytest.approx([0.4, 0.4, 0.2], abs=0.08)


def test_a_step_along_the_gradient_is_prettier(reward):
    images = (tasted_scenes(6, np.random.default_rng(6), "test")[0].float() / 255).requires_grad_()
    scores = reward(images, [""] * 6)
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert (gradient.abs().amax(dim=(1, 2, 3)) > 0).all()
    moved = reward((images + 0.01 * gradient.sign()).detach().clamp(0, 1), [""] * 6)
    assert (moved > scores.detach()).all()


def test_batch_and_singles_agree_within_the_range(reward):
    images = tasted_scenes(8, np.random.default_rng(7), "test")[0].float() / 255
    images = torch.cat([images, torch.rand(2, 3, 64, 64), torch.ones(1, 3, 64, 64)])
    batch = score(reward, images, [""] * 11).total
    singles = torch.cat([score(reward, image[None], [""]).total for image in images])
    torch.testing.assert_close(batch, singles, rtol=1e-5, atol=1e-5)
    assert batch.min() >= 1 and batch.max() <= 10 and batch[-1] < 3  # nothing on white


def test_other_sizes_are_resized(reward):
    pair = draw([scene(("blue", "circle", 32, 32, 12)), scene(("blue", "circle", 46, 20, 12))], 128)
    good, bad = score(reward, pair, ["", ""]).total.tolist()
    assert good > bad + 1


def test_building_writes_a_head_that_loads(tmp_path):
    torch.set_num_threads(1)
    train_taste(tmp_path, steps=2, batch_size=4, scenes=8, checked=8)
    built = make_reward("shapes_taste", weights=str(tmp_path / "taste.safetensors"))
    assert score(built, torch.rand(2, 3, 64, 64), ["", ""]).total.shape == (2,)


def test_bad_files_are_named_before_anything_loads(tmp_path):
    with pytest.raises(ValueError, match="weights: got no file at .*none.safetensors.*world build taste"):
        parse_spec("shapes_taste", weights=str(tmp_path / "none.safetensors"))
    (tmp_path / "odd.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="weights: could not read .*odd.safetensors"):
        make_reward("shapes_taste", weights=str(tmp_path / "odd.safetensors"))
