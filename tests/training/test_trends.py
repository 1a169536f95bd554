"""Trends of series at known values."""

import math

import numpy as np
import pytest
from scipy import stats

from visalign.training.watch.trends import Series, shift_p_value, trend


def test_a_slope_is_theil_sens_a_step_and_the_change_is_over_the_span():
    steps, values = [0, 10, 20, 40, 50], [1.0, 3.0, 2.0, 9.0, 6.0]
    found = trend(steps, values)
    assert found.slope == pytest.approx(stats.theilslopes(values, steps).slope)
    assert found.change == pytest.approx(50 * found.slope)


def residual_correlation(steps, values, slope):
    residuals = np.asarray(values) - slope * np.asarray(steps)
    residuals = residuals - residuals.mean()
    return residuals[1:] @ residuals[:-1] / (residuals @ residuals)


def test_the_score_is_mann_kendalls_with_its_correction_for_ties():
    # One value comes twice and one three times; the residuals alternate, which must not narrow the variance.
    steps, values = list(range(7)), [2.0, 1.0, 2.0, 1.0, 3.0, 1.0, 4.0]
    score = sum(np.sign(values[j] - values[i]) for i in range(7) for j in range(i + 1, 7))
    variance = (7 * 6 * 19 - 2 * 1 * 9 - 3 * 2 * 11) / 18
    found = trend(steps, values)
    assert residual_correlation(steps, values, found.slope) < -0.2
    assert score == 5 and found.z == pytest.approx((score - 1) / math.sqrt(variance))
    mirrored = trend(steps, [-v for v in values])
    assert (mirrored.slope, mirrored.z, mirrored.change) == pytest.approx((-found.slope, -found.z, -found.change))


def test_neighbours_that_wander_together_widen_the_variance():
    steps, values = list(range(12)), [0.0, 1.0, 2.5, 3.0, 3.2, 2.5, 2.0, 2.2, 3.5, 4.6, 6.0, 7.0]
    found = trend(steps, values)
    r = residual_correlation(steps, values, found.slope)
    r += (1 + 4 * r) / 12
    score = sum(np.sign(values[j] - values[i]) for i in range(12) for j in range(i + 1, 12))
    variance = (12 * 11 * 29 - 2 * 1 * 9) / 18  # 2.5 comes twice
    assert 0.3 < r < 0.98
    assert found.z == pytest.approx((score - 1) / math.sqrt(variance * (1 + r) / (1 - r)))


def test_the_correlation_that_widens_the_variance_is_at_most_98_hundredths():
    steps, wave = list(range(50)), [math.cos(2 * math.pi * k / 65) for k in range(50)]
    found = trend(steps, wave)
    r = residual_correlation(steps, wave, found.slope)
    assert r + (1 + 4 * r) / 50 > 0.98
    score = sum(np.sign(wave[j] - wave[i]) for i in range(50) for j in range(i + 1, 50))
    assert found.z == pytest.approx((score - np.sign(score)) / math.sqrt(50 * 49 * 105 / 18 * 1.98 / 0.02))


def test_a_constant_series_has_no_trend_and_a_straight_line_a_sure_one():
    assert trend([0, 1, 2], [5.0, 5.0, 5.0]) == (0.0, 0.0, 0.0)
    line = trend([0, 2, 4], [1.0, 2.0, 3.0])
    assert line == pytest.approx((0.5, (3 - 1) / math.sqrt(3 * 2 * 11 / 18), 2.0))
    with pytest.raises(ValueError, match="at least 3"):
        trend([0, 1], [0.0, 1.0])


def test_long_series_are_averaged_in_blocks_and_the_oldest_values_left_out():
    steps = list(range(105))  # 35 blocks of 3
    noise = np.random.default_rng(0).normal(size=105)
    blocks = trend(np.arange(105).reshape(35, 3).mean(1), noise.reshape(35, 3).mean(1))
    assert trend(steps, noise) == pytest.approx(blocks)
    assert trend(list(range(107)), [9.0, -9.0, *noise]) == pytest.approx(blocks)
    assert trend(list(range(50)), noise[:50]).slope == pytest.approx(stats.theilslopes(noise[:50]).slope)


def series(values, baseline=2, window=4, spread=0.5):
    made = Series()
    for step, value in enumerate(values):
        made.add(step, (value, spread), baseline, window)
    return made


def test_a_series_keeps_its_first_values_and_forgets_what_is_older_than_the_window():
    made = series([1.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.0])
    assert (made.first, made.count, made.steps, made.values) == ([1, 3], 7, [3, 4, 5, 6], [7, 9, 11, 13])
    assert made.has(7) and not made.has(8)
    assert (made.start, made.now(2), made.change(2)) == (2.0, 12.0, 20.0)
    assert made.now(3) == 11.0  # of four
    with pytest.raises(ValueError, match="expected a later one"):
        made.add(6, (0.0, 0.0), 2, 4)


def test_values_that_come_seldom_are_kept_though_they_are_old():
    made = Series()
    for step in (0, 100, 200, 300, 400):
        made.add(step, (1.0, 0.0), 2, 50)
    assert made.steps == [100, 200, 300, 400]
    assert [made.within(150, 0), made.within(100, 0), made.within(150, 3), made.within(150, 9)] == [2, 1, 3, 4]


def test_the_spread_is_pooled_over_the_first_values_and_never_0():
    made = Series()
    made.add(0, (-4.0, 3.0), 2, 9)
    made.add(1, (-6.0, 4.0), 2, 9)
    assert made.spread == pytest.approx(math.sqrt(12.5))
    assert series([-4.0, -6.0], spread=0.0).spread == pytest.approx(5e-3)
    assert series([0.0, 0.0], spread=0.0).spread == 1e-6


def test_a_shift_is_judged_from_both_sides():
    low, high = [1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]
    assert shift_p_value(low, high) == pytest.approx(2 / 70) == shift_p_value(high, low)


def test_a_series_lets_go_of_what_is_older_than_its_window_but_not_of_the_last_few():
    series = Series()
    for step in range(0, 50, 5):
        series.add(step, (float(step), 1.0), baseline=2, window=25)
    assert series.steps == [25, 30, 35, 40, 45] and series.values == [25.0, 30.0, 35.0, 40.0, 45.0]  # 20 is 25 old
    seldom = Series()
    for step in range(0, 500, 100):
        seldom.add(step, (1.0, 1.0), baseline=2, window=20)
    assert seldom.steps == [100, 200, 300, 400] and seldom.count == 5  # twice the baseline stays, however old


def test_a_series_that_never_moves_has_no_trend():
    assert trend([0, 1, 2, 3], [5.0] * 4) == (0.0, 0.0, 0.0)
