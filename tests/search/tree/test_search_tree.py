"""The tree's pure parts: backup, widening, selection, draws, other tilts and rewards, its picture."""

import math

import numpy as np
import pytest
import torch

from visalign.search import snis_weights
from visalign.search.tree.picture import draw_tree, shown_leaves
from visalign.search.tree.reading import best_leaf, draw_leaves, greedy_leaf, health, leaf_law, reweighted
from visalign.search.tree.rules import Rules, boltzmann, soft_backup, uct, widening_bound
from visalign.search.tree.tree import Tree

NESTED = [[0.3, 1.2, -0.5], [2.0], [0.9, 0.1]]


def two_levels(branches=NESTED, **rules) -> Tree:
    """A node below the root for each list, a leaf for each reward in it."""
    tree = Tree(Rules(2, (1,), **rules))
    for rewards in branches:
        node = None
        for reward in rewards:
            rollout = len(tree.leaf)
            node = tree.add(0, rollout) if node is None else node
            tree.score(tree.add(node, rollout), reward)
    return tree


def test_the_backup_has_its_known_values_and_limits():
    assert soft_backup(np.array([0.0, math.log(3)]), 1.0) == pytest.approx(math.log(2), abs=1e-15)
    weighted = soft_backup(np.array([0.0, math.log(2)]), 2.0, np.log([3.0, 0.5]))
    assert weighted == pytest.approx(0.5 * math.log((3 + 0.5 * 4) / 2), abs=1e-15)
    values = np.array([0.3, 1.2, -0.5])
    for tilt in (0, 1e-9, 0.5, 30.0, 1e6, math.inf):
        for n in (1, 2, 7):
            assert soft_backup(np.full(n, -1.7), tilt) == pytest.approx(-1.7, abs=1e-12)
        assert soft_backup(values + 100, tilt) == pytest.approx(soft_backup(values, tilt) + 100, abs=1e-11)
    assert soft_backup(values, 0) == pytest.approx(1 / 3)
    # mean + tilt / 2 variance to first order: the limit is approached, not lost in rounding
    for tilt in (1e-3, 1e-6, 1e-12):
        assert soft_backup(values, tilt) - 1 / 3 == pytest.approx(tilt / 2 * values.var(), rel=1e-3, abs=2e-16)
    assert soft_backup(values, 1e5) == pytest.approx(1.2, abs=2e-5) and soft_backup(values, math.inf) == 1.2
    curve = [soft_backup(values, tilt) for tilt in (0, 0.01, 0.1, 1, 10, 100, math.inf)]
    assert all(after > before for before, after in zip(curve, curve[1:]))


def test_children_are_chosen_by_their_known_shares():
    values = np.array([0.0, math.log(2), math.log(5)])
    np.testing.assert_allclose(boltzmann(values, 1.0), [1 / 8, 2 / 8, 5 / 8])
    np.testing.assert_allclose(boltzmann(values, 2.0), np.array([1, 4, 25]) / 30)
    np.testing.assert_allclose(boltzmann(values, 1.0, np.log([5, 2, 1])), [5 / 14, 4 / 14, 5 / 14])
    np.testing.assert_allclose(boltzmann(values, 0.0), [1 / 3] * 3)
    np.testing.assert_allclose(boltzmann(np.array([1.0, 3.0, 3.0]), math.inf), [0, 0.5, 0.5])
    assert boltzmann(np.array([0.0, 1e5]), 1.0).tolist() == [0, 1]
    scores = uct(np.array([1.0, 2.0]), np.array([4, 16]), math.e**4, 3.0)
    np.testing.assert_allclose(scores, [1 + 3, 2 + 1.5])


@pytest.mark.parametrize(
    "widening, exponent, first", [(2, 0.8, 36), (2, 0.7, 13), (2, 0.5, 5), (1, 0.8, 4), (1, 0.7, 3), (1, 0.5, 2)]
)
def test_the_bound_gives_the_root_phase_its_length(widening, exponent, first):
    visits = 1  # as many children as visits less one, while the root alone is expanded
    while visits - 1 < widening_bound(visits, widening, exponent):
        visits += 1
    assert visits - 1 == first


def test_the_law_of_draws_is_that_of_the_descent_by_hand():
    tilt, tree = 0.7, two_levels(tilt=0.7)
    values = [math.log(np.mean(np.exp(tilt * np.array(branch)))) / tilt for branch in NESTED]
    assert tree.value[0] == pytest.approx(math.log(np.mean(np.exp(tilt * np.array(values)))) / tilt)
    expected = []
    for branch, value in zip(NESTED, values):
        share = math.exp(tilt * value) / sum(math.exp(tilt * v) for v in values)
        expected += [share * math.exp(tilt * r) / sum(math.exp(tilt * s) for s in branch) for r in branch]
    np.testing.assert_allclose(leaf_law(tree), expected)
    count = 20_000
    drawn = draw_leaves(tree, count, torch.Generator().manual_seed(0))
    for leaf, p in zip(tree.leaves, expected):
        assert drawn.count(leaf) / count == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / count))


def test_a_flat_tree_draws_by_importance_weights():
    rewards, tree = [0.3, -2.0, 1.5, 0.7], Tree(Rules(1, tilt=3.0))
    for k, reward in enumerate(rewards):
        tree.score(tree.add(0, k), reward)
    np.testing.assert_allclose(leaf_law(tree), snis_weights(rewards, 3.0).numpy(), rtol=1e-14)


def test_weighted_leaves_are_drawn_by_weight_and_reward():
    tree = Tree(Rules(1, tilt=2.0))
    for k, reward in enumerate([0.0, 1.0, 0.5]):
        tree.score(tree.add(0, k), reward)
    tree.log_weight[tree.leaves] = np.log([4.0, 1.0, 0.5])
    tree.back_up()
    shares = np.array([4, math.e**2, 0.5 * math.e])
    np.testing.assert_allclose(leaf_law(tree), shares / shares.sum())
    assert tree.value[0] == pytest.approx(math.log(shares.mean()) / 2)


def test_a_constant_added_to_rewards_shifts_values_and_leaves_draws():
    tree = two_levels(tilt=2.0)
    moved = reweighted(tree, rewards=tree.rewards + 5)
    inner = [n for n in range(tree.size) if not tree.is_leaf(n)]
    np.testing.assert_allclose(moved.value[inner], tree.value[inner] + 5)
    np.testing.assert_allclose(leaf_law(moved), leaf_law(tree))


@pytest.mark.parametrize("tilt", [0.0, 3.0, math.inf])
def test_a_tree_under_another_tilt_or_reward_is_the_one_grown_with_it(tilt):
    tree = two_levels()
    before = tree.value.copy()
    squares = [[r * r for r in branch] for branch in NESTED]
    other, expected = reweighted(tree, tilt=tilt, rewards=tree.rewards**2), two_levels(squares, tilt=tilt)
    np.testing.assert_allclose(other.value[: tree.size], expected.value[: tree.size])
    np.testing.assert_allclose(leaf_law(other), leaf_law(expected))
    np.testing.assert_array_equal(tree.value, before)
    assert leaf_law(other).sum() == pytest.approx(1)
    with pytest.raises(ValueError, match="rewards: got 2, expected 6"):
        reweighted(tree, rewards=[1, 2])


def test_the_greedy_leaf_follows_mass_and_the_best_leaf_the_reward():
    tree = two_levels([[3.0, -10.0, -10.0], [2.0, 2.1, 1.9]])  # log mean exp: 3 - log 3 = 1.9 below about 2
    assert tree.value[greedy_leaf(tree)] == 2.1 and tree.value[best_leaf(tree)] == 3.0
    assert tree.value[greedy_leaf(reweighted(tree, tilt=math.inf))] == 3.0


def test_a_pending_rollout_counts_as_a_child_and_is_not_looked_into():
    tree = two_levels()
    law, values, node = leaf_law(tree), tree.value.copy(), int(tree.children(0)[0])
    node_before = tree.children(node)
    pending = tree.add(node, len(tree.leaf))
    tree.queue.append(pending)
    assert tree.count(node) == len(node_before) + 1 and tree.children(node).tolist() == node_before.tolist()
    assert tree.scored_leaves == 6 and pending not in tree.leaves
    np.testing.assert_array_equal(leaf_law(tree), law)
    tree.back_up()
    np.testing.assert_array_equal(tree.value[: len(values)], values)
    tree.queue.remove(pending)
    tree.score(pending, 4.0)
    assert pending in tree.children(node) and tree.value[0] > values[0]


def test_health_says_what_is_wrong():
    fine = health(two_levels([[0.0, 1.0, 2.0]] * 5, selection="least_visited"))
    assert fine["warnings"] == [] and fine["leaves"] == 15 and fine["root_children"] == 5
    assert fine["effective_leaves"] == pytest.approx(5 / np.sum(boltzmann(np.arange(3.0), 1) ** 2))
    flat = Tree(Rules(1, tilt=1e-3))
    for k in range(6):
        flat.score(flat.add(0, k), float(k))
    found = {
        "calibrated": health(two_levels([[0.0, 1.0, 2.0]] * 5)),
        "follows the first": health(two_levels([[0.0, 100.0]] * 9)),
        "all but uniform": health(flat),
        "best of n": health(flat),
        "duplicates": health(two_levels([[0.0, 100.0]])),
    }
    for part, numbers in found.items():
        assert any(part in warning for warning in numbers["warnings"]), part


def test_rules_out_of_range_are_refused():
    for message, rules in {
        "tilt: got -1": dict(tilt=-1),
        "tilt: got nan": dict(tilt=math.nan),
        "widening: got 0": dict(widening=0),
        "exponent: got 1": dict(exponent=1),
        "selection: got 'best'": dict(selection="best"),
        "epsilon: got 1.5": dict(epsilon=1.5),
        "c_uct: got -1": dict(c_uct=-1),
        "leaves_at_once: got 0": dict(leaves_at_once=0),
        "standardize: got 1": dict(standardize=1),
        "standardize: got 8, expected 0 with tilt inf": dict(standardize=8, tilt=math.inf),
        r"branch_at: got \(3, 2\), expected rising steps in 1 .. 5": dict(branch_at=(3, 2)),
        r"branch_at: got \(6,\)": dict(branch_at=(6,)),
        r"branch_at: got \(0,\)": dict(branch_at=(0,)),
    }.items():
        with pytest.raises(ValueError, match=message):
            Rules(6, **rules)
    for read in (greedy_leaf, best_leaf, health, shown_leaves):
        with pytest.raises(ValueError, match="without leaves"):
            read(Tree(Rules(2)))


def test_a_picture_shows_the_best_branches_in_order_without_crossing():
    generator = torch.Generator().manual_seed(1)
    tree = two_levels(torch.rand(20, 10, generator=generator, dtype=torch.float64).tolist())
    rows = shown_leaves(tree, 12)
    assert sorted(tree.value[rows]) == sorted(sorted(tree.rewards)[-12:])
    parents = [tree.parent[leaf] for leaf in rows]
    assert [p for k, p in enumerate(parents) if k == 0 or parents[k - 1] != p] == list(dict.fromkeys(parents))
    assert tree.value[rows[0]] == tree.rewards.max()
    figure = draw_tree(tree, {rows[0]: torch.rand(3, 8, 8)}, leaves=12)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert f"+{20 - len(set(parents))}" in texts and f"{tree.rewards.max():.4g}" in texts
    hidden = sum(int(text[1:]) for text in texts if text.startswith("+"))
    assert hidden == 20 - len(set(parents)) + 10 * len(set(parents)) - 12
    assert draw_tree(two_levels([[1.0]]), leaves=3).axes  # one leaf, no range of values


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tilt", 0.0),
        ("tilt", math.inf),
        ("epsilon", 0.0),
        ("epsilon", 1.0),
        ("c_uct", 0.0),
        ("leaves_at_once", 1),
        ("standardize", 2),
        ("guidance_start", 0.0),
        ("clip", None),
    ],
)
def test_the_ends_of_the_ranges_that_count_as_within(name, value):
    assert getattr(Rules(6, **{name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tilt", -1e-3),
        ("widening", 0.0),
        ("exponent", 0.0),
        ("exponent", 1.0),
        ("epsilon", 1.001),
        ("c_uct", math.inf),
        ("leaves_at_once", 0),
        ("standardize", 1),
        ("reward_guidance", math.inf),
        ("reward_guidance", -0.1),
        ("guidance_start", 1.0),
        ("guidance_start", -0.1),
        ("clip", 0.0),
    ],
)
def test_the_ends_of_the_ranges_that_count_as_beyond(name, value):
    with pytest.raises(ValueError, match=f"{name}: got {value}"):
        Rules(6, **{name: value})


@pytest.mark.parametrize("option", [{"standardize": 2}, {"reward_guidance": 0.5}])
@pytest.mark.parametrize("tilt", [0.0, math.inf])
def test_what_needs_a_tilt_in_between_refuses_both_ends(option, tilt):
    with pytest.raises(ValueError, match=f"expected 0 with tilt {tilt}"):
        Rules(6, tilt=tilt, **option)
