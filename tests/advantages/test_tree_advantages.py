"""From leaves' rewards to edges' advantages: known answers and the sums that must be 0."""

import pytest
import torch

from visalign.advantages.tree import (
    depth_advantages,
    history_scores,
    keep_leaves,
    keep_transitions,
    node_means,
    progressive_steps,
    pruned_depths,
    select_branches,
    tree_backup,
)


def random(n, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_node_is_worth_the_mean_of_its_leaves():
    rewards = torch.tensor([1.0, 2.0, 3.0, 6.0])
    assert node_means(rewards, torch.tensor([0, 0, 1, 1]), 2).tolist() == [1.5, 4.5]
    assert node_means(rewards, torch.tensor([0, 0, 0, 0]), 1).tolist() == [3.0]
    assert node_means(rewards, torch.arange(4), 4).tolist() == rewards.tolist()
    assert node_means(rewards, torch.tensor([0, 1, 1, 1]), 2).tolist() == pytest.approx([1, 11 / 3])


def test_advantages_of_a_depth_sum_to_0_in_each_tree_with_ddof_1():
    values, trees = random(8), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    advantages = depth_advantages(values, trees)
    assert advantages.view(2, 4).sum(1).abs().max() < 1e-5
    torch.testing.assert_close(advantages.view(2, 4).std(1, correction=1), torch.ones(2), atol=1e-5, rtol=0)


def test_a_node_alone_at_its_depth_and_equal_leaves_have_no_advantage():
    assert depth_advantages(torch.tensor([0.3, 0.9]), torch.tensor([0, 1])).tolist() == [0, 0]
    assert depth_advantages(torch.full((4,), 0.1), torch.tensor([0, 0, 1, 1])).tolist() == [0] * 4
    nearly = torch.tensor([0.1, 0.1 + 1e-8], dtype=torch.float64)
    assert depth_advantages(nearly, torch.tensor([0, 0])).tolist() == [0, 0]
    assert depth_advantages(nearly, torch.tensor([0, 0]), least_std=1e-12).abs().min() > 0.1


def test_of_each_last_split_the_better_half_or_the_extremes_are_kept():
    rewards = torch.tensor([1.0, 3.0, 2.0, 0.0, 5.0, 5.0, 4.0])
    branches = torch.tensor([0, 0, 0, 0, 2, 2, 7])
    half, extremes = (keep_leaves(rewards, branches, mode).tolist() for mode in ("half", "extreme"))
    assert half == [False, True, True, False, True, False, True]  # the first of equals; one alone is kept
    assert extremes == [False, True, False, True, True, False, True]
    some = keep_leaves(rewards, branches, "half", torch.tensor([1, 0, 1, 1, 1, 1, 0]).bool()).tolist()
    assert some == [False, False, True, False, True, False, False]  # of what could be scored
    with pytest.raises(ValueError, match="mode: got 'best', expected 'half' or 'extreme'"):
        keep_leaves(rewards, branches, "best")


def test_the_window_of_pruned_depths_moves_from_the_leaves_towards_the_noise_and_stays_at_the_last_split():
    """As the code: depths d - min(step // interval, first - stop). Four of 20 deep, the last split at 9."""
    windows = [list(pruned_depths(step, 4, 30, 20, 9)) for step in (0, 29, 30, 60, 240, 900)]
    assert windows == [
        [17, 18, 19, 20],
        [17, 18, 19, 20],
        [16, 17, 18, 19],
        [15, 16, 17, 18],
        [9, 10, 11, 12],
        [9, 10, 11, 12],
    ]
    assert list(pruned_depths(5, 0, 30, 9, 2)) == [] and list(pruned_depths(0, 20, 30, 3, 2)) == [1, 2, 3]
    assert list(pruned_depths(900, 2, 30, 10, 0)) == [1, 2]  # depth 0 has no edge
    assert list(pruned_depths(900, 2, 30, 4, 4)) == [3, 4]  # a split so late moves it nowhere


def test_of_the_transitions_after_the_last_split_each_branchs_better_half_or_each_trees_outer_half_stays():
    """Two trees of two branches, two and three transitions a branch."""
    advantages = torch.tensor([0.5, -0.5, 0.1, 0.2, 0.3, -1.0, 1.0, 0.0, 0.0, 2.0])
    branches = torch.tensor([0, 0, 1, 1, 1, 2, 2, 3, 3, 3])
    trees = torch.tensor([0] * 5 + [1] * 5)
    half = keep_transitions(advantages, branches, trees, "half").nonzero().flatten().tolist()
    assert half == [0, 4, 6, 9]
    extremes = keep_transitions(advantages, branches, trees, "extremes").nonzero().flatten().tolist()
    assert extremes == [0, 1, 5, 9]  # of five: two, the largest and the smallest
    six = keep_transitions(torch.arange(6.0), torch.zeros(6), torch.zeros(6), "extremes")
    assert six.tolist() == [True, True, False, False, False, True]  # of three the odd one is of the smallest
    assert keep_transitions(torch.ones(1), torch.zeros(1), torch.zeros(1), "extremes").tolist() == [True]
    with pytest.raises(ValueError, match="mode: got 'none'"):
        keep_transitions(advantages, branches, trees, "none")


def test_softmax_backup_of_two_children_is_the_known_number_and_weights_sum_to_1():
    advantages, log_probs = torch.tensor([1.0, -0.2]), torch.tensor([-1.0, -1.2])
    parents = torch.tensor([0, 0])
    torch.testing.assert_close(
        tree_backup(advantages, log_probs, parents, 1, "softmax"), torch.tensor([0.4598]), atol=5e-5, rtol=0
    )
    assert tree_backup(advantages, log_probs, parents, 1, "uniform").item() == pytest.approx(0.4)
    ones = tree_backup(torch.ones(6), random(6).float() * 50, torch.tensor([0, 0, 0, 1, 1, 2]), 3, "softmax")
    torch.testing.assert_close(ones, torch.ones(3))
    far = tree_backup(advantages, torch.tensor([-1e4, -1e4 - 0.2]), parents, 1, "softmax")
    assert far.item() == pytest.approx(0.4598, abs=1e-3), "no underflow"


def test_uniform_backup_gives_the_mean_of_the_leaves_and_first_edges_that_sum_to_0():
    leaves = random(8) - random(8).mean()
    second = tree_backup(leaves, leaves, torch.arange(8) // 2, 4, "uniform")
    first = tree_backup(second, second, torch.arange(4) // 2, 2, "uniform")
    torch.testing.assert_close(first, leaves.view(2, 4).mean(1))
    assert abs(first.sum().item()) < 1e-12


def test_trained_steps_grow_from_the_first_to_the_last_number():
    counts = [progressive_steps(stage, 14, 20, 100) for stage in range(130)]
    assert counts[0] == 14 and counts[99] == 20 and counts == sorted(counts) and counts[-1] == 20
    assert [counts.count(n) for n in range(14, 20)] == [15, 14, 14, 15, 14, 14]
    assert progressive_steps(50, 3, 3, 10) == 3


def test_scores_are_normalised_with_what_came_before():
    rewards = torch.tensor([1.0, 2.0, 3.0])
    assert history_scores(rewards, torch.empty(0)).tolist() == pytest.approx([-1, 0, 1])
    every = torch.tensor([0.0, 4.0, 1.0, 2.0, 3.0])
    wanted = (rewards - every.mean()) / every.std()
    torch.testing.assert_close(history_scores(rewards, torch.tensor([0.0, 4.0])), wanted)
    assert history_scores(torch.full((3,), 0.1), torch.empty(0)).tolist() == [0, 0, 0]
    assert history_scores(torch.tensor([5.0]), torch.empty(0)).tolist() == [0]
    assert history_scores(torch.tensor([5.0]), torch.tensor([1.0, 2.0])).item() > 0


def test_of_each_branching_at_most_the_best_and_the_worst_are_kept_and_only_if_they_stand_out():
    branches = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
    scores = torch.tensor([0.5, 1.5, -0.6, 0.4, 0.1, -0.5, -2.0, -0.7, -0.6])
    assert select_branches(scores, branches).nonzero().flatten().tolist() == [1, 2, 6]
    assert select_branches(scores, branches, high=0.4, low=-0.4).nonzero().flatten().tolist() == [1, 2, 3, 5, 6]
    many = random(60).float()
    kept = select_branches(many, torch.arange(60) // 5)
    assert kept.view(12, 5).sum(1).max() <= 2 and kept.any()


def test_the_better_half_of_an_odd_branch_is_rounded_down():
    rewards = torch.tensor([1.0, 3.0, 2.0, 0.5, 0.7, 0.9, 0.8, 0.6])
    kept = keep_leaves(rewards, torch.tensor([0, 0, 0, 1, 1, 1, 1, 1]), "half")
    assert kept.nonzero().flatten().tolist() == [1, 5, 6]


def test_a_spread_of_exactly_the_least_is_enough():
    values, trees = torch.tensor([-1.0, 0.0, 1.0]), torch.zeros(3, dtype=torch.int64)  # std 1
    assert depth_advantages(values, trees, least_std=1.0).tolist() == pytest.approx([-1, 0, 1])
    assert depth_advantages(values, trees, least_std=1.1).tolist() == [0, 0, 0]


def test_a_window_as_long_as_the_tree_stays_at_the_start():
    assert list(pruned_depths(900, 3, 30, 3, 2)) == [1, 2, 3]


def test_no_gradient_passes_to_the_rewards():
    rewards = torch.tensor([1.0, 2.0], requires_grad=True)
    assert not node_means(rewards, torch.tensor([0, 0]), 1).requires_grad
    assert not history_scores(rewards, torch.empty(0)).requires_grad


def test_scores_of_two_rewards_of_equal_ones_and_of_a_tiny_spread():
    assert history_scores(torch.tensor([1.0, 3.0]), torch.empty(0)).tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5])
    for count in range(1, 12):
        equal = torch.full((count,), 0.1, dtype=torch.float64)
        assert history_scores(equal, torch.empty(0)).tolist() == [0.0] * count
    tiny = torch.tensor([0.0, 2e-8], dtype=torch.float64)
    assert history_scores(tiny, torch.empty(0))[1].item() == pytest.approx(1 / (2**0.5 + 1))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: node_means(torch.ones(3), torch.zeros(2, dtype=torch.int64), 1), "rewards, ancestors: got shapes"),
        (lambda: tree_backup(torch.ones(1), torch.ones(1), torch.tensor([0]), 1, "hard"), "weights: got 'hard'"),
        (lambda: progressive_steps(0, 3, 2, 10), "first, last: got 3, 2"),
        (lambda: progressive_steps(0, 1, 2, 0), "stage, stages: got 0, 0"),
        (lambda: select_branches(torch.ones(1), torch.tensor([0]), high=-1, low=1), "high, low: got -1, 1"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_what_was_not_scored_is_in_no_mean_of_a_depth_or_of_children():
    trees, valid = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([True, True, False, True, True])
    values = torch.tensor([1.0, 3.0, 99.0, 5.0, 5.0], dtype=torch.float64)
    advantages = depth_advantages(values, trees, valid=valid)
    assert advantages.tolist() == pytest.approx([-(2**-0.5), 2**-0.5, 0, 0, 0], abs=1e-6)
    assert depth_advantages(values, trees, valid=torch.zeros(5, dtype=torch.bool)).tolist() == [0] * 5
    children, parents = torch.tensor([1.0, 3.0, 99.0, 7.0]), torch.tensor([0, 0, 0, 1])
    known = torch.tensor([True, True, False, False])
    backed = tree_backup(children, torch.zeros(4), parents, 2, "uniform", known)
    assert backed.tolist() == [2.0, 0.0]  # the second node has no scored leaf below


def test_of_four_transitions_two_are_outer_ones():
    kept = keep_transitions(torch.tensor([4.0, 1.0, 3.0, 2.0]), torch.zeros(4), torch.zeros(4), "extremes")
    assert kept.tolist() == [True, True, False, False]
