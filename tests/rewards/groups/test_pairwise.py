"""Comparisons: what cancels, what sums to half the group, and strengths that are the maximum of the likelihood."""

import math

import numpy as np
import pytest
import torch

from visalign.rewards import RewardError, make_reward, parse_spec, score
from visalign.rewards.groups.pairwise import Verdicts, all_pairs, ask_both, drawn_pairs, win_rates
from visalign.rewards.groups.win_rate import WinRate, make_judge
from visalign.statistics.bradley_terry import bradley_terry

BIAS = 0.7  # of the judge below, for whatever stands first


def brightness_judge(first, second, prompts, context=None):
    """Log-odds 10 * (brightness of the first - that of the second) + BIAS."""
    return 10 * (first.flatten(1).mean(1) - second.flatten(1).mean(1)) + BIAS


def shades(*values: float) -> torch.Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()


def loop_win_rates(values, judge, groups):
    """The definition, one pair at a time: 1 where both orders agree on a winner, else 1/2."""
    rates = []
    for n, x in enumerate(values):
        points = []
        for m, y in enumerate(values):
            if m != n and groups[m] == groups[n]:
                there, back = (float(judge(shades(a), shades(b), ["p"])) for a, b in ((x, y), (y, x)))
                points.append(0.5 if there * back >= 0 else float(there > 0))
        rates.append(sum(points) / len(points))
    return rates


# Both orders


def test_swapping_the_pictures_only_changes_the_sign_of_the_debiased_log_odds():
    first, second = torch.rand(2, 16, 3, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    one, other = (
        ask_both(brightness_judge, first, second, ["p"] * 16),
        ask_both(brightness_judge, second, first, ["p"] * 16),
    )
    assert torch.equal(one.log_odds, -other.log_odds) and torch.equal(one.bias, other.bias)
    torch.testing.assert_close(one.probability + other.probability, torch.ones(16))
    assert torch.equal(one.outcome + other.outcome, torch.ones(16))


def test_an_additive_bias_is_found_and_removed():
    first, second = torch.rand(2, 16, 3, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    verdicts = ask_both(brightness_judge, first, second, ["p"] * 16)
    true = 10 * (first.flatten(1).mean(1) - second.flatten(1).mean(1))
    torch.testing.assert_close(verdicts.log_odds, true, atol=1e-5, rtol=0)
    torch.testing.assert_close(verdicts.bias, torch.full((16,), BIAS), atol=1e-5, rtol=0)


def test_the_debiased_probability_is_the_mean_over_both_orders_and_not_the_sigmoid_of_the_mean():
    verdicts = Verdicts(torch.tensor([2.0]), torch.tensor([1.0]))
    expected = (1 / (1 + math.exp(-2)) + 1 - 1 / (1 + math.exp(-1))) / 2
    assert float(verdicts.probability) == pytest.approx(expected, abs=1e-6)
    assert abs(expected - 1 / (1 + math.exp(-0.5))) > 0.01


def test_a_winner_counts_only_where_both_orders_name_it():
    verdicts = Verdicts(torch.tensor([1.0, -1.0, 1.0, 0.0, math.nan]), torch.tensor([-2.0, 3.0, 1.0, 0.0, -1.0]))
    assert verdicts.outcome.tolist() == [1.0, 0.0, 0.5, 0.5, 0.5]
    assert verdicts.consistent.tolist() == [True, True, False, True, False]


# Who meets whom


@pytest.mark.parametrize("size", [2, 3, 8, 9])
def test_all_pairs_are_each_two_once_with_the_first_place_shared(size):
    pairs = all_pairs(size)
    assert sorted(tuple(sorted(p)) for p in pairs) == [(i, j) for i in range(size) for j in range(i + 1, size)]
    first = torch.bincount(torch.tensor([i for i, _ in pairs]), minlength=size)
    assert first.max() - first.min() <= 1


@pytest.mark.parametrize("size, opponents", [(8, 2), (8, 3), (9, 4), (8, 6), (8, 7), (5, 30)])
def test_drawn_pairs_give_everybody_the_same_number_of_different_opponents(size, opponents):
    pairs = drawn_pairs(size, opponents, torch.Generator().manual_seed(3))
    met = [{a + b - n for a, b in pairs if n in (a, b)} for n in range(size)]
    assert {len(m) for m in met} == {min(opponents, size - 1)} and all(n not in m for n, m in enumerate(met))
    assert len({tuple(sorted(p)) for p in pairs}) == len(pairs)
    outcomes = torch.rand(len(pairs), generator=torch.Generator().manual_seed(0))
    assert float(win_rates(pairs, outcomes, size).sum()) == pytest.approx(size / 2, abs=1e-5)


def test_an_odd_number_of_opponents_in_an_odd_group_is_refused():
    with pytest.raises(ValueError, match="opponents: got 3 in a group of 7, expected an even number"):
        drawn_pairs(7, 3, torch.Generator())


# Strengths


def test_win_rates_by_hand():
    rates = win_rates([(0, 1), (2, 0), (1, 2)], torch.tensor([1.0, 0.0, 0.5]), 4)
    assert rates.tolist() == [1.0, 0.25, 0.25, 0.5]  # the last met nobody


def test_bradley_terry_is_the_maximum_of_its_likelihood():
    generator = torch.Generator().manual_seed(0)
    pairs = [(i, j) for i in range(6) for j in range(6) if i != j]
    outcomes, prior = torch.rand(len(pairs), generator=generator), 0.5
    ends = [end.tolist() for end in torch.tensor(pairs).T]
    fitted = bradley_terry(*ends, outcomes.tolist(), 6, prior=math.inf, virtual_games=prior)
    strengths = torch.tensor(fitted.values).requires_grad_()
    first, second = torch.tensor(pairs).T
    odds = strengths[first] - strengths[second]
    fit = torch.nn.functional.logsigmoid
    likelihood = (outcomes * fit(odds) + (1 - outcomes) * fit(-odds)).sum()
    likelihood = likelihood + prior * (fit(strengths) + fit(-strengths)).sum()
    (gradient,) = torch.autograd.grad(likelihood, strengths)
    assert gradient.abs().max() < 1e-5


def test_bradley_terry_of_two_is_the_log_odds_of_their_wins():
    strengths = bradley_terry([0] * 4, [1] * 4, [1.0, 1.0, 1.0, 0.0], 2, prior=math.inf).values
    assert strengths[0] - strengths[1] == pytest.approx(math.log(3), abs=1e-6)
    assert strengths.sum() == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="prior: got inf where somebody won or lost all"):
        bradley_terry([0], [1], [1.0], 2, prior=math.inf)
    assert np.isfinite(bradley_terry([0], [1], [1.0], 2, prior=math.inf, virtual_games=0.5).values).all()


# The reward


def test_win_rates_are_those_of_the_definition_and_sum_to_half_of_each_group():
    values, groups = [0.1, 0.9, 0.5, 0.15, 0.4, 0.42, 0.41], [5, 2, 5, 5, 2, 5, 2]
    result = score(
        WinRate(brightness_judge, batch_size=4), shades(*values), ["p"] * 7, {"group_ids": torch.tensor(groups)}
    )
    torch.testing.assert_close(result.total, torch.tensor(loop_win_rates(values, brightness_judge, groups)))
    for group in (2, 5):
        members = torch.tensor(groups) == group
        assert float(result.total[members].sum()) == pytest.approx(int(members.sum()) / 2, abs=1e-6)
    bias = result.outputs["win_rate"].criteria["bias"]
    torch.testing.assert_close(bias, torch.full((7,), BIAS), atol=1e-5, rtol=0)
    assert result.outputs["win_rate"].criteria["consistency"].tolist()[-1] == 0.5  # beaten by 0.9; 0.4 is too near


@pytest.mark.parametrize(
    "options", [{}, {"opponents": 2}, {"swap": False, "outcome": "soft"}, {"strength": "bradley_terry"}]
)
def test_groups_may_be_interleaved(options):
    """Each group's members keep their order; the groups' rows are mixed among each other."""
    images = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    reward, ids = WinRate(brightness_judge, **options), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    order = torch.tensor([4, 0, 1, 5, 6, 2, 7, 3])
    apart = score(reward, images, ["p"] * 8, {"group_ids": ids}).total
    mixed = score(reward, images[order], ["p"] * 8, {"group_ids": ids[order]}).total
    torch.testing.assert_close(mixed, apart[order], atol=1e-6, rtol=0)


def test_the_order_of_a_group_does_not_matter_with_all_pairs():
    images = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    order = torch.tensor([3, 0, 4, 1, 2])
    reward = WinRate(brightness_judge)
    assert torch.equal(score(reward, images[order], ["p"] * 5).total, score(reward, images, ["p"] * 5).total[order])


@pytest.mark.parametrize("options", [{}, {"outcome": "soft"}, {"strength": "bradley_terry"}])
def test_a_group_of_equals_gets_equal_scores_so_no_advantage(options):
    reward = WinRate(lambda first, second, prompts, context=None: torch.zeros(len(first)), **options)
    scores = score(reward, torch.rand(4, 3, 8, 8), ["p"] * 4).total
    assert scores.tolist() == [0.0 if "strength" in options else 0.5] * 4


def test_soft_outcomes_add_up_probabilities():
    values = [0.2, 0.25, 0.3]
    scores = score(WinRate(brightness_judge, outcome="soft"), shades(*values), ["p"] * 3).total
    logistic = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    p = [[(logistic(10 * (a - b) + BIAS) + 1 - logistic(10 * (b - a) + BIAS)) / 2 for b in values] for a in values]
    expected = [sum(p[i][j] for j in range(3) if j != i) / 2 for i in range(3)]
    torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-6, rtol=0)


def test_a_missing_verdict_is_a_tie_and_a_sample_without_any_is_invalid():
    def shy(first, second, prompts, context=None):
        """Says nothing of black pictures, nor of the brightest against the grey one."""
        a, b = first.flatten(1).mean(1), second.flatten(1).mean(1)
        silent = (a == 0) | (b == 0) | ((a + b - 1.4).abs() < 1e-6)
        return torch.where(silent, math.nan, a - b)

    output = WinRate(shy)(shades(0.0, 0.5, 0.9, 0.2), ["p"] * 4)
    assert output.valid.tolist() == [False, True, True, True]
    torch.testing.assert_close(output.scores[1:], torch.tensor([2 / 3, 2 / 3, 1 / 6]))
    assert output.criteria["consistency"].nan_to_num(-1).tolist() == [-1, 1, 1, 1]


def test_a_judge_that_always_fails_stops_the_run():
    reward = WinRate(lambda first, second, prompts, context=None: torch.full((len(first),), math.nan))
    with pytest.raises(RewardError, match="reward 'win_rate': none of 3 samples could be scored"):
        score(reward, torch.rand(3, 3, 8, 8), ["p"] * 3)


def test_references_stand_in_for_the_group():
    references = [[shades(0.3)[0], shades(0.6)[0]], [shades(0.5)[0]]]
    context = {"references": references, "group_ids": torch.tensor([0, 0])}
    reward = WinRate(brightness_judge, references=True)
    assert score(reward, shades(0.45, 0.9), ["one", "two"], context).total.tolist() == [0.5, 1.0]
    with pytest.raises(RewardError, match="expected .*'references'"):
        score(reward, shades(0.4), ["one"])
    with pytest.raises(RewardError, match=r"got a reference of shape \(3, 4, 4\), expected \(3, 8, 8\)"):
        score(reward, shades(0.4), ["one"], {"references": [[torch.zeros(3, 4, 4)]]})


def test_a_pair_gets_the_context_and_prompt_of_its_own_samples():
    def careful(first, second, prompts, context=None):
        assert [m["prompt"] for m in context["metadata"]] == list(prompts) and context["fps"] == 8
        return torch.zeros(len(first))

    ids, prompts = torch.tensor([0, 1, 0, 1]), ["a", "b", "a", "b"]
    context = {"group_ids": ids, "metadata": [{"prompt": p} for p in prompts], "fps": 8}
    score(WinRate(careful, batch_size=1), torch.rand(4, 3, 8, 8), prompts, context)
    with pytest.raises(RewardError, match="different prompts in one group"):
        score(WinRate(careful), torch.rand(4, 3, 8, 8), prompts)


def test_a_group_of_one_gets_a_half():
    assert score(WinRate(brightness_judge), shades(0.4), ["p"]).total.tolist() == [0.5]


@pytest.mark.parametrize("options", [{}, {"references": True}, {"outcome": "soft"}, {"batch_size": 2}])
def test_a_judge_that_scores_sees_each_picture_once_and_decides_as_if_asked_pair_by_pair(options):
    seen = []

    def brightness(images, prompts):
        seen.extend(prompts)
        return images.flatten(1).mean(1) + torch.tensor([float(p) for p in prompts])

    def compare(first, second, prompts, context=None):
        return first.flatten(1).mean(1) - second.flatten(1).mean(1)

    prompts = ["1", "2", "1", "2", "1"]
    references = [[shades(0.3)[0], shades(0.6)[0]], [shades(0.5)[0]], [shades(0.2)[0]], [shades(0.9)[0]], []]
    context = {"group_ids": torch.tensor([0, 1, 0, 1, 0]), "references": references}
    pictures = shades(0.1, 0.7, 0.5, 0.7, 0.4)
    once, pairwise = (score(WinRate(judge, **options), pictures, prompts, context) for judge in (brightness, compare))
    assert torch.equal(once.total, pairwise.total)
    assert len(seen) == 5 + (5 if options.get("references") else 0)


# Judges from specs


def test_a_judge_is_a_function_a_file_a_reward_or_what_a_reward_compares_with(tmp_path):
    path = tmp_path / "judges.py"
    path.write_text(
        "def darker(first, second, prompts, context=None):\n"
        "    return second.flatten(1).mean(1) - first.flatten(1).mean(1)\n\n\n"
        "class Judge:\n"
        "    def __init__(self, sign=1.0):\n        self.sign = sign\n\n"
        "    def compare(self, first, second, prompts, context=None):\n"
        "        return self.sign * (first.flatten(1).mean(1) - second.flatten(1).mean(1))\n\n\n"
        "def brightness(images):\n    return images.flatten(1).mean(1)\n"
    )
    first, second = shades(0.9, 0.1), shades(0.5, 0.5)
    lighter = torch.tensor([0.4, -0.4])
    specs = {f"{path}:darker": -1, f"{path}:Judge": 1, f"{path}:brightness": 1}
    for judge, sign in [*specs.items(), (lambda images: images.flatten(1).mean(1), 1)]:
        torch.testing.assert_close(make_judge(judge)(first, second, ["p", "p"], None), sign * lighter)
    signed = make_judge({"name": f"{path}:Judge", "sign": -1.0})
    torch.testing.assert_close(signed(first, second, ["p", "p"]), -lighter)
    reward = make_reward({"name": "win_rate", "judge": f"{path}:darker"})
    assert score(reward, shades(0.9, 0.1), ["p", "p"]).total.tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    "options, says",
    [
        ({"judge": "nobody"}, "spec: got 'nobody'"),
        ({"judge": "gold", "outcome": "firm"}, "outcome: got 'firm', expected one of"),
        ({"judge": "gold", "strength": "elo"}, "strength: got 'elo', expected one of"),
        ({"judge": "gold", "opponents": 0}, "opponents: got 0, expected >= 1"),
        ({"judge": "gold", "opponents": 2, "references": True}, "expected none together with references"),
        ({"judge": "gold", "batch_size": 0}, "batch_size: got 0"),
        ({}, "missing a required argument: 'judge'"),
    ],
)
def test_options_that_cannot_work_are_refused_before_anything_loads(options, says):
    with pytest.raises(ValueError, match=says):
        parse_spec("win_rate", **options)


def test_all_pairs_of_three_go_round_and_verdicts_pass_no_gradient():
    assert all_pairs(3) == [(0, 1), (2, 0), (1, 2)]
    images = shades(0.2, 0.6).requires_grad_()
    verdicts = ask_both(brightness_judge, images[:1], images[1:], ["a"])
    assert not verdicts.forward.requires_grad


def test_as_many_opponents_as_there_are_is_every_pair_once():
    for size in (4, 5):
        for opponents in (size - 1, size, size + 1):
            assert drawn_pairs(size, opponents, torch.Generator().manual_seed(0)) == all_pairs(size)
    assert len(drawn_pairs(6, 4, torch.Generator().manual_seed(0))) == 12  # of 15
