"""Which steps are stochastic: never empty, in range, the same on every process."""

import collections
import math

import pytest
import torch

from visalign.sampling.windows import flash_post_steps, make_window, trained_steps

MIX = ["mix_random", "progressive", "decay", "exp_decay"]


def sequence(window, count):
    return [window(iteration) for iteration in range(count)]


def test_all_steps_is_all_steps_and_the_last_is_left_out_of_training():
    steps = make_window("all", 10)(3)
    assert steps == list(range(10))
    assert trained_steps(steps, 0.99) == list(range(9))
    assert trained_steps(steps, 1.0) == steps
    with pytest.raises(ValueError, match="fraction: got 0.01 of 10 steps"):
        trained_steps(steps, 0.01)


@pytest.mark.parametrize(("span", "starts"), [(None, range(0, 8)), ((0, 5), range(0, 4)), ((2, 10), range(2, 9))])
def test_random_window_starts_uniformly_wherever_it_fits(span, starts):
    drawn = sequence(make_window("random", 10, 2, span=span), 4000)
    counts = collections.Counter(window[0] for window in drawn)
    assert sorted(counts) == list(starts)
    assert all(window == [window[0], window[0] + 1] for window in drawn)
    expected = 4000 / len(starts)
    assert all(abs(count - expected) < 5 * math.sqrt(expected) for count in counts.values())


def test_the_early_window_leaves_out_the_first_step_in_every_iteration():
    assert sequence(make_window("early", 10), 3) == [[1, 2]] * 3 and make_window("early", 5, 3)(7) == [1, 2, 3]
    with pytest.raises(ValueError, match="^size: got 4, expected at most 3: all but the first and last"):
        make_window("early", 5, 4)


def test_random_window_of_size_zero_is_all_but_the_last():
    assert make_window("random", 10, 0)(0) == list(range(9))
    assert make_window("random", 10, 0, span=(2, 6))(0) == [2, 3, 4, 5]


@pytest.mark.parametrize("kind", ["random", "mix_random"])
def test_random_windows_depend_on_the_iteration_or_the_generator_alone(kind):
    window, other = make_window(kind, 25, 4), make_window(kind, 25, 4, seed=1)
    torch.manual_seed(0)
    first = sequence(window, 50)
    torch.manual_seed(1)
    assert sequence(window, 50) == first != sequence(other, 50)
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    assert [window(0, generators[0]) for _ in range(9)] == [window(7, generators[1]) for _ in range(9)]


def test_progressive_window_visits_every_position_for_its_iterations_and_stays():
    window = make_window("progressive", 25, 4)
    for iteration, steps in enumerate(sequence(window, 25 * 25)):
        start = min(iteration // 25, 19)  # 19 .. 22 ends before the last two of 25
        assert steps == [start, start + 1, start + 2, start + 3]


def test_progressive_window_restarts_where_asked():
    window = make_window("progressive", 25, 4, iterations=2, end="restart")
    assert window(2 * 20 - 1)[0] == 19 and window(2 * 20)[0] == 0


def test_progressive_window_without_overlap_covers_each_step_once():
    window = make_window("progressive", 25, 4, iterations=1, stride=4)
    visited = [step for steps in sequence(window, 6) for step in steps]
    assert visited == list(range(23))  # the last window is cut short
    assert window(6) == window(5) == [20, 21, 22]


@pytest.mark.parametrize("kind", MIX)
@pytest.mark.parametrize(("num_steps", "size"), [(25, 4), (10, 3), (10, 8), (3, 1), (7, 1)])
def test_mix_windows_are_never_empty_and_never_in_the_last_two_steps(kind, num_steps, size):
    for steps in sequence(make_window(kind, num_steps, size), 700):
        assert len(steps) == size and steps == sorted(steps)
        assert steps[0] >= 0 and steps[-1] <= num_steps - 3


def test_mix_random_window_reaches_every_start():
    drawn = {steps[0] for steps in sequence(make_window("mix_random", 10, 3), 500)}
    assert drawn == set(range(6))


def dwells(window, count):
    counts = collections.Counter(steps[0] for steps in sequence(window, count))
    return [counts[start] for start in sorted(counts)]


def test_decay_spends_linearly_fewer_iterations():
    """int(most (1 - p) + least p), p = position / (T - 2), as MixGRPO's code: it would reach the least at step 8."""
    window = make_window("decay", 10, 4, iterations=9, last_iterations=1, end="restart")
    assert dwells(window, 9 + 8 + 7 + 6 + 5) == [9, 8, 7, 6, 5]
    by_default = make_window("decay", 25, 4, iterations=25)  # to a quarter
    assert by_default.fewest == 6 and [by_default.dwell(k) for k in (0, 1, 10, 19)] == [25, 24, 16, 9]
    assert make_window("decay", 10, 4, iterations=3).fewest == 1


def test_exp_decay_falls_after_its_knee():
    window = make_window("exp_decay", 25, 4, end="restart")
    expected = [25] * 14 + [math.ceil(25 * math.exp(-0.1 * k)) for k in range(1, 7)]
    assert expected[14:] == [23, 21, 19, 17, 16, 14]
    assert dwells(window, sum(expected)) == expected


def test_flash_keeps_a_share_of_the_steps_after_the_window():
    assert flash_post_steps(25, 3) == int(22 * 0.4) - 1 == 7  # so many levels, one step less
    assert flash_post_steps(25, 3, ratio=0.2) == 3
    assert flash_post_steps(25, 23) == 1 and flash_post_steps(10, 2, 0.5) == 3
    assert flash_post_steps(25, 3, ratio=1.0) == 21  # all there are


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("progresive", 10, 2), "kind: got 'progresive', .*did you mean 'progressive'"),
        (("all", 10, 2), "size: got 2, expected None"),
        (("random", 10), "size: got None, expected a number of steps"),
        (("random", 10, 10), "size: got 10, expected at most 9"),
        (("progressive", 10, 9), "size: got 9, expected at most 8"),
        (("progressive", 10, 0), "size: got 0, expected an integer >= 1"),
    ],
)
def test_bad_windows_are_rejected(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_window(*arguments)


def test_bad_options_are_rejected():
    with pytest.raises(ValueError, match="option of 'random': got 'spam', .*did you mean 'span'"):
        make_window("random", 10, 2, spam=(0, 5))
    with pytest.raises(ValueError, match=r"span: got \(5, 11\)"):
        make_window("random", 10, 2, span=(5, 11))
    with pytest.raises(ValueError, match="stride: got 5, expected at most the size 4"):
        make_window("progressive", 25, 4, stride=5)
    with pytest.raises(ValueError, match="end: got 'loop'"):
        make_window("progressive", 25, 4, end="loop")
    with pytest.raises(ValueError, match="last_iterations: got 30"):
        make_window("decay", 25, 4, last_iterations=30)


def test_decay_at_the_only_position_spends_all_its_iterations():
    window = make_window("decay", 6, 4, iterations=5)
    assert window.positions() == [0] and window.dwell(0) == 5


@pytest.mark.parametrize("kind", ["random", "mix_random"])
def test_a_run_of_another_seed_trains_other_windows(kind):
    from visalign.trainers.flow_grpo import Config

    windows = [
        [Config(window=kind, window_size=2, seed=seed).make_window()(k) for k in range(20)] for seed in (0, 0, 1)
    ]
    assert windows[0] == windows[1] != windows[2]
