"""Resampling: the effective sample size, the expected and the possible counts of each scheme, unequal edge cases."""

import math

import pytest
import torch

from visalign.search.particles.resampling import (
    SCHEMES,
    _invert,
    effective_sample_size,
    log_mean_exp,
    normalized_weights,
    resample,
    residual,
    soft_mean,
    too_uneven,
)

WEIGHTS = torch.tensor([0.31, 0.02, 0.0, 0.17, 0.5], dtype=torch.float64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_effective_sample_size_has_its_known_values():
    assert effective_sample_size(torch.tensor([2.0, 1, 1]).log()) == pytest.approx(16 / 6)
    assert effective_sample_size(torch.full((7,), -3.0)) == pytest.approx(7)
    assert effective_sample_size(torch.tensor([-math.inf, 5, -math.inf])) == pytest.approx(1)
    for seed in range(20):
        log_weights = 5 * torch.randn(9, generator=generator(seed), dtype=torch.float64)
        assert 1 <= effective_sample_size(log_weights) <= 9
        assert effective_sample_size(log_weights + 1e4) == pytest.approx(effective_sample_size(log_weights), rel=1e-9)


def test_impossible_particles_count_alike_and_weights_that_are_none_are_refused():
    assert normalized_weights(torch.full((4,), -math.inf)).tolist() == [0.25] * 4
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="log_weights: got .* expected numbers or -inf"):
            normalized_weights(torch.tensor([0.0, bad]))


@pytest.mark.parametrize("name", SCHEMES)
def test_expected_counts_are_k_times_the_weights(name):
    runs, source = 6000, generator()
    counts = torch.stack([SCHEMES[name](WEIGHTS, source).bincount(minlength=5) for _ in range(runs)]).double()
    assert bool((counts.sum(1) == 5).all()) and float(counts[:, 2].max()) == 0
    error = 3.5 * counts.std(0) / math.sqrt(runs) + 1e-9
    assert bool(((counts.mean(0) - 5 * WEIGHTS).abs() <= error).all())


@pytest.mark.parametrize("name", ["systematic", "ssp"])
def test_counts_are_k_times_the_weights_rounded_up_or_down(name):
    source = generator()
    for seed in range(300):
        weights = torch.softmax(2 * torch.randn(11, generator=generator(seed), dtype=torch.float64), 0)
        counts = SCHEMES[name](weights, source).bincount(minlength=11)
        assert bool(((counts - 11 * weights).abs() < 1).all())


def test_the_other_schemes_keep_their_bounds():
    source = generator()
    for seed in range(300):
        weights = torch.softmax(2 * torch.randn(11, generator=generator(seed), dtype=torch.float64), 0)
        counts = SCHEMES["residual"](weights, source).bincount(minlength=11)
        assert bool((counts >= (11 * weights).floor()).all())
        counts = SCHEMES["stratified"](weights, source).bincount(minlength=11)
        assert bool(((counts - 11 * weights).abs() < 2).all())


def test_the_spread_of_counts_falls_from_multinomial_to_ssp():
    spread = {}
    for name in SCHEMES:
        source = generator()
        counts = torch.stack([SCHEMES[name](WEIGHTS, source).bincount(minlength=5) for _ in range(2000)]).double()
        spread[name] = float(counts.var(0).sum())
    exact = float((5 * WEIGHTS * (1 - WEIGHTS)).sum())
    rests = 5 * WEIGHTS - (5 * WEIGHTS).floor()
    assert spread["multinomial"] == pytest.approx(exact, rel=0.05)
    assert spread["ssp"] == pytest.approx(float((rests * (1 - rests)).sum()), rel=0.05)  # Bernoulli remainders
    assert spread["systematic"] == pytest.approx(spread["ssp"], rel=0.1)
    assert spread["ssp"] < spread["residual"] < spread["multinomial"] > spread["stratified"]


@pytest.mark.parametrize("name", ["systematic", "stratified", "residual", "ssp"])
def test_equal_weights_give_the_identity(name):
    for size in (1, 3, 49, 1000):
        weights = torch.full((size,), 1 / size, dtype=torch.float64)
        assert SCHEMES[name](weights, generator(size)).tolist() == list(range(size))


def test_multinomial_keeps_63_percent_of_equal_particles_unless_left_alone():
    weights = torch.full((20_000,), 1 / 20_000, dtype=torch.float64)
    assert len(SCHEMES["multinomial"](weights, generator()).unique()) / 20_000 == pytest.approx(
        1 - 1 / math.e, abs=0.01
    )
    assert resample(torch.zeros(50), "multinomial", generator=generator()).tolist() == list(range(50))


def test_one_particle_with_all_the_weight_is_the_only_ancestor():
    for name in SCHEMES:
        for k in range(4):
            log_weights = torch.full((4,), -800.0)
            log_weights[k] = 0
            assert resample(log_weights, name, generator=generator(k)).tolist() == [k] * 4


def test_a_point_on_a_boundary_finds_no_particle_without_weight():
    weights = torch.tensor([0, 0.5, 0, 0.5], dtype=torch.float64)
    points = torch.tensor([0, 0.5, 1 - 2**-53, 1], dtype=torch.float64)
    assert _invert(weights, points).tolist() == [1, 3, 3, 3]


def test_when_to_resample():
    log_weights = torch.tensor([2.0, 1, 1]).log()  # effective sample size 2.667 of 3
    assert not too_uneven(log_weights, 0.5) and too_uneven(log_weights, 0.9)
    assert too_uneven(log_weights, 0.5, adaptive=False) and not too_uneven(torch.ones(3), 1.0, adaptive=False)
    with pytest.raises(ValueError, match="resampling: got 'systemic'.*did you mean 'systematic'"):
        resample(log_weights, "systemic", generator=generator())


def test_the_soft_mean_goes_from_the_mean_to_the_maximum():
    values = torch.tensor([[0.0, math.log(3)], [2.0, 2.0]], dtype=torch.float64)
    torch.testing.assert_close(soft_mean(values, 1.0), torch.tensor([math.log(2), 2.0], dtype=torch.float64))
    tilts = [soft_mean(values, tilt)[0].item() for tilt in (0, 1e-6, 0.5, 1, 5, 1000, math.inf)]
    assert tilts == sorted(tilts) and tilts[0] == pytest.approx(math.log(3) / 2) == pytest.approx(tilts[1], abs=1e-5)
    assert tilts[-1] == pytest.approx(math.log(3)) == pytest.approx(tilts[-2], abs=1e-3)
    assert float(log_mean_exp(torch.tensor([1e4, 1e4]))) == pytest.approx(1e4)


def test_points_find_the_first_weight_that_exceeds_them_whatever_the_sum():
    points = torch.tensor([0.0, 0.24, 0.26, 0.6, 1.0], dtype=torch.float64)
    assert _invert(torch.tensor([0.5, 0.5, 1.0, 0.0]).double(), points).tolist() == [0, 0, 1, 2, 2]


def test_the_drawn_rest_of_residual_is_by_the_remainders():
    """K W = 1.6 1.3 1.1 1 0: one place is open, drawn with .6 .3 .1."""
    weights = torch.tensor([1.6, 1.3, 1.1, 1.0, 0.0], dtype=torch.float64) / 5
    counts = torch.stack([torch.bincount(residual(weights, generator(s)), minlength=5) for s in range(3000)])
    wanted = 5 * weights
    torch.testing.assert_close(counts.double().mean(0), wanted, atol=0.05, rtol=0)
    assert (counts >= wanted.floor()).all()
