"""Two panels: labels agree with the judge, prompts with what reads grids."""

import numpy as np
import pytest
import torch

from visalign.rewards import make_reward, score
from visalign.rewards.probability.paco import cells, grid_of, main_prompt
from visalign.worlds.shapes.captions import parse
from visalign.worlds.shapes.judge import judge, read
from visalign.worlds.shapes.panels import make_panels, same_objects


@pytest.fixture(scope="module")
def panels():
    return make_panels(120, seed=3)


def caption_of(prompt: str) -> str:
    return main_prompt(prompt).removeprefix("a 1x2 grid of ").removesuffix(".")


def test_the_judge_on_each_panel_agrees_with_the_label(panels):
    """The prompt's meaning is in both panels where they are the same, and in just one where they are not."""
    images, prompts, same = panels
    assert images.shape == (120, 3, 64, 128) and int(same.sum()) == 60
    assert images.min() >= 0 and images.max() <= 1
    sides = {True: 0, False: 0}
    for image, prompt, alike in zip(images, prompts, same.tolist()):
        right = [judge(panel, caption_of(prompt)).strict for panel in cells(image, *grid_of(prompt))]
        assert sum(right) == (2 if alike else 1)
        if not alike:
            sides[right[0]] += 1
    assert min(sides.values()) >= 15  # of 60: either panel may be the odd one


def test_the_same_objects_stand_in_other_places(panels):
    images, _, same = panels
    for image in images[same][:20]:
        places = [sorted((o.x, o.y) for o in read(panel)) for panel in image.chunk(2, dim=2)]
        assert np.abs(np.subtract(*places)).max() > 2


def test_prompts_are_read_as_a_row_of_two_and_never_tell_the_answer(panels):
    _, prompts, _ = panels
    for prompt in prompts:
        assert grid_of(prompt) == (1, 2)
        text = caption_of(prompt)
        assert parse(text).split() == "test" and parse(text).relation is None
        assert prompt == f"a 1x2 grid of {text}. Left: {text}. Right: {text}."


def test_the_exact_judge_of_the_task_is_the_label_and_a_reward(panels):
    images, prompts, same = panels
    reward = make_reward("visalign.worlds.shapes.panels:same_objects")
    assert torch.equal(score(reward, images, prompts).total, same.float())
    assert same_objects(torch.ones(1, 3, 64, 128)).tolist() == [0.0]  # two blank panels show nothing
    with pytest.raises(ValueError, match=r"images: got shape \(1, 3, 64, 64\), expected \(N, 3, 64, 128\)"):
        same_objects(torch.ones(1, 3, 64, 64))


def test_panels_depend_on_the_seed_alone_and_any_split_will_do(panels):
    again, other = make_panels(120, seed=3), make_panels(120, seed=4)
    assert torch.equal(again[0], panels[0]) and again[1] == panels[1]
    assert not torch.equal(other[0], panels[0])
    images, prompts, same = make_panels(30, split="compositional")
    assert all(parse(caption_of(prompt)).split() == "compositional" for prompt in prompts)
    assert torch.equal(same_objects(images), same.float())
