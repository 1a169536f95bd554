"""The numbers of an evaluation: means and intervals by prompt, win rates, what is missing, the gallery's choice."""

import numpy as np
import pytest

from visalign.evaluation.results import by_prompt, compare, estimate, extremes, pairs
from visalign.statistics.bootstrap import RESAMPLES, paired_interval

NAN = np.nan


def test_a_tie_counts_half_a_win():
    pair = compare(np.array([[2.0], [1.0], [1.0], [0.0]]), np.ones((4, 1)), (1, 0, 0))
    assert (pair.wins, pair.ties, pair.losses, pair.prompts) == (1, 2, 1, 4)
    assert pair.win_rate.mean == 0.5 and pair.difference.mean == 0
    same = compare(np.ones((4, 1)), np.ones((4, 1)), (1, 0, 0))
    assert (same.win_rate.mean, same.win_rate.low, same.win_rate.high) == (0.5, 0.5, 0.5)


def test_one_contestant_wins_what_the_other_loses():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 20, 3)).round(1)
    a[3, 1], b[5] = NAN, NAN
    ours, theirs = compare(a, b, (1, 0, 0)), compare(b, a, (0, 1, 0))
    assert (ours.wins, ours.ties, ours.losses) == (theirs.losses, theirs.ties, theirs.wins)
    assert ours.wins + ours.ties + ours.losses == 20 * 3 - 1 - 3
    assert ours.win_rate.mean + theirs.win_rate.mean == pytest.approx(1)
    assert ours.difference.mean == pytest.approx(-theirs.difference.mean)


def test_only_pictures_that_both_have_scores_for_are_compared():
    values, base = np.array([[1.0, NAN], [5.0, 7.0], [NAN, NAN]]), np.array([[0.0, 0.0], [NAN, 6.0], [1.0, 1.0]])
    pair = compare(values, base, (1, 0, 0))
    assert (pair.wins, pair.ties, pair.losses, pair.prompts) == (2, 0, 0, 2)
    assert pair.difference.mean == 1.0
    nothing = compare(values, np.full((3, 2), NAN), (1, 0, 0))
    assert nothing.difference is None and nothing.win_rate is None and nothing.prompts == 0


def test_a_prompt_counts_once_however_many_of_its_seeds_are_there():
    values = np.array([[0.0, 0.0, 0.0], [3.0, NAN, NAN]])
    assert by_prompt(values).tolist() == [0.0, 3.0]
    assert estimate(values).mean == 1.5


def test_intervals_are_over_prompts_whose_seeds_stay_together():
    rng = np.random.default_rng(1)
    prompts = rng.normal(size=(30, 1))
    one, many = estimate(prompts), estimate(np.repeat(prompts, 50, axis=1))
    assert (one.low, one.high) == pytest.approx((many.low, many.high))  # seeds that agree tell nothing new
    wanted = paired_interval(prompts)
    assert (one.mean, one.low, one.high) == (wanted.mean, wanted.low, wanted.high)
    assert one.low < one.mean < one.high


def test_a_paired_interval_does_not_see_what_both_share():
    rng = np.random.default_rng(2)
    hardness = 10 * rng.normal(size=(40, 1))
    pair = compare(hardness + 1 + 0.1 * rng.normal(size=(40, 2)), hardness, (1, 0, 0))
    assert 0.9 < pair.difference.low < 1 < pair.difference.high < 1.1
    assert estimate(hardness).high - estimate(hardness).low > 2


def test_one_prompt_has_no_interval():
    single = estimate(np.array([[1.0, 2.0]]))
    assert (single.mean, single.low, single.high) == (1.5, None, None)


def test_later_contestants_stand_against_earlier_ones_by_every_reward():
    found = pairs(np.zeros((3, 2, 4, 1)))
    assert [(p.contestant, p.against, p.reward) for p in found] == [
        *[(1, 0, 0), (1, 0, 1), (2, 0, 0), (2, 0, 1), (2, 1, 0), (2, 1, 1)],
    ]


def test_the_gallery_takes_the_largest_wins_and_losses_a_prompt_once():
    gains = np.array([[0.1, 3.0], [2.0, 2.5], [-1.0, 0.5], [NAN, -4.0], [0.0, 0.0], [NAN, NAN]])
    won, lost = extremes(gains, np.zeros_like(gains), 2)
    assert won == [(0, 1), (1, 1)] and lost == [(3, 1), (2, 0)]
    assert extremes(gains, np.zeros_like(gains), 9)[0] == [(0, 1), (1, 1), (2, 1)]  # ties are in neither


def test_a_paired_interval_in_numpy():
    values, base = np.random.default_rng(3).normal(size=(2, 12, 3))
    gains = (values - base).mean(1)
    rows = np.random.default_rng(5).integers(0, 12, (RESAMPLES, 12))
    low, high = np.percentile(gains[rows].sum(1) / 12, (2.5, 97.5))
    interval = paired_interval(values, base, seed=5)
    assert (interval.mean, interval.low, interval.high) == pytest.approx((gains.sum() / 12, low, high))
