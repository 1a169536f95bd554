import numpy as np
import pytest

from visalign.statistics.bradley_terry import agreement, bradley_terry


def test_strengths_of_two_without_a_prior_to_speak_of_are_the_log_odds_of_their_wins():
    found = bradley_terry([0] * 40, [1] * 40, [1] * 30 + [0] * 10, 2, prior=1e4)
    assert found.values[0] - found.values[1] == pytest.approx(np.log(3), abs=1e-4)
    # the variance of a log-odds is 1 / wins + 1 / losses; each strength is half the difference from the middle
    assert found.high[0] - found.values[0] == pytest.approx(1.959964 * np.sqrt(1 / 30 + 1 / 10) / 2, rel=1e-3)
    assert found.games.tolist() == [40, 40]


def test_strengths_are_recovered_from_simulated_votes_and_intervals_cover_them():
    rng, truth = np.random.default_rng(0), np.array([1.2, 0.3, -0.4, -1.1])
    covered = 0
    for _ in range(40):
        pairs = [rng.choice(4, 2, replace=False) for _ in range(300)]
        a, b = np.array(pairs).T
        won = rng.random(300) < 1 / (1 + np.exp(truth[b] - truth[a]))
        found = bradley_terry(a, b, won, 4)
        covered += int(((found.low < truth) & (truth < found.high)).sum())
    assert abs(found.values - truth).max() < 0.5
    assert 0.9 <= covered / 160 <= 0.99


def test_a_tie_is_half_a_win_of_each_and_order_does_not_matter():
    ties = bradley_terry([0, 1], [1, 0], [0.5, 0.5], 2)
    assert ties.values == pytest.approx([0, 0], abs=1e-6)
    one, other = bradley_terry([0, 0], [1, 1], [1, 0.5], 2), bradley_terry([1, 1], [0, 0], [0, 0.5], 2)
    assert one.values == pytest.approx(other.values, abs=1e-6)
    assert one.values[0] > 0


def test_one_who_never_lost_stays_finite_and_one_who_never_played_is_in_the_middle():
    found = bradley_terry([0] * 50, [1] * 50, [1] * 50, 3)
    assert np.isfinite(found.values).all() and found.values.sum() == pytest.approx(0, abs=1e-9)
    assert found.values[0] > found.values[2] > found.values[1] and found.games[2] == 0
    assert bradley_terry([], [], [], 2).values.tolist() == [0, 0]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([0], [1], [1, 0], 2), "outcomes: got 2"),
        (([0], [2], [1], 2), "second: got 2"),
        (([1], [1], [1], 2), "second: got 1, which is first too"),
        (([0], [1], [2], 2), "outcomes: got one outside"),
    ],
)
def test_unusable_votes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        bradley_terry(*arguments)


def test_agreement_is_the_share_of_pairs_that_the_score_orders_as_people_do():
    share, low, high = agreement([True, True, False, False], [1.0, -1.0, -0.5, 0.0])
    assert share == pytest.approx(2.5 / 4) and 0 <= low < share < high <= 1
    # Wilson's interval of 8 of 10, as in any table
    assert agreement([True] * 10, [1] * 8 + [-1] * 2) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)
    assert agreement([], [])[1:] == (0.0, 1.0)
    with pytest.raises(ValueError, match="margins: got one that is not finite"):
        agreement([True], [float("nan")])


@pytest.mark.parametrize("prior", [0.5, 2.0])
def test_at_the_top_the_pull_of_the_votes_is_that_of_the_prior(prior):
    found = bradley_terry([0] * 40, [1] * 40, [1] * 30 + [0] * 10, 2, prior=prior)
    strength = found.values[0]
    assert 30 - 40 / (1 + np.exp(-2 * strength)) == pytest.approx(strength / prior**2, abs=1e-5)
    chance = 1 / (1 + np.exp(-2 * strength))
    # of the difference of both, whose curvature is that of the votes twice over and of the prior
    spread = 1.959964 / np.sqrt(2 * (2 * 40 * chance * (1 - chance) + 1 / prior**2))
    assert found.high[0] - strength == pytest.approx(spread, rel=1e-4) == strength - found.low[0]


@pytest.mark.parametrize("wins", [10, 8])
def test_virtual_games_pull_to_0_as_votes_do_and_narrow_the_interval(wins):
    found = bradley_terry([0] * 10, [1] * 10, [1] * wins + [0] * (10 - wins), 2, prior=np.inf, virtual_games=1.5)
    strength = found.values[0]
    chance, own = 1 / (1 + np.exp(-2 * strength)), 1 / (1 + np.exp(-strength))
    assert wins - 10 * chance == pytest.approx(1.5 * (2 * own - 1), abs=1e-5)
    spread = 1.959964 / np.sqrt(2 * (2 * 10 * chance * (1 - chance) + 2 * 1.5 * own * (1 - own)))
    assert found.high[0] - strength == pytest.approx(spread, rel=1e-4)
