"""Attack pictures deserve nothing, patches climb, and the share fooled is what it says."""

import math

import numpy as np
import pytest
import torch

from visalign.rewards import make_reward, score
from visalign.rewards.audit.attacks import adversarial_patches, fooled_share, plain_attacks
from visalign.worlds.shapes import world_prompts
from visalign.worlds.shapes.judge import read
from visalign.worlds.shapes.pictures import crowded
from visalign.worlds.shapes.scenes import COLOURS, SHAPES


class Redness:
    """Mean red; gradients reach the images."""

    name, kind, differentiable, range, needs = "redness", "pointwise", True, (0.0, 1.0), ()

    def __call__(self, images, prompts, context=None):
        return images[:, 0].mean(dim=(1, 2))


def test_no_plain_attack_is_strictly_right_for_any_caption():
    prompts = world_prompts("test", 12)
    attacks = plain_attacks(torch.rand(12, 3, 64, 64), prompts)
    assert set(attacks) == {"blank", "noise", "text", "crowd"}
    strict = make_reward("gold", strict=True)
    for pictures in attacks.values():
        assert pictures.shape == (12, 3, 64, 64) and pictures.min() >= 0 and pictures.max() <= 1
        assert not score(strict, pictures, prompts).total.any()
    assert not torch.equal(attacks["text"][0], attacks["text"][1])  # each its own prompt


def test_the_crowd_has_every_object_of_the_world():
    seen = {(o.colour, o.shape) for o in read(crowded())}
    assert len(seen & {(c, s) for c in COLOURS for s in SHAPES}) >= 20  # of 24; at 10 pixels some shapes are doubtful
    assert crowded(96).shape == (3, 96, 96)


def test_a_patch_climbs_by_as_much_as_its_steps_and_its_area_allow_and_touches_nothing_else():
    ground, prompts = torch.full((2, 3, 16, 16), 0.5), ["a", "b"]
    found = adversarial_patches(Redness(), ground, prompts, share=0.25, steps=3, rate=0.1)
    torch.testing.assert_close(found[:, 0, 4:12, 4:12], torch.full((2, 8, 8), 0.8))
    changed = (found != ground).any(dim=1)
    assert changed.sum() == 2 * 64 and changed[:, 4:12, 4:12].all()
    assert found[:, 1:].eq(0.5).all()  # no gradient, no change
    assert adversarial_patches(Redness(), ground, prompts, steps=9, rate=0.1).max() == 1  # pixels stay pixels
    assert torch.equal(adversarial_patches(Redness(), ground, prompts, steps=0), ground)


def test_of_the_pictures_on_the_way_the_best_is_kept():
    class Peak(Redness):
        def __call__(self, images, prompts, context=None):
            return -(images.mean(dim=(1, 2, 3)) - 0.52).abs()

    found = adversarial_patches(Peak(), torch.full((1, 3, 8, 8), 0.5), ["a"], share=1.0, steps=4, rate=0.03)
    torch.testing.assert_close(found, torch.full((1, 3, 8, 8), 0.53))  # 0.53, 0.50, 0.53, 0.50 after 0.50


def test_a_reward_without_gradient_is_refused():
    with pytest.raises(ValueError, match="reward: got 'gold', expected a pointwise one with gradient"):
        adversarial_patches(make_reward("gold"), torch.rand(1, 3, 64, 64), ["a red circle"])


def test_the_share_fooled_is_of_prompts_with_a_right_sample_against_their_mean():
    scores = torch.tensor([[1.0, 3.0, 9.0], [1.0, 3.0, 9.0], [1.0, 3.0, 9.0], [5.0, 5.0, 5.0]])
    right = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 0], [1, 0, 0]]).bool()  # means 2, 2, none, 5
    attacks = torch.tensor([2.5, 1.5, 99.0, 5.0])
    assert fooled_share(attacks, scores, right) == pytest.approx(1 / 3)  # an equal score fools nobody
    assert fooled_share(attacks, scores, right, torch.tensor([True, False, False, False])) == 0
    assert math.isnan(fooled_share(attacks, scores, torch.zeros(4, 3, dtype=torch.bool)))
    assert np.isclose(fooled_share(attacks + 4, scores, right), 1)
