"""Agreement of scores with the truth: known answers, worked out by hand, and properties."""

import numpy as np
import pytest

from visalign.statistics.agreement import (
    _best_threshold,
    area_under_curve,
    kendall_within,
    threshold_accuracy,
    tie_calibrated_accuracy,
)


def accuracy_at(truth, scores, epsilon):
    """The definition, pair by pair."""
    right = pairs = 0
    for known, given in zip(truth, scores):
        for i in range(len(known)):
            for j in range(i):
                sign = 0 if abs(given[i] - given[j]) <= epsilon else np.sign(given[i] - given[j])
                right += sign == np.sign(known[i] - known[j])
                pairs += 1
    return right / pairs


def test_ties_worked_out_by_hand():
    """Pairs of truth 0 0 1 1: two ties, four apart. Scores 0, 0.1, 1, 1.3 order one tie wrongly until 0.3 is a tie."""
    truth, scores = np.array([[0, 0, 1, 1]]), np.array([[0, 0.1, 1, 1.3]])
    assert accuracy_at(truth, scores, 0) == 4 / 6 and accuracy_at(truth, scores, 0.1) == 5 / 6
    accuracy, epsilon = tie_calibrated_accuracy(truth, scores)
    assert accuracy == 1 and epsilon == pytest.approx(0.3)  # differences apart are 0.9 and more


def test_a_discordant_pair_counts_against_it_and_so_does_a_tie_of_one_side_alone():
    truth, scores = np.array([[0, 1, 2]]), np.array([[0, 2, 1]])
    assert tie_calibrated_accuracy(truth, scores) == (pytest.approx(2 / 3), 0)  # C = 2, D = 1
    assert tie_calibrated_accuracy(truth, np.array([[0, 1, 1]])) == (pytest.approx(2 / 3), 0)  # C = 2, T_m = 1
    assert tie_calibrated_accuracy(np.array([[0, 1, 1]]), np.array([[0, 5, 9]])) == (pytest.approx(1), 4)  # T_hm


def test_scores_that_say_nothing_have_the_share_of_ties():
    truth = np.array([[0, 0, 1], [1, 1, 1]])
    assert tie_calibrated_accuracy(truth, np.zeros((2, 3))) == (pytest.approx(4 / 6), 0)


def test_the_accuracy_is_the_greatest_over_all_epsilons_and_pairs_of_different_groups_do_not_count():
    rng = np.random.default_rng(0)
    for _ in range(20):
        truth, scores = rng.integers(0, 3, (4, 5)), rng.integers(0, 6, (4, 5)) / 2
        tried = {e: accuracy_at(truth, scores, e) for e in np.arange(0, 3.5, 0.5)}
        accuracy, epsilon = tie_calibrated_accuracy(truth, scores)
        assert accuracy == pytest.approx(max(tried.values())) == pytest.approx(tried[epsilon])
        assert epsilon == min(e for e in tried if tried[e] == pytest.approx(accuracy))
        moved = scores + rng.normal(0, 100, (4, 1))
        assert tie_calibrated_accuracy(truth, np.round(moved * 2) / 2 * 0 + scores)[0] == accuracy
        assert tie_calibrated_accuracy(truth, scores + 8 * np.arange(4)[:, None])[0] == accuracy


def test_kendall_is_of_groups_that_can_be_ordered():
    truth = np.array([[0, 1, 2], [0, 1, 2], [1, 1, 1], [0, 0, 1]])
    scores = np.array([[1, 2, 3], [3, 2, 1], [1, 2, 3], [5, 5, 5]])
    assert kendall_within(truth, scores) == pytest.approx((1 - 1 + 0) / 3)  # the third group says nothing
    assert kendall_within(truth[:2] / 4, scores[[0, 0]] / 4) == 1  # however small the differences
    tied = kendall_within(np.array([[0, 0, 1]]), np.array([[0, 1, 2]]))
    assert tied == pytest.approx(2 / (2 * 3) ** 0.5)  # C = 2 of 3 pairs, one of them a tie of the truth
    assert np.isnan(kendall_within(np.ones((2, 3)), scores[:2]))


def test_area_under_the_curve_is_the_share_of_pairs_in_the_right_order():
    labels = np.array([True, True, False, False, False])
    scores = np.array([3.0, 1.0, 2.0, 1.0, 0.0])
    assert area_under_curve(labels, scores) == pytest.approx((3 + 0 + 0.5 + 1) / 6)
    assert area_under_curve(labels, -scores) == pytest.approx(1 - (3 + 0 + 0.5 + 1) / 6)


def test_the_threshold_of_one_half_is_tried_on_the_other():
    labels = np.array([True, False] * 20)
    assert threshold_accuracy(labels, labels + 0.0) == 1
    assert threshold_accuracy(labels, np.zeros(40)) == 0.5
    rng = np.random.default_rng(0)
    chance = [threshold_accuracy(labels, rng.normal(size=40)) for _ in range(200)]
    assert np.mean(chance) == pytest.approx(0.5, abs=0.03)  # on the same half it would be about 0.6
    halves = np.array([4.0, 0, 1, 0, 4, 3, 1, 3])  # even places of a label: 4 and 0; odd ones: 1 and 0, or 3
    assert threshold_accuracy(np.array([True, False] * 4), halves) < 1


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"scores: got \(2, 2\) for truth \(2, 3\)"):
        tie_calibrated_accuracy(np.zeros((2, 3)), np.zeros((2, 2)))
    with pytest.raises(ValueError, match="at least 2"):
        kendall_within(np.zeros((2, 1)), np.zeros((2, 1)))
    with pytest.raises(ValueError, match="labels: got 3 of 3 true"):
        area_under_curve(np.ones(3), np.zeros(3))


def test_the_middle_of_equally_good_thresholds_is_taken_and_none_may_be_the_best():
    """Each half of the first has three scores apart; the second's scores are the wrong way round: all or none pass."""
    assert _best_threshold(np.array([False, True, True]), np.array([0.0, 1.0, 2.0])) == 0.5
    assert _best_threshold(np.array([True, True, False]), np.array([0.0, 1.0, 2.0])) == -np.inf
    assert _best_threshold(np.array([True, False, False]), np.array([0.0, 1.0, 2.0])) == np.inf
