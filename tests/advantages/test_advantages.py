"""Group-relative advantages: known values and invariances."""

import pytest
import torch

from visalign.advantages.group import clip_advantages, group_advantages, group_statistics
from visalign.advantages.own import check_advantages, own_advantages

REWARDS = torch.tensor([1.0, 2.0, 3.0, 0.0, 0.0, 1.0])
GROUPS = torch.tensor([4, 4, 4, 2, 2, 2])


def random_rewards(groups=5, size=6, seed=0):
    rewards = torch.randn(groups * size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rewards, torch.arange(groups).repeat_interleave(size)


@pytest.mark.parametrize(
    ("std", "expected"),
    [
        ("global", [-0.93695, 0, 0.93695, -0.31232, -0.31232, 0.62464]),
        ("group", [-1.22459, 0, 1.22459, -0.70696, -0.70696, 1.41391]),
    ],
)
def test_advantages_at_known_values(std, expected):
    advantages = group_advantages(REWARDS, GROUPS, std=std, mode="add", eps=1e-4)
    assert advantages.dtype == torch.float32
    torch.testing.assert_close(advantages, torch.tensor(expected), atol=6e-6, rtol=0)


def test_the_floor_of_the_std_is_a_maximum_or_an_addition():
    rewards, groups = torch.tensor([0.0, 2.0]), torch.tensor([0, 0])  # std 1
    assert group_advantages(rewards, groups, eps=0.5, mode="max").tolist() == [-1.0, 1.0]
    assert group_advantages(rewards, groups, eps=3.0, mode="max").tolist() == pytest.approx([-1 / 3, 1 / 3])
    assert group_advantages(rewards, groups, eps=1.0, mode="add").tolist() == [-0.5, 0.5]


def test_ddof_one_divides_by_one_less():
    torch.testing.assert_close(
        group_advantages(REWARDS, GROUPS, ddof=1, eps=1e-12)[:3], torch.tensor([-1.0, 0.0, 1.0]), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("std", ["group", "global"])
def test_a_group_of_equal_rewards_gives_exactly_zero(std):
    rewards, groups = torch.tensor([0.1] * 7 + [0.3, 0.9]), torch.tensor([0] * 7 + [1, 1])
    advantages = group_advantages(rewards, groups, std=std, mode="add", eps=1e-18)
    assert (advantages[:7] == 0).all() and (advantages[7:] != 0).all()
    assert (group_advantages(rewards[:7], groups[:7], std=std, mode="add", eps=1e-18) == 0).all()


@pytest.mark.parametrize("std", ["group", "global"])
@pytest.mark.parametrize("ddof", [0, 1])
def test_a_group_of_one_gives_zero(std, ddof):
    assert group_advantages(torch.tensor([3.0, 1.0]), torch.tensor([0, 1]), std=std, ddof=ddof).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("std", ["group", "global"])
def test_advantages_of_a_group_sum_to_zero(std):
    rewards, groups = random_rewards()
    advantages = group_advantages(rewards, groups, std=std).double()
    sums = torch.zeros(5, dtype=torch.float64).index_add(0, groups, advantages)
    assert advantages.abs().max() > 0.5
    torch.testing.assert_close(sums, torch.zeros(5, dtype=torch.float64), atol=1e-6, rtol=0)


def test_a_constant_added_to_one_group_changes_nothing_with_group_std():
    rewards, groups = random_rewards()
    shifted = rewards + 10.0 * (groups == 2)
    torch.testing.assert_close(group_advantages(shifted, groups), group_advantages(rewards, groups))


@pytest.mark.parametrize("std", ["group", "global"])
def test_a_positive_factor_on_all_rewards_changes_nothing(std):
    rewards, groups = random_rewards()
    expected = group_advantages(rewards, groups, std=std)
    torch.testing.assert_close(group_advantages(7.0 * rewards, groups, std=std), expected)


def test_a_factor_on_one_group_changes_nothing_with_group_std_and_something_with_global():
    rewards, groups = random_rewards()
    scaled = torch.where(groups == 1, 5 * rewards, rewards)
    torch.testing.assert_close(group_advantages(scaled, groups), group_advantages(rewards, groups))
    difference = group_advantages(scaled, groups, std="global") - group_advantages(rewards, groups, std="global")
    assert difference.abs().max() > 0.1


def test_order_of_samples_and_names_of_groups_do_not_matter():
    rewards, groups = random_rewards()
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(1))
    renamed = 2**53 + 1 + 3 * groups  # beyond what floats tell apart
    expected = group_advantages(rewards, groups)[order]
    torch.testing.assert_close(group_advantages(rewards[order], renamed[order]), expected)


def test_integer_rewards_are_not_rounded():
    whole = group_advantages(REWARDS.long(), GROUPS)
    assert torch.equal(whole, group_advantages(REWARDS, GROUPS))


def test_small_differences_of_large_rewards_survive():
    rewards = torch.tensor([1e8, 1e8 + 1.0], dtype=torch.float64)
    assert group_advantages(rewards, torch.tensor([0, 0])).tolist() == [-1.0, 1.0]


def test_group_statistics_at_known_values():
    rewards = torch.cat([REWARDS, torch.tensor([0.1, 0.1, 0.1])])
    statistics = group_statistics(rewards, torch.cat([GROUPS, torch.tensor([9, 9, 9])]))
    assert statistics.group_ids.tolist() == [2, 4, 9] and statistics.sizes.tolist() == [3, 3, 3]
    torch.testing.assert_close(statistics.means, torch.tensor([1 / 3, 2.0, 0.1], dtype=torch.float64))
    torch.testing.assert_close(statistics.stds[:2], torch.tensor([2 / 9, 2 / 3], dtype=torch.float64).sqrt())
    assert statistics.stds[2] == 0
    assert statistics.zero_std_fraction == pytest.approx(1 / 3)


def test_clip_advantages_clamps_both_sides():
    assert clip_advantages(torch.tensor([-7.0, 0.5, 6.0]), 5.0).tolist() == [-5.0, 0.5, 5.0]
    with pytest.raises(ValueError, match="limit: got 0"):
        clip_advantages(REWARDS, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"group_ids": GROUPS[:3]}, r"group_ids: got shape \(3,\), expected \(6,\)"),
        ({"group_ids": GROUPS.float()}, "group_ids: got torch.float32, expected an integer type"),
        ({"rewards": REWARDS / 0}, "rewards: got 6 not finite"),
        ({"std": "batch"}, "std: got 'batch'"),
        ({"mode": "plus"}, "mode: got 'plus'"),
        ({"ddof": 2}, "ddof: got 2"),
        ({"eps": 0}, "eps: got 0"),
    ],
)
def test_bad_arguments_are_rejected(arguments, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(**{"rewards": REWARDS, "group_ids": GROUPS} | arguments)


def test_equal_rewards_give_exactly_zero_whatever_their_value():
    for value in torch.linspace(0.01, 0.99, 50, dtype=torch.float64).tolist():
        rewards = torch.tensor([value] * 3 + [0.0, 1.0, 0.5], dtype=torch.float64)
        for std in ("group", "global"):
            advantages = group_advantages(rewards, torch.tensor([0, 0, 0, 1, 1, 1]), std=std)
            assert advantages[:3].tolist() == [0.0, 0.0, 0.0]  # a rounded mean would leave 1e-13 after the floor


@pytest.mark.parametrize("value", [0.1, -0.1])
def test_equal_rewards_are_told_on_either_side_of_0(value):
    rewards = torch.tensor([value] * 7, dtype=torch.float64)
    assert group_statistics(rewards, torch.zeros(7, dtype=torch.int64)).zero_std_fraction == 1


def test_a_pair_with_ddof_one_is_a_root_of_two_apart():
    advantages = group_advantages(torch.tensor([0.0, 2.0]), torch.tensor([0, 0]), ddof=1)
    torch.testing.assert_close(advantages, torch.tensor([-1.0, 1.0]) / 2**0.5)


def test_no_gradient_passes_to_the_rewards():
    rewards = torch.tensor([1.0, 2.0], requires_grad=True)
    assert not group_advantages(rewards, torch.tensor([0, 0])).requires_grad


def test_a_functions_location_is_checked_and_the_groups_own_advantages_take_a_std(tmp_path):
    (tmp_path / "mine.py").write_text("def centred(rewards, group_ids):\n    return rewards - rewards.mean()\n")
    mine = f"{tmp_path / 'mine.py'}:centred"
    check_advantages("group", "global")  # the std is theirs
    check_advantages(mine, None)
    with pytest.raises(ValueError, match="advantages: got 'mine', expected 'group'"):
        check_advantages("mine", None)
    with pytest.raises(ValueError, match="advantage_std: got 'global' with advantages"):
        check_advantages(mine, "global")
    rewards = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
    assert own_advantages(mine, rewards, torch.zeros(3, dtype=torch.int64)).tolist() == [-2, -1, 3]
