import numpy as np
import pytest
import torch

from visalign.advantages.group import group_advantages
from visalign.rewards.aggregate import (
    constrained,
    correlation_weighted,
    correlation_weights,
    discount,
    ensemble_mean,
    gated,
    geometric_mean,
    harmonic_mean,
    log_sigmoid,
    log_tamed_sum,
    lower_bound,
    mean_minus_variance,
    normalised_sum,
    preference_as_reward,
    reference_quantile,
    update_multipliers,
    weighted_sum,
    worst_case,
)

K, N = 3, 24
WEIGHTS = torch.tensor([0.5, 0.2, 0.9], dtype=torch.float64)
IDS = torch.tensor([7, 7, 7, 7, 2, 2, 2, 2] * 3) + torch.arange(3).repeat_interleave(8) * 10  # 6 groups of 4
COMBINERS = {
    "weighted": lambda r, w, g: weighted_sum(r, w),
    "log_tamed": lambda r, w, g: log_tamed_sum(r, w)[0],
    "log_tamed_median": lambda r, w, g: log_tamed_sum(r, w, "median")[0],
    "harmonic": lambda r, w, g: harmonic_mean(r, w),
    "geometric": lambda r, w, g: geometric_mean(r, w),
    "mean": lambda r, w, g: ensemble_mean(r, w),
    "min": lambda r, w, g: worst_case(r),
    "uwo": lambda r, w, g: mean_minus_variance(r),
    "normalised": normalised_sum,
    "correlation": lambda r, w, g: correlation_weighted(r, g),
}


@pytest.fixture
def scores() -> torch.Tensor:
    """Positive, of unlike spread, float64."""
    draws = torch.rand(K, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.stack([draws[0], 0.8 + 0.1 * draws[1], draws[2] ** 6])


# Every combiner


@pytest.mark.parametrize("name", COMBINERS)
def test_samples_may_come_in_any_order(name, scores):
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    mixed = COMBINERS[name](scores[:, order], WEIGHTS, IDS[order])
    torch.testing.assert_close(mixed, COMBINERS[name](scores, WEIGHTS, IDS)[order], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", COMBINERS)
def test_rewards_may_come_in_any_order(name, scores):
    order = torch.tensor([2, 0, 1])
    mixed = COMBINERS[name](scores[order], WEIGHTS[order], IDS)
    torch.testing.assert_close(mixed, COMBINERS[name](scores, WEIGHTS, IDS), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", COMBINERS)
def test_one_reward_alone_has_weight_one(name, scores):
    got = COMBINERS[name](scores[:1], torch.ones(1, dtype=torch.float64), IDS)
    expected = scores[0]
    if name == "normalised":
        expected = group_advantages(scores[0], IDS, mode="add").double()
    if name == "correlation":
        groups = scores[0].view(6, 4)
        advantages = (
            (groups - groups.mean(1, keepdim=True)) / (groups.var(1, False, keepdim=True) + 1e-8).sqrt()
        ).view(-1)
        expected = advantages / advantages.std(correction=0)
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["normalised_max", "normalised_add", "correlation"])
def test_advantage_forms_do_not_see_a_rewards_scale_or_offset(name, scores):
    forms = {
        "normalised_max": lambda r: normalised_sum(r, WEIGHTS, IDS, mode="max"),
        "normalised_add": lambda r: normalised_sum(r, WEIGHTS, IDS, eps=1e-12),
        "correlation": lambda r: correlation_weighted(r, IDS),
    }
    # Neither form's floor: 1e-4 on the std, 1e-8 on the variance.
    raw = torch.randn(K, N, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 100
    scaled = raw * torch.tensor([[3.0], [1e3], [0.5]]) + torch.tensor([[5.0], [-2.0], [100.0]])
    torch.testing.assert_close(forms[name](scaled), forms[name](raw), rtol=1e-5, atol=1e-5)


def test_harmonic_below_geometric_below_arithmetic_and_all_between_the_extremes(scores):
    weights = WEIGHTS / WEIGHTS.sum()
    harmonic, geometric, mean = (
        harmonic_mean(scores, weights),
        geometric_mean(scores, weights),
        ensemble_mean(scores, weights),
    )
    slack = 1e-7  # eps is added inside
    assert (harmonic < geometric + slack).all() and (geometric < mean + slack).all() and (harmonic < mean - 1e-3).any()
    assert (harmonic > scores.amin(0) - slack).all() and (mean < scores.amax(0) + slack).all()
    same = scores[:1].expand(K, -1)
    for f in (harmonic_mean, geometric_mean, ensemble_mean):
        torch.testing.assert_close(f(same, weights), scores[0], rtol=1e-6, atol=1e-6)


# Known answers in numpy


def test_score_forms_equal_their_formulas_in_numpy(scores):
    r, w = scores.numpy(), WEIGHTS.numpy()
    oracles = {
        "weighted": np.einsum("k,kn->n", w, r),
        "harmonic": w.sum() / (w[:, None] / (r + 1e-8)).sum(0),
        "geometric": np.exp((w[:, None] * np.log(r + 1e-8)).sum(0) / w.sum()),
        "mean": np.average(r, axis=0, weights=w),
        "min": r.min(0),
        "uwo": r.mean(0) - 0.5 * r.var(0, ddof=1),
    }
    for name, expected in oracles.items():
        np.testing.assert_allclose(COMBINERS[name](scores, WEIGHTS, IDS).numpy(), expected, rtol=1e-12, err_msg=name)


def test_weighted_sum_rounds_as_adding_one_by_one():
    scores = torch.randn(4, 50, generator=torch.Generator().manual_seed(3))
    total = torch.zeros(50)
    for weight, row in zip((0.7, -0.3, 1.0, 1e-3), scores):
        total = total + weight * row
    weights = torch.tensor([0.7, -0.3, 1.0, 1e-3], dtype=torch.float64)
    assert torch.equal(weighted_sum(scores, weights), total)


@pytest.mark.parametrize("threshold", ["mean", "median", 0.2])
def test_log_tame_takes_the_logarithm_of_what_varies_more_than_the_threshold(scores, threshold):
    r = scores.numpy().copy()
    h = r.std(axis=1) / (r.mean(axis=1) + 1e-6)
    limit = {"mean": h.mean(), "median": np.median(h)}.get(threshold, threshold)
    assert 0 < (h > limit).sum() < K
    r[h > limit] = np.log(1 + r[h > limit])
    total, tamed = log_tamed_sum(scores, WEIGHTS, threshold)
    np.testing.assert_allclose(total.numpy(), WEIGHTS.numpy() @ r, rtol=1e-12)
    assert tamed.tolist() == (h > limit).tolist()


def test_log_tame_is_the_plain_sum_below_its_threshold(scores):
    total, tamed = log_tamed_sum(scores, WEIGHTS, 100.0)
    assert not tamed.any() and torch.equal(total, weighted_sum(scores, WEIGHTS))
    assert not log_tamed_sum(scores[2:].expand(3, -1), WEIGHTS)[1].any()  # equal variation: none above their mean


def test_the_median_threshold_may_tame_what_the_mean_does_not():
    spread = torch.tensor([[0.01], [0.1], [0.3], [1.0]])  # of scores 1 - s and 1 + s: these are the variations
    scores = 1 + spread * torch.tensor([-0.9, 0.9])
    assert log_tamed_sum(scores, torch.ones(4), "mean")[1].tolist() == [False, False, False, True]
    assert log_tamed_sum(scores, torch.ones(4), "median")[1].tolist() == [False, False, True, True]


def test_log_tame_measures_variation_by_the_population_std():
    scores = torch.tensor([[1.0, 3.0]])  # std 1 (unbiased: 1.41), mean 2
    assert not log_tamed_sum(scores, torch.ones(1), 0.6)[1].any() and log_tamed_sum(scores, torch.ones(1), 0.4)[1].all()


def test_log_tame_refuses_scores_without_a_logarithm_only_where_it_is_taken():
    scores = torch.tensor([[-1.0, 5.0, -0.5], [1.0, 1.1, 0.9]])
    with pytest.raises(ValueError, match="scores: got -1 of reward 0, expected > -1"):
        log_tamed_sum(scores, torch.ones(2))
    assert not log_tamed_sum(scores, torch.ones(2), 50.0)[1].any()


def test_normalised_sum_in_numpy(scores):
    expected = np.zeros(N)
    for weight, r in zip(WEIGHTS.tolist(), scores.numpy()):
        for g in np.unique(IDS.numpy()):
            here = IDS.numpy() == g
            expected[here] += weight * (r[here] - r[here].mean()) / (r[here].std() + 1e-4)
    np.testing.assert_allclose(normalised_sum(scores, WEIGHTS, IDS).numpy(), expected, rtol=1e-5, atol=1e-6)


def test_a_small_spread_does_not_vanish_in_the_advantage_form():
    ids = torch.zeros(4, dtype=torch.long)
    scores = torch.tensor([[100.0, -100.0, 100.0, -100.0], [0.5, 0.5, 0.6, 0.6]])
    summed = group_advantages(weighted_sum(scores, torch.ones(2)), ids)
    first = normalised_sum(scores, torch.ones(2), ids, mode="max")
    torch.testing.assert_close(first, torch.tensor([0.0, -2.0, 2.0, 0.0]), rtol=1e-4, atol=1e-4)
    assert (summed[:2] - summed[2:]).abs().max() < 0.01  # the second reward is not heard


def correlation_oracle(r: np.ndarray, ids: np.ndarray, tau: float) -> np.ndarray:
    combined = np.zeros(r.shape[1])
    for g in np.unique(ids):
        x = r[:, ids == g]
        advantages = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-8)
        with np.errstate(all="ignore"):
            c = np.nan_to_num(np.corrcoef(x), nan=0.0)
        b = (c.sum(1) - 1) / (len(x) - 1)
        b[x.std(1) <= 1e-6] = 1
        w = np.exp((1 - b) / tau)
        combined[ids == g] = (w / w.sum()) @ advantages
    return (combined - combined.mean()) / combined.std()


@pytest.mark.parametrize("tau", [0.5, 2.0])
def test_correlation_weighted_in_numpy_also_where_a_reward_is_flat_in_a_group(scores, tau):
    scores[1, IDS == 7] = 0.3
    expected = correlation_oracle(scores.numpy(), IDS.numpy(), tau)
    np.testing.assert_allclose(correlation_weighted(scores, IDS, tau).numpy(), expected, rtol=1e-5, atol=1e-6)


def test_conflicting_rewards_weigh_more():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    weights = correlation_weights(torch.stack([x, 2 * x + 1, -x]))
    # b: (1 - 1) / 2 = 0 for the two that agree, (-1 - 1) / 2 = -1 for the third
    expected = torch.tensor([2.0, 2.0, 4.0], dtype=torch.float64).softmax(0)
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=1e-9)


def test_a_missing_entry_makes_its_group_a_plain_sum_of_what_is_there():
    scores = torch.randn(2, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    ids, valid = torch.tensor([0] * 4 + [1] * 4), torch.ones(2, 8, dtype=torch.bool)
    valid[1, 0] = False
    scores[1, 0] = torch.nan
    r = scores.numpy()

    def advantage(x):
        return (x - x.mean()) / np.sqrt(x.var() + 1e-8)

    combined = np.zeros(8)
    combined[:4] = advantage(r[0, :4])
    combined[1:4] += advantage(r[1, 1:4])
    w = correlation_weights(scores[:, 4:]).numpy()
    combined[4:] = w[0] * advantage(r[0, 4:]) + w[1] * advantage(r[1, 4:])
    expected = (combined - combined.mean()) / combined.std()
    np.testing.assert_allclose(correlation_weighted(scores, ids, valid=valid).numpy(), expected, rtol=1e-5, atol=1e-6)


# Transforms of one reward


def test_log_sigmoid_in_numpy_is_linear_below_the_reference_and_flat_above():
    r = np.linspace(-30, 30, 61)
    got = log_sigmoid(torch.tensor(r), 2.0).numpy()
    np.testing.assert_allclose(got, -np.logaddexp(0, -(r - 2.0)), rtol=1e-12)
    assert (np.diff(got) > 0).all() and got.max() < 0
    assert got[1] - got[0] == pytest.approx(1, abs=1e-6) and got[-1] - got[-2] < 1e-10


def test_a_sum_of_log_sigmoids_is_the_log_probability_that_all_are_good():
    r, refs = torch.tensor([[0.3, 2.0], [1.0, -4.0]]), torch.tensor([[0.5], [0.0]])
    joint = (r - refs).sigmoid().prod(dim=0).log()
    torch.testing.assert_close(weighted_sum(log_sigmoid(r, refs), torch.ones(2)), joint)


def test_reference_quantile_is_that_of_the_fitted_normal():
    samples = torch.randn(3, 50, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    z = 1.0364333894937896  # the standard normal's 85th percentile
    expected = samples.numpy().mean(-1) + z * (samples.numpy().std(-1, ddof=1) + 1e-5)
    np.testing.assert_allclose(reference_quantile(samples).numpy(), expected, rtol=1e-12)
    torch.testing.assert_close(reference_quantile(samples, 0.5), samples.mean(-1))


def test_par_in_numpy_is_monotone_bounded_and_steepest_at_the_reference():
    r, refs = np.linspace(-6, 6, 25), np.array([-1.0, 0.5, 2.0])
    got = preference_as_reward(torch.tensor(r), torch.tensor(refs), k=1.5).numpy()
    np.testing.assert_allclose(got, (1 / (1 + np.exp(-1.5 * (r[:, None] - refs)))).mean(1), rtol=1e-12)
    assert (np.diff(got) > 0).all() and got.min() > 0 and got.max() < 1
    one = preference_as_reward(torch.tensor(r), torch.tensor([2.0])).diff()
    assert abs(r[one.argmax()] - 2.0) <= 0.5


def test_par_takes_references_per_sample():
    got = preference_as_reward(torch.tensor([1.0, 1.0]), torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    torch.testing.assert_close(
        got, torch.tensor([0.5, 1.0]).where(torch.tensor([True, False]), torch.tensor(1.0).sigmoid())
    )


# Ensembles, doubt, constraints


def test_pessimistic_ensembles_lie_below_the_mean(scores):
    mean = scores.mean(dim=0)
    assert (worst_case(scores) <= mean).all() and (mean_minus_variance(scores) <= mean).all()
    torch.testing.assert_close(mean_minus_variance(scores, 0.0), mean)
    same = scores[:1].expand(4, -1)
    torch.testing.assert_close(mean_minus_variance(same), worst_case(same))


def test_doubt_lowers_a_score_and_none_leaves_it():
    r, u = torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0])
    torch.testing.assert_close(discount(r, u), torch.tensor([2.0, 3 * np.exp(-1.0)], dtype=torch.float32))
    torch.testing.assert_close(lower_bound(r, u, 2.0), torch.tensor([2.0, 1.0]))


def test_a_gate_lets_a_score_through_where_every_verifier_passes():
    verifiers = torch.tensor([[1.0, 1.0, 0.0], [0.5, 0.4, 0.9]])
    got = gated(torch.tensor([3.0, 4.0, 5.0]), verifiers, torch.tensor([1.0, 0.5]))
    assert got.tolist() == [3.0, 0.0, 0.0]


def test_the_multiplier_finds_the_constrained_optimum():
    """Maximise -(x - 2)^2 subject to -x >= -1: the optimum is x = 1 with multiplier 2."""
    x, multipliers = 0.0, torch.zeros(1, dtype=torch.float64)
    bound = torch.tensor([-1.0], dtype=torch.float64)
    for _ in range(300):
        leaf = torch.tensor([x], dtype=torch.float64, requires_grad=True)
        constrained(-((leaf - 2) ** 2), -leaf[None], bound, multipliers).sum().backward()
        x += 0.3 * float(leaf.grad)
        multipliers = update_multipliers(multipliers, torch.tensor([[-x]], dtype=torch.float64), bound, 0.3)
    assert x == pytest.approx(1, abs=1e-3) and multipliers.item() == pytest.approx(2, abs=1e-2)
    r = torch.tensor([1.0, 2.0])
    assert torch.equal(constrained(r, torch.rand(1, 2), torch.ones(1), torch.zeros(1)), r)
    got = constrained(r, torch.tensor([[3.0, 1.0]]), torch.tensor([2.0]), torch.tensor([4.0]))
    torch.testing.assert_close(got, torch.tensor([(1 + 4 * 1) / 5, (2 - 4 * 1) / 5]))
    assert update_multipliers(torch.tensor([0.1]), torch.ones(1, 5), torch.zeros(1), 1.0).item() == 0


def test_score_forms_keep_the_gradient(scores):
    for name in ("weighted", "log_tamed", "harmonic", "geometric", "mean", "uwo"):
        leaf = (scores[:, :3] + 0.1).requires_grad_()
        assert torch.autograd.gradcheck(lambda r, f=COMBINERS[name]: f(r, WEIGHTS, IDS), leaf), name


@pytest.mark.parametrize(
    "call, says",
    [
        (
            lambda: weighted_sum(torch.rand(3), torch.ones(3)),
            r"scores: got torch.float32 \(3,\), expected floats \(K, N\)",
        ),
        (lambda: weighted_sum(torch.rand(2, 3), torch.ones(3)), r"weights: got shape \(3,\), expected \(2,\)"),
        (lambda: harmonic_mean(-torch.ones(1, 2), torch.ones(1)), "scores: got -1, expected >= 0"),
        (lambda: geometric_mean(torch.ones(2, 2), torch.tensor([1.0, -0.5])), "weights: got .* expected none below 0"),
        (lambda: ensemble_mean(torch.ones(2, 2), torch.tensor([1.0, -1.0])), "expected a sum other than 0"),
        (lambda: mean_minus_variance(torch.ones(2, 2), -1.0), "penalty: got -1.0, expected >= 0"),
        (lambda: log_tamed_sum(torch.ones(2, 2), torch.ones(2), "max"), "threshold: got 'max'"),
        (lambda: correlation_weighted(torch.ones(2, 2), torch.ones(2)), "group_ids: got torch.float32"),
        (lambda: correlation_weighted(torch.ones(2, 2), torch.ones(2).long(), 0.0), "temperature: got 0.0"),
        (lambda: reference_quantile(torch.ones(1)), "samples: got 1, expected at least 2"),
        (lambda: reference_quantile(torch.ones(3), 1.0), "quantile: got 1.0"),
    ],
)
def test_bad_input_is_one_clear_line(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_log_taming_by_hand():
    """h = std / (mean + 1e-6): 0.6 / 1.4 and 1e6, whose mean is 0; the mean and the median of the two lie between."""
    scores = torch.tensor([[0.8, 2.0], [-0.5, 0.5]], dtype=torch.float64)
    for threshold, wanted in ((0.43, [False, True]), (0.42, [True, True]), (1.1e6, [False, False])):
        total, tamed = log_tamed_sum(scores, torch.ones(2), threshold)
        assert tamed.tolist() == wanted
    assert log_tamed_sum(scores, torch.ones(2), 4e5)[1].tolist() == [False, True]  # 0.5 / 1e-6 = 5e5
    assert log_tamed_sum(scores, torch.ones(2), 6e5)[1].tolist() == [False, False]
    total, _ = log_tamed_sum(scores, torch.tensor([1.0, 2.0], dtype=torch.float64), 0.43)
    torch.testing.assert_close(total, scores[0] + 2 * scores[1].log1p())


def test_weights_of_concepts_by_hand_and_without_gradient():
    scores = torch.tensor([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0], [0.0, 1.0, 2.0]], requires_grad=True)
    weights = correlation_weights(scores, 0.5)  # mean correlation with the others: 0, -1, 0
    torch.testing.assert_close(weights, torch.tensor([2.0, 4.0, 2.0], dtype=torch.float64).softmax(0))
    assert not weights.requires_grad
