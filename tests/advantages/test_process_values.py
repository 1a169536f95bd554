"""Values of steps: VGPO's sums, weights and advantages against known answers; TP-GRPO's turning points."""

import pytest
import torch

from visalign.advantages.group import group_advantages
from visalign.advantages.process_values import (
    dual_advantages,
    process_values,
    shift_rewards,
    temporal_weights,
    turning_point_rewards,
    turning_points,
)

IDS = torch.tensor([0, 0, 0, 1, 1, 1])


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_values_and_weights_of_four_steps_are_the_known_ones():
    values = process_values(torch.tensor([[0.2], [0.4], [0.6], [0.8]]), 0.5)
    torch.testing.assert_close(values.flatten(), torch.tensor([0.65, 0.9, 1.0, 0.8]).double(), atol=1e-7, rtol=0)
    weights = temporal_weights(values)
    wanted = torch.tensor([0.7761, 1.0746, 1.1940, 0.9552]).double()
    torch.testing.assert_close(weights.flatten(), wanted, atol=5e-5, rtol=0)


def test_the_limits_of_the_discount_are_the_instant_reward_and_the_sum_to_come():
    rewards = random(5, 6)
    assert torch.equal(process_values(rewards, 0), rewards)
    torch.testing.assert_close(process_values(rewards, 1)[1], rewards[1:].sum(0))


def test_weights_have_mean_1_over_steps_and_stay_within_the_limit():
    values = random(7, 4) + 0.1
    torch.testing.assert_close(temporal_weights(values).mean(0), torch.ones(4).double(), atol=1e-5, rtol=0)
    one = torch.zeros(10, 1, dtype=torch.float64)
    one[3] = 1.0  # 10 times the mean
    assert temporal_weights(one, limit=5.0).max() == 5 and temporal_weights(-one).min() >= 0
    assert temporal_weights(torch.zeros(3, 2)).abs().max() == 0  # no reward at all: finite


def test_constant_rewards_without_discount_give_flow_grpos_advantage_at_every_step():
    reward = random(6)
    values = process_values(reward.expand(4, 6), 0.0)
    assert torch.allclose(temporal_weights(values), torch.ones_like(values), atol=1e-4)
    for std in ("group", "global"):
        advantages = dual_advantages(values, IDS, std=std)
        assert torch.equal(advantages, group_advantages(reward, IDS, std=std).expand(4, 6))


def test_without_the_absolute_term_the_advantages_of_a_group_sum_to_0_at_every_step():
    advantages = dual_advantages(random(5, 6), IDS)
    assert advantages.view(5, 2, 3).sum(2).abs().max() < 1e-6 < advantages.abs().max()


def test_equal_values_leave_the_absolute_term_alone_and_only_for_the_first_steps():
    values = torch.full((6, 6), 0.3, dtype=torch.float64)
    assert dual_advantages(values, IDS).abs().max() == 0
    advantages = dual_advantages(values, IDS, absolute=2.0, horizon=4)
    torch.testing.assert_close(advantages[:4], torch.full((4, 6), 0.6))
    assert advantages[4:].abs().max() == 0


def test_the_absolute_term_is_the_limit_of_the_papers_form():
    """[(1 + k std) Q - mean] / std, for any std above eps."""
    values = random(3, 6)
    group = values.view(3, 2, 3)
    std, mean = group.std(2, correction=0, keepdim=True), group.mean(2, keepdim=True)
    wanted = ((1 + 0.5 * std) * group - mean) / std
    torch.testing.assert_close(dual_advantages(values, IDS, absolute=0.5).double().view(3, 2, 3), wanted)


def test_negative_rewards_are_shifted_by_the_running_minimum_and_others_left_alone():
    rewards, lowest = shift_rewards(torch.tensor([0.5, 2.0]), 0.0)
    assert rewards.tolist() == [0.5, 2.0] and lowest == 0
    rewards, lowest = shift_rewards(torch.tensor([-0.5, 2.0]), lowest)
    assert rewards.tolist() == [0.0, 2.5] and lowest == -0.5
    rewards, lowest = shift_rewards(torch.tensor([0.0, 1.0]), lowest)
    assert rewards.tolist() == [0.5, 1.5] and lowest == -0.5


def test_increments_telescope_and_no_change_in_all_has_no_turning_point():
    rewards = random(6, 5)
    steps, _ = turning_points(rewards)
    torch.testing.assert_close(steps.sum(0), rewards[-1] - rewards[0])
    rewards[-1] = rewards[0]
    assert not turning_points(rewards)[1].any()


def test_turning_points_are_the_first_steps_along_after_one_against():
    rewards = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.5, 0.4], [2.0, -1.0], [3.0, -2.0]])
    steps, turning = turning_points(rewards)
    assert turning[:, 0].tolist() == [True, False, True, False]  # up, down, up, up, in all up
    assert turning[:, 1].tolist() == [False, True, False, False]  # up, down, down, down, in all down
    credit = turning_point_rewards(rewards, bonus=2.0)
    assert credit[:, 0].tolist() == [3 + 2 * 1, 3, 3 + 2 * 1.5, 3]
    torch.testing.assert_close(credit[:, 1], torch.tensor([-2, -2 - 1.2, -2, -2]).double())
    assert torch.equal(steps[0], rewards[1].double())


def test_a_step_without_change_is_neither_with_the_trajectory_nor_against_it():
    steps, turning = turning_points(torch.tensor([[5.0, 5.0], [6.0, 5.0], [6.0, 6.0], [7.0, 7.0]]))
    assert steps.T.tolist() == [[1, 0, 1], [0, 1, 1]]
    assert turning.T.tolist() == [[True, False, False], [False, False, False]]


def test_credit_does_not_depend_on_where_rewards_start():
    rewards = random(5, 3)
    torch.testing.assert_close(turning_point_rewards(rewards + 7), turning_point_rewards(rewards))


def test_one_step_alone_is_its_own_value():
    assert process_values(torch.tensor([[0.3, 0.6]]), 0.9).tolist() == [pytest.approx([0.3, 0.6])]


def test_weights_of_rewards_of_both_signs_are_cut_at_0_and_eps_is_added():
    assert temporal_weights(torch.tensor([[-1.0], [3.0]])).flatten().tolist() == pytest.approx([0, 3])
    assert temporal_weights(torch.ones(2, 1), eps=1.0).flatten().tolist() == [0.5, 0.5]


def test_rewards_that_never_were_negative_are_left_whatever_the_minimum_so_far():
    assert shift_rewards(torch.tensor([3.0]), 2.0) == (torch.tensor([3.0]), 0.0)


def test_no_gradient_passes_to_the_rewards():
    rewards = random(3, 2).requires_grad_()
    for result in (process_values(rewards, 0.5), turning_points(rewards)[0], turning_point_rewards(rewards)):
        assert not result.requires_grad


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: process_values(torch.ones(3), 0.9), "instant_rewards: got shape"),
        (lambda: process_values(torch.tensor([[float("nan")]]), 0.9), "instant_rewards: got 1 not finite"),
        (lambda: process_values(torch.ones(3, 2), 1.1), "discount: got 1.1"),
        (lambda: temporal_weights(torch.ones(3, 2), limit=0.5), "limit: got 0.5"),
        (lambda: temporal_weights(torch.ones(3, 2), eps=0), "eps: got 0"),
        (lambda: dual_advantages(torch.ones(3, 6), IDS, absolute=-1), "absolute: got -1"),
        (lambda: dual_advantages(torch.ones(3, 6), IDS, horizon=-1), "horizon: got -1"),
        (lambda: turning_points(torch.ones(1, 2)), "rewards: got 1 rows"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
