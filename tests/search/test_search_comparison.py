"""Curves and intervals of searches: known answers."""

import numpy as np
import pytest
from search_toys import toy_chain

from visalign.search.best_of_n import best_of_n
from visalign.search.comparison import (
    area,
    at_budgets,
    hacking_gate,
    nfe_to_match,
    relative_area,
    speedup,
    step_agreement,
)
from visalign.statistics.bootstrap import paired_interval


def test_a_trace_is_read_at_or_before_each_budget():
    assert np.array_equal(
        at_budgets([(10, 1.0), (20, 3.0), (40, 4.0)], [5, 10, 39, 40, 99]), [np.nan, 1, 3, 4, 4], equal_nan=True
    )
    events = best_of_n(toy_chain(max_nfe=60, batch_size=2))
    trace = [(event.nfe, event.best.reward) for event in events if event.best is not None]
    assert [n for n, _ in trace] == [12, 24, 36, 48, 60] and trace == sorted(trace)


def test_a_straight_line_in_log_nfe_is_matched_where_it_says():
    budgets = [1, 2, 4, 8, 16]
    curve = np.log2(budgets)  # 0 .. 4
    assert nfe_to_match(budgets, curve, 2.5) == pytest.approx(2**2.5)
    assert nfe_to_match(budgets, curve, 0.0) == 1 and nfe_to_match(budgets, curve, 4.1) == float("inf")
    assert nfe_to_match(budgets, [0, 3, 1, 1, 4], 2.0) == pytest.approx(2 ** (2 / 3))  # a fall is not a loss
    assert area(budgets, curve) == pytest.approx(2) and area(budgets, [5] * 5) == pytest.approx(5)
    assert relative_area(budgets, 2 * curve + 1, curve + 1, base=1.0) == pytest.approx(2)


def test_a_search_that_is_twice_as_fast_on_every_prompt_is_for_sure():
    budgets, levels = [10, 20, 40, 80], np.log2([1, 2, 4, 8])
    heights, slopes = np.random.default_rng(0).uniform(0, 5, (30, 2, 1)), np.full((30, 1, 1), 0.3)
    control, faster = heights + slopes * levels, heights + slopes * (levels + 1)
    found = speedup(budgets, faster, control[..., -1], 80)
    assert (found.mean, found.low, found.high) == pytest.approx((2, 2, 2))
    slower = speedup(budgets, heights + slopes * (levels - 1), control[..., -1], 80)
    assert (slower.mean, slower.low, slower.high) == (0, 0, 0)
    # Half the prompts four times as fast, half as fast: which were drawn decides.
    mixed = heights + slopes * (levels + np.where(np.arange(30) % 2, 2.0, 0.0)[:, None, None])
    mixed[3, 1] = control[3, 1] = np.nan  # one that was not run
    found = speedup(budgets, mixed, control[..., -1], 80)
    assert found.low < 1.9 < 2.1 < found.high and found.mean == pytest.approx(2, abs=0.15)


def test_an_interval_is_of_prompts_not_of_pictures():
    rng = np.random.default_rng(0)
    by_prompt = rng.normal(1.0, 0.5, (200, 1))
    few, many = paired_interval(by_prompt), paired_interval(np.repeat(by_prompt, 50, 1))
    assert few == many  # repeats of a prompt add nothing
    assert few.mean == pytest.approx(by_prompt.mean())
    assert few.high - few.low == pytest.approx(2 * 1.96 * by_prompt.std() / 200**0.5, rel=0.1)
    assert paired_interval(by_prompt, by_prompt).high == 0  # paired: no spread is left
    covered = [abs(i.mean) < i.high - i.mean for i in (paired_interval(rng.normal(0, 1, 50)) for _ in range(200))]
    assert 0.88 < np.mean(covered) < 0.99


def test_the_gate_lets_noise_through_and_no_loss():
    rng = np.random.default_rng(1)
    base = rng.normal(0, 1, (100, 3))
    assert hacking_gate(base + 0.1, base).passed and hacking_gate(base - 1e-9, base - 2e-9).passed
    assert not hacking_gate(base - 0.5 + rng.normal(0, 0.1, base.shape), base).passed
    noisy = hacking_gate(rng.normal(-0.01, 1, (100, 1)), np.zeros((100, 1)))
    assert noisy.error == pytest.approx(0.1, rel=0.2)


def test_few_steps_may_stand_for_all_only_where_they_rank_alike():
    full = np.arange(20.0)
    assert step_agreement(full**3, full) == (pytest.approx(1), True)
    correlation, agree = step_agreement(np.roll(full, 7), full)
    assert correlation < 0.5 and not agree
    with pytest.raises(ValueError, match="at least 3"):
        step_agreement([1, 2], [1, 2])
