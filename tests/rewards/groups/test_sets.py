import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from tiny_clip import save_tiny_clip

from visalign.images import images_to_pil, pil_to_images
from visalign.rewards import RewardError, make_reward, parse_spec, score
from visalign.rewards.groups.sets import (
    frechet_distance,
    kernel_distance,
    leave_one_out,
    moments,
    split_by_score,
    split_by_set_score,
    vendi_score,
)


def draws(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


A, B = draws(40, 5), draws(30, 5, 1) @ draws(5, 5, 2) + 1


def fd(a: torch.Tensor, b: torch.Tensor, shrinkage: float = 0.0) -> float:
    return float(frechet_distance(moments(a, shrinkage), moments(b, shrinkage)))


# Frechet distance


def test_frechet_distance_equals_the_formula_with_scipys_root():
    a, b = A.numpy(), B.numpy()
    c1, c2 = np.cov(a.T), np.cov(b.T)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(c1 + c2 - 2 * sqrtm(c1 @ c2).real)
    assert fd(A, B) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_is_a_distance_of_sets():
    assert abs(fd(A, A)) < 1e-9
    assert fd(A, B) == pytest.approx(fd(B, A), rel=1e-9)
    assert fd(A, A[torch.randperm(40)]) == pytest.approx(0, abs=1e-9)
    shift = torch.tensor([1.0, -2.0, 0.0, 0.5, 0.0])
    assert fd(A + shift, A) == pytest.approx(float((shift**2).sum()), rel=1e-9)
    assert fd(2 * A, A) == pytest.approx(float(A.mean(0) @ A.mean(0) + torch.cov(A.T).trace()), rel=1e-9)


def test_frechet_distance_of_fewer_samples_than_features_stays_finite_and_at_least_zero():
    few, other = draws(4, 20), draws(5, 20, 1)
    assert -1e-3 <= fd(few, few) < 1e-6 and fd(few, other) > 0
    leaf = few.clone().requires_grad_()
    frechet_distance(moments(leaf), moments(other)).backward()
    assert leaf.grad.isfinite().all() and leaf.grad.abs().sum() > 0


def test_shrinkage_mixes_in_a_round_covariance_of_the_same_trace():
    covariance = torch.cov(A.T)
    torch.testing.assert_close(moments(A)[1], covariance)
    torch.testing.assert_close(moments(A, 1.0)[1], covariance.trace() / 5 * torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(moments(A, 0.3)[1].trace(), covariance.trace())
    added = frechet_distance(moments(A), (moments(A)[0], torch.zeros(5, 5)), eps=1.0)
    eye = torch.eye(5, dtype=torch.float64)
    expected = frechet_distance((moments(A)[0], covariance + eye), (moments(A)[0], eye))
    torch.testing.assert_close(added, expected)


def test_the_gradient_of_the_frechet_distance_is_that_of_finite_differences():
    other = moments(B)
    assert torch.autograd.gradcheck(lambda x: frechet_distance(moments(x), other), A[:8].clone().requires_grad_())


def test_kernel_distance_in_numpy():
    a, b = A.numpy(), B.numpy()

    def k(x, y):
        return (x @ y.T / 5 + 1) ** 3

    off = [
        sum(k(x, x)[i, j] for i in range(len(x)) for j in range(len(x)) if i != j) / (len(x) * (len(x) - 1))
        for x in (a, b)
    ]
    assert float(kernel_distance(A, B)) == pytest.approx(sum(off) - 2 * k(a, b).mean(), rel=1e-9)
    assert abs(float(kernel_distance(draws(400, 2), draws(400, 2, 1)))) < 0.1 < float(kernel_distance(A, A + 1))


# Vendi score


@pytest.mark.parametrize("order", [0.5, 1.0, 2.0, math.inf])
def test_vendi_is_one_of_copies_n_of_orthogonal_ones_and_between_else(order):
    assert float(vendi_score(A[:1].expand(6, -1), order)) == pytest.approx(1, abs=1e-6)
    assert float(vendi_score(torch.eye(6) * 3, order)) == pytest.approx(6, rel=1e-6)
    assert 1 < float(vendi_score(A, order)) <= 5 + 1e-9  # no more than there are dimensions


@pytest.mark.parametrize("n, d", [(4, 9), (9, 4)])
def test_vendi_in_numpy_by_gram_matrix_and_its_dual(n, d):
    x = draws(n, d).numpy()
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    values = np.linalg.eigvalsh(x @ x.T / n)
    values = values[values > 1e-12]
    features = draws(n, d) * 7
    assert float(vendi_score(features)) == pytest.approx(np.exp(-(values * np.log(values)).sum()), rel=1e-9)
    assert float(vendi_score(features, 3.0)) == pytest.approx((values**3).sum() ** (-1 / 2), rel=1e-9)
    assert float(vendi_score(features, math.inf)) == pytest.approx(1 / values.max(), rel=1e-9)
    assert float(vendi_score(features, 1.0001)) == pytest.approx(float(vendi_score(features)), rel=1e-3)


def test_merging_copies_leaves_vendi_unchanged_when_weights_follow():
    features = torch.cat([A[:3], A[:1], A[:1]])
    merged = vendi_score(A[:3], weights=torch.tensor([0.6, 0.2, 0.2]))
    torch.testing.assert_close(vendi_score(features), merged)


def test_the_gradient_of_vendi_is_that_of_finite_differences():
    assert torch.autograd.gradcheck(vendi_score, A[:4].clone().requires_grad_())


# Shares and DRAGON's sets


def test_a_share_is_n_times_what_the_set_loses_without_the_sample():
    features = torch.cat([torch.eye(3), torch.eye(3)[:1]])
    whole, shares = leave_one_out(vendi_score, features)
    without = [float(vendi_score(features[[j for j in range(4) if j != i]])) for i in range(4)]
    torch.testing.assert_close(shares, 4 * (whole - torch.tensor(without, dtype=torch.float64)))
    assert (shares[1:3] > shares[[0, 3]].max()).all() and shares[0] == pytest.approx(float(shares[3]))


@pytest.mark.parametrize("gap", [False, True])
def test_the_better_set_is_at_least_as_good_as_either_and_each_pair_is_split(gap):
    for seed in range(5):
        first, second = draws(8, 4, seed), draws(8, 4, seed + 100)
        calls = []

        def value(x, calls=calls):
            calls.append(x)
            return vendi_score(x)

        swap = split_by_set_score(first, second, value, torch.Generator().manual_seed(seed), gap)
        assert all(len(x) == 8 for x in calls)
        better, worse = torch.where(swap[:, None], second, first), torch.where(swap[:, None], first, second)
        start = sorted([vendi_score(first), vendi_score(second)])
        if gap:
            assert vendi_score(better) - vendi_score(worse) >= start[1] - start[0] - 1e-12
        else:
            assert vendi_score(better) >= start[1] - 1e-12
        for k in range(8):  # no single swap would help
            other = swap.clone()
            other[k] = ~other[k]
            new = vendi_score(torch.where(other[:, None], second, first))
            new = new - vendi_score(torch.where(other[:, None], first, second)) if gap else new
            assert new <= (vendi_score(better) - vendi_score(worse) if gap else vendi_score(better)) + 1e-12


@pytest.mark.parametrize("gap", [False, True])
def test_rewards_of_single_samples_reproduce_the_pairwise_rule(gap):
    first, second = draws(10, 1), draws(10, 1, 1)
    swap = split_by_set_score(first, second, torch.mean, torch.Generator().manual_seed(0), gap)
    assert torch.equal(swap, split_by_score(first[:, 0], second[:, 0])) and 0 < swap.sum() < 10


# The rewards


def colours(images: torch.Tensor) -> torch.Tensor:
    return images.mean(dim=(2, 3)) - 0.2


PICTURES = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * torch.rand(6, 3, 1, 1)


def test_vendi_reward_gives_shares_of_the_whole_set_or_of_each_group():
    ids = torch.tensor([4, 4, 4, 1, 1, 1])
    got = score(make_reward("vendi", encoder=colours), PICTURES, list("abcdef"), {"group_ids": ids})
    torch.testing.assert_close(got.total, leave_one_out(vendi_score, colours(PICTURES))[1].float())
    reward = make_reward("vendi", encoder=colours, per_group=True, order=2.0)
    output = score(reward, PICTURES, list("abcdef"), {"group_ids": ids}).outputs["vendi"]
    for g in (4, 1):
        whole, shares = leave_one_out(lambda x: vendi_score(x, 2.0), colours(PICTURES[ids == g]))
        torch.testing.assert_close(output.scores[ids == g], shares.float())
        torch.testing.assert_close(output.extra["set"][ids == g], whole.float().expand(3))
    assert (reward.kind, make_reward("vendi", encoder=colours).kind) == ("groupwise", "setwise")


def test_neg_fd_reads_exemplars_from_a_folder_or_the_context(tmp_path):
    exemplars = torch.rand(4, 3, 6, 6, generator=torch.Generator().manual_seed(3))
    for n, picture in enumerate(images_to_pil(exemplars)):
        picture.save(tmp_path / f"{n}.png")
    exemplars = pil_to_images([Image.open(tmp_path / f"{n}.png").convert("RGB") for n in range(4)])
    other = moments(colours(exemplars), 0.2)
    expected = leave_one_out(lambda x: -frechet_distance(moments(x, 0.2), other), colours(PICTURES))
    prompts = list("abcdef")
    from_folder = score(
        make_reward("neg_fd", exemplars=str(tmp_path), shrinkage=0.2, encoder=colours), PICTURES, prompts
    )
    torch.testing.assert_close(from_folder.total, expected[1].float())
    references = [list(exemplars[:3]), [exemplars[3]], [], [], [], []]
    reward = make_reward("neg_fd", shrinkage=0.2, encoder=colours)
    output = score(reward, PICTURES, prompts, {"references": references}).outputs["neg_fd"]
    torch.testing.assert_close(output.scores, expected[1].float())
    torch.testing.assert_close(output.extra["set"], expected[0].float().expand(6))
    with pytest.raises(RewardError, match="without 'references'"):
        score(reward, PICTURES, prompts)


@pytest.mark.parametrize("name", ["vendi", "neg_fd"])
def test_set_rewards_run_on_an_open_clip_model_with_gradient(name, tmp_path):
    folder = save_tiny_clip(tmp_path / "clip")
    reward = make_reward(name, model=str(folder))
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    context = {"references": [[torch.rand(3, 20, 24)]] * 4}
    output = reward(images, list("abcd"), context)
    assert reward.differentiable and output.scores.dtype == torch.float32
    (gradient,) = torch.autograd.grad((output.scores * torch.arange(4)).sum(), images)
    assert gradient.isfinite().all() and (gradient.abs().amax(dim=(1, 2, 3)) > 0).all()
    order = torch.tensor([2, 0, 3, 1])
    mixed = reward(images[order], list("cadb"), context).scores
    torch.testing.assert_close(mixed, output.scores[order], rtol=1e-3, atol=1e-4)


def test_bad_sets_and_options_are_one_clear_line(tmp_path):
    for call, says in {
        lambda: moments(torch.rand(1, 3)): r"features: got shape \(1, 3\), expected \(n, D\) with n >= 2",
        lambda: moments(torch.rand(3, 3), 2.0): "shrinkage: got 2.0",
        lambda: vendi_score(torch.rand(3, 3), -1): "order: got -1",
        lambda: frechet_distance(moments(A), moments(draws(9, 3))): "second: got 3 features, expected 5",
        lambda: parse_spec("vendi", order=-1.0): "order: got -1.0",
        lambda: parse_spec("vendi", model="no-such"): "pretrained: got None",
        lambda: parse_spec("neg_fd", exemplars=str(tmp_path)): "with 0 pictures, expected at least 2",
        lambda: parse_spec("neg_fd", exemplars=str(tmp_path / "x")): "which is no folder",
        lambda: parse_spec("neg_fd", shrinkage=-0.1): "shrinkage: got -0.1",
        lambda: make_reward("vendi", encoder="nothing"): "encoder: got 'nothing', expected 'module:attribute'",
        lambda: score(
            make_reward("vendi", encoder=colours), PICTURES[:1], ["a"]
        ): "got a set of 1, expected at least 2",
    }.items():
        with pytest.raises(ValueError, match=says):
            call()


def test_the_split_starts_from_the_better_of_the_two_sets():
    alike, unlike = torch.ones(4, 4), torch.eye(4)
    for first, second, expected in ((alike, unlike, True), (unlike, alike, False)):
        swap = split_by_set_score(first, second, vendi_score, torch.Generator(), sweeps=0)
        assert swap.tolist() == [expected] * 4


def test_of_two_equal_samples_the_first_goes_to_the_better_set():
    first, second = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 3.0, 2.0])
    assert split_by_score(first, second).tolist() == [False, True, False]


def test_two_samples_a_set_are_enough_for_the_kernel_distance():
    assert kernel_distance(A[:2], B[:2]).isfinite()
