import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import convolve
from tiny_maps import tiny_dpt, tiny_upernet

from visalign.rewards import RewardError, make_reward, parse_spec, score
from visalign.rewards.verifiers.cycle import (
    depth_loss,
    edge_loss,
    edge_magnitude,
    map_doubt,
    per_item,
    segmentation_doubt,
    segmentation_loss,
)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


IMAGES = draw(3, 3, 64, 64)
PROMPTS = ["a", "b", "c"]


# The losses


def test_segmentation_loss_in_numpy_with_labels_resized_and_ignored():
    logits, labels = 3 * draw(2, 4, 3, 3), torch.randint(4, (2, 6, 6), generator=torch.Generator().manual_seed(1))
    labels[0, :2, :2] = 255
    small = labels[:, ::2, ::2].numpy()
    p = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(1, keepdims=True)
    expected = np.zeros((2, 3, 3))
    for n, i, j in np.ndindex(2, 3, 3):
        expected[n, i, j] = 0 if small[n, i, j] == 255 else -np.log(p[n, small[n, i, j], i, j])
    losses = segmentation_loss(logits, labels)
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-5)
    means = [expected[n][small[n] != 255].mean() for n in range(2)]
    np.testing.assert_allclose(per_item(losses, torch.tensor(small != 255)).numpy(), means, rtol=1e-5)


def test_ignored_pixels_carry_no_gradient():
    logits, labels = draw(1, 4, 4, 4).requires_grad_(), torch.zeros(1, 4, 4, dtype=torch.long)
    labels[0, :2] = 255
    (gradient,) = torch.autograd.grad(per_item(segmentation_loss(logits, labels), labels != 255).sum(), logits)
    assert (gradient[0, :, :2] == 0).all() and (gradient[0, :, 2:].abs().sum(dim=0) > 0).all()


def test_depth_loss_compares_maps_by_their_maxima():
    a, b = draw(2, 5, 5), draw(2, 5, 5, seed=1)
    expected = (a / a.amax(dim=(1, 2), keepdim=True) - b / b.amax(dim=(1, 2), keepdim=True)) ** 2
    torch.testing.assert_close(depth_loss(a, b), expected)
    torch.testing.assert_close(depth_loss(a, 7 * a), torch.zeros(2, 5, 5))
    assert depth_loss(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2)).isfinite().all()


def test_edges_in_scipy():
    sobel = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 4
    g = np.exp(-(np.arange(-2, 3) ** 2) / 2)
    for image, got in zip(IMAGES.double().numpy(), edge_magnitude(IMAGES).numpy()):
        grey = np.tensordot([0.299, 0.587, 0.114], image, 1)
        grey = convolve(grey, np.outer(g, g) / g.sum() ** 2, mode="nearest")
        expected = np.hypot(convolve(grey, sobel, mode="nearest"), convolve(grey, sobel.T, mode="nearest"))
        np.testing.assert_allclose(got, expected, atol=2e-6)


def test_edges_stand_where_the_picture_steps_and_nowhere_else():
    step = torch.zeros(1, 3, 16, 16)
    step[..., 8:] = 1
    edges = edge_magnitude(step)
    assert edges[0, :, [7, 8]].min() > 0.5 and edges.max() <= 1 and edges[0, :, :4].abs().max() < 1e-6
    torch.testing.assert_close(edge_magnitude(step.transpose(2, 3)), edges.transpose(1, 2))
    leaf = torch.full((1, 3, 8, 8), 0.5, requires_grad=True)
    edge_magnitude(leaf).sum().backward()
    assert leaf.grad.isfinite().all()


def test_equal_predictions_leave_no_doubt():
    maps, logits = draw(2, 4, 4), draw(2, 5, 4, 4)
    for doubt in (segmentation_doubt(logits, logits), map_doubt(maps, maps)):
        torch.testing.assert_close(doubt, torch.zeros(2, 4, 4))


def test_doubt_in_numpy():
    a, b = draw(2, 5, 3, 3), draw(2, 5, 3, 3, seed=1)
    p, q = (np.exp(x.numpy()) / np.exp(x.numpy()).sum(1, keepdims=True) for x in (a, b))
    expected = 0.7 * (p * np.log(p / q)).sum(1)
    np.testing.assert_allclose(segmentation_doubt(a, b, 0.7).numpy(), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(map_doubt(a[:, 0], b[:, 0]).numpy(), 0.1 * np.abs(a[:, 0] - b[:, 0]), rtol=1e-6)


# The reward


def test_edge_cycle_is_zero_for_the_picture_itself_and_below_for_others():
    reward = make_reward("controlnet_cycle", target="references")
    same = score(reward, IMAGES, PROMPTS, {"references": [[x] for x in IMAGES]}).total
    other = {"references": [[x] for x in IMAGES.roll(1, 0)]}
    got = score(reward, IMAGES, PROMPTS, other).total
    expected = -edge_loss(edge_magnitude(IMAGES), edge_magnitude(IMAGES.roll(1, 0))).mean(dim=(1, 2))
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(same, torch.zeros(3))
    maps = {"condition": list(edge_magnitude(IMAGES.roll(1, 0)))}
    torch.testing.assert_close(score(make_reward("controlnet_cycle"), IMAGES, PROMPTS, maps).total, expected)
    singles = [
        score(reward, IMAGES[n : n + 1], ["a"], {"references": other["references"][n : n + 1]}).total for n in range(3)
    ]
    torch.testing.assert_close(torch.cat(singles), got)


def test_segmentation_cycle_runs_an_upernet_from_its_published_layout(tmp_path):
    network = tiny_upernet(tmp_path)
    reward = make_reward("controlnet_cycle", condition="segmentation", model=str(tmp_path))
    labels = torch.randint(5, (3, 64, 64), generator=torch.Generator().manual_seed(1))
    labels[:, :8] = 255
    leaf = IMAGES.clone().requires_grad_()
    got = reward(leaf, PROMPTS, {"condition": list(labels)})
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        logits = network((IMAGES - mean.view(3, 1, 1)) / std.view(3, 1, 1)).logits
    each = [-F.cross_entropy(logits[n : n + 1], labels[n : n + 1], ignore_index=255) for n in range(3)]
    torch.testing.assert_close(got, torch.stack(each))
    (gradient,) = torch.autograd.grad(got.sum(), leaf)
    assert (gradient.abs().amax(dim=(1, 2, 3)) > 0).all()


def test_depth_cycle_runs_a_dpt_from_its_published_layout(tmp_path):
    network = tiny_dpt(tmp_path)
    reward = make_reward("controlnet_cycle", condition="depth", model=str(tmp_path), target="references")
    others = IMAGES.roll(1, 0)
    leaf = IMAGES.clone().requires_grad_()
    got = reward(leaf, PROMPTS, {"references": [[x] for x in others]})
    maps = []
    with torch.no_grad():
        for x in (IMAGES, others):
            small = F.interpolate(x, (32, 32), mode="bicubic", antialias=True).clamp(0, 1)
            depth = network(2 * small - 1).predicted_depth
            maps.append(depth / depth.amax(dim=(1, 2), keepdim=True).clamp(min=1e-8))
    torch.testing.assert_close(got, -((maps[0] - maps[1]) ** 2).mean(dim=(1, 2)), rtol=1e-4, atol=1e-6)
    same = reward(IMAGES, PROMPTS, {"references": [[x] for x in IMAGES]})
    torch.testing.assert_close(same, torch.zeros(3))
    (gradient,) = torch.autograd.grad(got.sum(), leaf)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


def test_an_extractor_may_be_any_function():
    reward = make_reward("controlnet_cycle", extractor=lambda images: images[:, 0])
    context = {"condition": list(IMAGES[:, 1])}
    expected = -((IMAGES[:, 0] - IMAGES[:, 1]) ** 2).mean(dim=(1, 2))
    torch.testing.assert_close(score(reward, IMAGES, PROMPTS, context).total, expected)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"condition": "hed"}, "condition: got 'hed', expected one of"),
        ({"target": "reference"}, "did you mean 'references'"),
        ({"condition": "depth"}, "model: got None for 'depth', expected a folder or hub id, or an extractor"),
        ({"model": "x"}, "model: got 'x' for edge, expected None"),
    ],
)
def test_bad_options_are_one_clear_line(options, says):
    with pytest.raises(ValueError, match=says):
        parse_spec("controlnet_cycle", **options)


def test_bad_conditions_and_models_are_named(tmp_path):
    reward = make_reward("controlnet_cycle")
    for context, says in [
        ({}, "without 'condition'"),
        ({"condition": [torch.zeros(64, 64)] * 2}, "got 2 conditions, expected 3 maps"),
        ({"condition": [torch.zeros(32, 32)] * 3}, r"got edge maps of shape \(3, 32, 32\), expected \(3, 64, 64\)"),
    ]:
        with pytest.raises(RewardError, match=says):
            score(reward, IMAGES, PROMPTS, context)
    with pytest.raises(RewardError, match="sample 1.*got 2 references, expected one"):
        references = [[IMAGES[0]], [IMAGES[1]] * 2, [IMAGES[2]]]
        score(make_reward("controlnet_cycle", target="references"), IMAGES, PROMPTS, {"references": references})
    with pytest.raises(ValueError, match="model: could not load .*download=True"):
        make_reward("controlnet_cycle", condition="depth", model=str(tmp_path))


def test_pixels_that_do_not_count_are_left_out_whatever_their_loss():
    losses, counted = torch.tensor([[[1.0, 9.0], [3.0, 9.0]]]), torch.tensor([[[True, False], [True, False]]])
    assert per_item(losses, counted).tolist() == [2.0] and per_item(losses, counted & False).tolist() == [0.0]
