"""The digits world: its pictures, networks, rewards and measures."""

import copy
import math
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from visalign.rewards import make_reward, score
from visalign.search import Chain, Ledger
from visalign.search.best_of_n import best_of_n
from visalign.transitions import noisy_of, ode_of
from visalign.worlds.digits import WEIGHTS, DigitsModel, build, load_network, load_pictures
from visalign.worlds.digits.metrics import (
    class_shares,
    effective_size,
    entropy,
    frechet,
    look,
    mean_distance,
    measure,
    weighted_moments,
)
from visalign.worlds.digits.rewards import ClassReward, DigitReward, OddDigitsReward


def images_of(pictures):
    return pictures.expand(-1, 3, -1, -1)


@pytest.fixture(scope="module")
def samples():
    """400 pictures of the shipped flow, with noisy steps."""
    model = DigitsModel()
    chain = Chain(model, "", OddDigitsReward(), noisy_of(model.schedule), ledger=Ledger(max_nfe=8000), batch_size=200)
    pool = list(best_of_n(chain, keep_latents=True))[-1].state
    return model.decode(torch.cat(pool.latents), [""] * 400)


# Pictures ------------------------------------------------------------------------------------------------------------


def test_the_split_is_fixed_and_shares_no_picture():
    (train, digits), (test, others) = load_pictures("train"), load_pictures("test")
    assert train.shape == (1297, 1, 8, 8) and test.shape == (500, 1, 8, 8)
    assert min(digits.bincount()) > 100 and min(others.bincount()) > 30
    assert float(train.min()) == 0 and float(train.max()) == 1
    assert float(torch.cdist(train.flatten(1), test.flatten(1)).min()) > 0
    with pytest.raises(ValueError, match="split: got 'all', expected 'train' or 'test'"):
        load_pictures("all")


# Networks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["classifier", "judge"])
def test_the_classifiers_know_the_held_out_pictures(name):
    assert build.accuracy(load_network(name)) >= 0.97


def test_the_judge_is_not_the_classifier_of_the_rewards():
    pictures, _ = load_pictures("test")
    first, second = (load_network(name)(pictures).log_softmax(1) for name in ("classifier", "judge"))
    assert float((first - second).abs().mean()) > 0.1


def test_the_weights_are_small_and_shipped():
    files = list(WEIGHTS.glob("*.safetensors"))
    assert {file.stem for file in files} == {"flow", "classifier", "judge"}
    assert sum(file.stat().st_size for file in files) <= 2 * 2**20
    assert {weight.dtype for file in files for weight in load_file(file).values()} == {torch.float16}
    tools = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "visalign.worlds.digits" in tools["packages"]
    assert tools["package-data"]["visalign.worlds.digits"] == ["weights/*"]


def test_networks_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(ValueError, match="name: got 'vae', expected 'flow', 'classifier' or 'judge'"):
        load_network("vae")
    with pytest.raises(ValueError, match="folder: got no file at .*flow.safetensors"):
        load_network("flow", tmp_path)
    with pytest.raises(ValueError, match="num_steps: got 0, expected >= 1"):
        DigitsModel(0)
    with pytest.raises(ValueError, match="seeds: got 1, expected 2"):
        DigitsModel().noise(["", ""], [0])


def test_building_gives_the_same_files_in_any_order(tmp_path, monkeypatch):
    for name, parts in {"a": ["classifier", "judge", "flow"], "b": ["flow", "judge", "classifier"]}.items():
        options = ["--out", str(tmp_path / name), "--flow-steps", "3", "--classifier-steps", "3", "--parts", *parts]
        monkeypatch.setattr("sys.argv", ["build", *options])
        build.main()
    for part in ("flow", "classifier", "judge"):
        first, second = (load_network(part, tmp_path / name).state_dict() for name in ("a", "b"))
        assert all(torch.equal(first[key], second[key]) for key in first)
    one, other = (load_network(part, tmp_path / "a").state_dict() for part in ("classifier", "judge"))
    assert not torch.equal(one["head.weight"], other["head.weight"])


def test_a_warp_of_no_strength_keeps_the_pictures_and_a_small_one_nearly():
    pictures, _ = load_pictures("test")
    random = torch.Generator().manual_seed(0)
    torch.testing.assert_close(build.warped(pictures, 0.0, random), pictures, atol=1e-5, rtol=0)
    turn, growth = torch.tensor([0.3, -1.0]), torch.tensor([0.0, 0.5])
    matrices = build.similarities(turn, growth, torch.tensor([0.1, 0.0]), torch.tensor([0.0, 0.2]))
    for matrix, angle, scale in zip(matrices[:, :, :2], turn, 1 + growth):  # the point (1, 0) turns and grows
        torch.testing.assert_close(matrix @ matrix.T, scale**2 * torch.eye(2))
        torch.testing.assert_close(matrix @ torch.tensor([1.0, 0.0]), scale * torch.stack([angle.cos(), angle.sin()]))
    assert matrices[:, :, 2].flatten().tolist() == pytest.approx([0.1, 0.0, 0.0, 0.2])
    moved = (build.warped(pictures, 0.08, random) - pictures).flatten(1).norm(dim=1)
    assert 0.1 < float(moved.mean()) < 1.0


# The model -----------------------------------------------------------------------------------------------------------


def test_the_flow_denoises_pictures_it_has_not_seen_better_than_the_best_linear_filter():
    (train, _), (held_out, _), model = load_pictures("train"), load_pictures("test"), DigitsModel(10)
    data = 2 * held_out - 1
    noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(0))
    mean, covariance = (2 * train - 1).flatten(1).mean(0), torch.cov((2 * train - 1).flatten(1).T)
    for step in range(1, 10):
        sigma = model.schedule.levels[step]
        noisy = (1 - sigma) * data + sigma * noise
        error = (noisy - sigma * model.predict(noisy, step, [""] * 500) - data).square().mean()
        gain = (1 - sigma) * covariance @ torch.linalg.inv((1 - sigma) ** 2 * covariance + sigma**2 * torch.eye(64))
        linear = mean + (noisy.flatten(1) - (1 - sigma) * mean) @ gain.T  # exact for Gaussian data
        bound = (linear - data.flatten(1)).square().mean()
        assert float(error) < (0.95 if 0.15 < sigma < 0.65 else 1.05) * float(bound)


def test_samples_are_digits_of_all_kinds_and_not_copies(samples):
    judge = load_network("judge")
    seen, (held_out, _), (train, _) = look(judge, samples), load_pictures("test"), load_pictures("train")
    assert float(seen.confidence.mean()) > 0.93
    assert float(class_shares(seen.digits).min()) > 0.03
    reference = weighted_moments(look(judge, held_out).features)
    noise = look(judge, torch.rand(400, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    distance = frechet(seen.features, None, reference)
    assert distance < 0.1 * frechet(noise.features, None, reference)
    nearest = torch.cdist(seen.pixels, train.flatten(1)).amin(1)
    assert float(nearest.mean()) > 0.5 * float(torch.cdist(held_out.flatten(1), train.flatten(1)).amin(1).mean())


@pytest.mark.parametrize("kernel", [noisy_of, ode_of])
def test_a_sample_depends_on_neither_batch_nor_neighbours(kernel):
    model = DigitsModel(5)

    def pool(batch_size):
        chain = Chain(
            model, "", DigitReward(3), kernel(model.schedule), ledger=Ledger(max_nfe=60), batch_size=batch_size
        )
        return list(best_of_n(chain, keep_latents=True))[-1].state

    whole, parts = pool(12), pool(5)
    torch.testing.assert_close(torch.cat(whole.latents), torch.cat(parts.latents), rtol=1e-4, atol=1e-4)
    assert len(whole.rewards) == 12 and whole.latents[0].shape == (1, 1, 8, 8)


def test_rows_through_the_denoiser_are_counted():
    model = DigitsModel(4)
    chain = Chain(model, "", DigitReward(3), noisy_of(model.schedule), ledger=Ledger(max_nfe=12))
    with chain.counted():
        list(best_of_n(chain))
    assert chain.ledger.forwards == chain.ledger.nfe == 12


# Rewards -------------------------------------------------------------------------------------------------------------


def test_rewards_are_the_log_probabilities_of_one_law():
    images = images_of(load_pictures("test")[0][:50])
    ones = torch.stack([DigitReward(d)(images, [""] * 50) for d in range(10)])
    torch.testing.assert_close(ones.exp().sum(0), torch.ones(50))
    torch.testing.assert_close(OddDigitsReward()(images, [""] * 50), ones[1::2].logsumexp(0))
    assert float(ones.max()) <= 0 and bool((ones.argmax(0) == load_pictures("test")[1][:50]).float().mean() > 0.95)


def test_a_reward_is_found_by_its_path_and_has_no_memory_of_the_batch():
    reward = make_reward({"name": "visalign.worlds.digits.rewards:DigitReward", "digit": 7})
    images = images_of(load_pictures("test")[0][:6])
    together = score(reward, images, [""] * 6).total
    alone = torch.cat([score(reward, images[k : k + 1], [""]).total for k in range(6)])
    torch.testing.assert_close(together, alone)
    assert reward.differentiable and reward.kind == "pointwise"


def test_the_gradient_of_a_reward_is_that_of_finite_differences():
    reward = OddDigitsReward()
    exact = copy.deepcopy(reward._classifier).double()
    images = images_of(load_pictures("test")[0][:20]).clone()
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))

    def value(moved):
        return exact(moved.mean(1, keepdim=True)).log_softmax(1)[:, 1::2].logsumexp(1)

    up, down = (value(images.double() + h * direction.double()) for h in (1e-5, -1e-5))
    (gradient,) = torch.autograd.grad(reward(images.requires_grad_(), [""] * 20).sum(), images)
    found = (gradient * direction).flatten(1).sum(1)
    torch.testing.assert_close(found.double(), (up - down) / 2e-5, rtol=2e-3, atol=1e-6)
    assert float(found.abs().amax()) > 1e-3


def test_rewards_read_larger_and_coloured_pictures():
    images = images_of(load_pictures("test")[0][:5])
    reward = DigitReward(1)
    expected = reward(images, [""] * 5)
    torch.testing.assert_close(reward(images.repeat_interleave(4, 2).repeat_interleave(4, 3), [""] * 5), expected)
    tint = torch.tensor([0.05, 0.0, -0.05]).view(1, 3, 1, 1)
    torch.testing.assert_close(reward(images + tint, [""] * 5), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="images: got shape"):
        reward(images[:, :1], [""] * 5)


@pytest.mark.parametrize("digits", [[], [3, 3], [10], [-1]])
def test_digits_that_are_none_are_refused(digits):
    with pytest.raises(ValueError, match="digits: got .* expected one or more different ones of 0 .. 9"):
        ClassReward(digits)


# Measures ------------------------------------------------------------------------------------------------------------


def test_the_distance_of_gaussians_has_its_closed_form():
    generator = torch.Generator().manual_seed(0)
    n, d = 300, 4
    points = torch.randn(n, d, generator=generator, dtype=torch.float64)
    points = points - points.mean(0)
    exact = points @ torch.linalg.inv(torch.linalg.cholesky(points.T @ points / n)).T  # mean 0, covariance I
    first_mean, second_mean = torch.randn(2, d, generator=generator, dtype=torch.float64)
    first, second = torch.tensor([1.0, 2.0, 0.5, 3.0]).double(), torch.tensor([2.0, 2.0, 1.5, 0.1]).double()
    turn = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
    one, other = (mean + (exact * scale) @ turn for mean, scale in ((first_mean, first), (second_mean, second)))
    expected = (first_mean - second_mean).square().sum() + (first - second).square().sum()
    assert frechet(one, None, weighted_moments(other)) == pytest.approx(float(expected), rel=1e-9)
    assert frechet(one, None, weighted_moments(one)) == pytest.approx(0, abs=1e-9)


def test_weights_count_as_copies():
    points = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    copies = points[[0, 0, 0, 1, 3, 3]]
    weights = torch.tensor([3.0, 1.0, 0.0, 2.0])
    for found, expected in zip(weighted_moments(points, weights), weighted_moments(copies)):
        torch.testing.assert_close(found, expected)
    assert mean_distance(points, weights) == pytest.approx(mean_distance(copies))
    digits = torch.tensor([5, 2, 7, 2])
    torch.testing.assert_close(class_shares(digits, weights), class_shares(digits[[0, 0, 0, 1, 3, 3]]))
    assert effective_size(weights, 4) == pytest.approx(36 / 14) and effective_size(None, 4) == pytest.approx(4)


def test_diversity_has_its_known_values():
    assert entropy(class_shares(torch.arange(10))) == pytest.approx(math.log(10))
    assert entropy(class_shares(torch.full((9,), 4))) == 0
    points = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert mean_distance(points, torch.tensor([0.25, 0.75])) == pytest.approx(2 * 0.25 * 0.75 * 5)
    assert mean_distance(points[:1]) == 0


@pytest.mark.parametrize(
    "weights", [torch.ones(3), torch.tensor([2.0, -1.0]), torch.zeros(2), torch.tensor([math.nan, 1])]
)
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(ValueError, match="weights: got shape .* expected"):
        mean_distance(torch.zeros(2, 1), weights)


def test_real_pictures_measure_as_what_they_are():
    judge = load_network("judge")
    pictures, digits = load_pictures("train")
    seen = look(judge, images_of(pictures))
    threes = weighted_moments(seen.features[digits == 3])
    found = measure(seen, (digits == 3).double(), (3,), {"real": threes})
    assert found["frechet_real"] == pytest.approx(0, abs=1e-6)
    assert found["accuracy"] > 0.97 and found["entropy"] < 0.2
    assert found["effective"] == pytest.approx(float((digits == 3).sum()))
    others = measure(seen, None, (3,), {"real": threes})
    assert others["frechet_real"] > 5 and others["accuracy"] < 0.2 and others["entropy"] > 2.2
