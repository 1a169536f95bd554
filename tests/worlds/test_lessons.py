"""What the world's CLIP is taught with: near misses, spoilt pictures, and the content heads' targets."""

import numpy as np
import pytest
import torch

from visalign.worlds.shapes.building.clip import platt
from visalign.worlds.shapes.building.tasks import content, make_task, roughen, spoil, train_miss
from visalign.worlds.shapes.captions import caption, parse
from visalign.worlds.shapes.drawing import draw
from visalign.worlds.shapes.judge import judge
from visalign.worlds.shapes.scenes import COLOURS, RELATIONS, SHAPES, Spec, place, sample_spec


def test_a_near_miss_is_another_training_meaning_that_can_be_said_and_drawn():
    rng = np.random.default_rng(0)
    for _ in range(200):
        spec = sample_spec(rng)
        miss = train_miss(spec, rng)
        assert miss.key() != spec.key() and miss.split() == "train"
        assert parse(caption(miss)).key() == miss.key()
        place(miss, rng)


def test_pictures_of_a_lesson_show_their_meanings_and_not_the_near_misses():
    task = make_task(12, np.random.default_rng(1))
    images = task.pictures.float() / 255
    for k, spec in enumerate(task.specs):
        assert judge(images[k], spec).strict
        assert not judge(images[k], task.specs[k ^ 1]).strict or k % 2  # a miss may say less than its picture shows


def test_a_spoilt_picture_no_longer_shows_its_caption():
    rng = np.random.default_rng(2)
    specs = [sample_spec(rng) for _ in range(60)]
    scenes = [place(s, rng) for s in specs]
    spoilt = spoil(scenes, rng).float() / 255
    assert spoilt.shape == draw(scenes).shape
    wrong = [not judge(image, spec).strict for image, spec in zip(spoilt, specs)]
    assert np.mean(wrong) >= 0.85  # now and then the same colour lies beyond the cut


def test_content_does_not_depend_on_the_order_of_naming():
    one = Spec((("red", "circle", 1), ("blue", "square", 1)), "left of")
    other = Spec((("blue", "square", 1), ("red", "circle", 1)), "right of")
    turned = Spec((("red", "circle", 1), ("blue", "square", 1)), "right of")
    several = Spec((("red", "circle", 3),))
    counts, relations = content([one, other, turned, several])
    assert torch.equal(counts[0], counts[1]) and relations[0] == relations[1] != relations[2]
    assert RELATIONS[relations[0]] == "left of" and relations[3] == -100
    cell = list(COLOURS).index("red") * len(SHAPES) + SHAPES.index("circle")
    assert counts[3, cell] == 3 and counts[3].sum() == 3
    for up, down in (("above", "below"), ("below", "above")):
        pair = content([Spec(one.groups, up), Spec(other.groups, down)])[1]
        assert pair[0] == pair[1] and RELATIONS[pair[0]] == up


def test_roughened_pictures_are_near_the_drawn_ones_and_differ_by_their_random_state():
    pictures = make_task(2, np.random.default_rng(3)).pictures
    one, same, other = (roughen(pictures, torch.Generator().manual_seed(k)) for k in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert (one - (pictures.float() / 127.5 - 1)).abs().mean() < 0.12


def test_platts_fit_finds_the_sigmoid_that_drew_the_labels():
    rng = np.random.default_rng(4)
    scores = rng.normal(0.7, 0.1, 40_000)
    right = rng.random(len(scores)) < 1 / (1 + np.exp(-30 * (scores - 0.78)))
    scale, midpoint = platt(scores, right)
    assert scale == pytest.approx(30, rel=0.05) and midpoint == pytest.approx(0.78, abs=0.003)
