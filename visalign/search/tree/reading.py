"""What is read from a grown tree at no model cost: draws, leaves, other tilts and rewards, its health."""

import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .tree import Tree


def reweighted(tree: Tree, *, tilt: float | None = None, rewards: Sequence[float] | Tensor | None = None) -> Tree:
    """The tree under another tilt (of raw rewards), other rewards of its `leaves`, or both; states are shared."""
    if rewards is not None and len(rewards) != len(tree.leaves):
        raise ValueError(f"rewards: got {len(rewards)}, expected {len(tree.leaves)}, one per leaf")
    if tilt is not None and not tilt >= 0:
        raise ValueError(f"tilt: got {tilt}, expected >= 0")
    if tilt == 0 and tree.log_weight.any():
        raise ValueError("tilt: got 0 for a guided tree, expected > 0, however small: its children's weights need one")
    other = copy.deepcopy(tree, {id(tree.states): tree.states, id(tree.predictions): tree.predictions})
    if tilt is not None:
        other.rules, other.unit = dataclasses.replace(tree.rules, tilt=tilt, standardize=0, reward_guidance=0.0), None
    if rewards is not None:
        other.value[tree.leaves] = np.asarray(rewards, float)
    other.back_up()
    return other


def leaf_law(tree: Tree) -> np.ndarray:
    """The probability of each of `leaves`, (n,), when children are drawn by their `shares` from the root down."""
    law = np.zeros(tree.size)
    law[0] = 1.0
    for node in range(tree.size):
        if law[node] and not tree.is_leaf(node) and len(below := tree.children(node)):
            law[below] = law[node] * tree.shares(below)
    return law[tree.leaves]


def draw_leaves(tree: Tree, count: int, generator: torch.Generator) -> list[int]:
    """Leaves drawn from the finished tree by `leaf_law`, with replacement; a generator as `Chain.random` makes."""
    if not tree.scored_leaves:
        raise ValueError("tree: got one without leaves, expected a grown one")
    chosen = torch.multinomial(torch.from_numpy(leaf_law(tree)), count, replacement=True, generator=generator)
    return tree.leaves[chosen.numpy()].tolist()


def greedy_leaf(tree: Tree) -> int:
    """The leaf that the largest value leads to at each node: where most tilted mass lies, not the best reward."""
    node = 0
    while not tree.is_leaf(node):
        below = tree.children(node)
        if not len(below):
            raise ValueError("tree: got one without leaves, expected a grown one")
        node = int(below[tree.value[below].argmax()])
    return node


def best_leaf(tree: Tree) -> int:
    """The leaf of the best reward."""
    if not tree.scored_leaves:
        raise ValueError("tree: got one without leaves, expected a grown one")
    return int(tree.leaves[tree.rewards.argmax()])


def health(tree: Tree) -> dict[str, Any]:
    """Numbers that tell whether a tree can be trusted, as JSON holds them.

    Returns:
        leaves, nodes, iterations; revisits: selections that ended in a scored leaf, which cost nothing; children of
        the root; most_children of another node; best and greedy rewards; root_value; spread: the standard deviation
        of the leaves' rewards, and tilted_spread, that times the tilt; effective_leaves: 1 / sum p^2 of `leaf_law`;
        warnings: sentences.
    """
    greedy, law = greedy_leaf(tree), leaf_law(tree)
    spread = float(tree.rewards.std())
    finite = math.isfinite(tree.tilt)
    report = {
        "leaves": tree.scored_leaves,
        "nodes": tree.size,
        "iterations": tree.iterations,
        "revisits": tree.iterations - len(tree.leaf),
        "root_children": tree.count(0),
        "most_children": max((tree.count(n) for n in range(1, tree.size)), default=0),
        "best": float(tree.rewards.max()),
        "greedy": float(tree.value[greedy]),
        "root_value": float(tree.value[0]),
        "spread": spread,
        "tilted_spread": tree.tilt * spread if finite else None,
        "effective_leaves": float(1 / (law**2).sum()),
    }
    return {**report, "warnings": _warnings(tree, report)}


def _warnings(tree: Tree, report: dict[str, Any]) -> list[str]:
    warnings = []
    if not tree.rules.branch_at:
        warnings.append("only the root can branch (no step but the last has noise): this is best of n")
    if 0 < tree.tilt < math.inf and tree.scored_leaves > 1:
        if report["tilted_spread"] < 0.1:
            warnings.append("the rewards' spread is below a tenth of 1 / tilt: selection is all but uniform")
        if report["tilted_spread"] > 10:
            warnings.append("the rewards' spread is above ten times 1 / tilt: selection follows the first good leaf")
    if tree.tilt > 0 and tree.rules.selection in ("boltzmann", "mixed"):
        warnings.append(
            "built by values, which makes the root's value too low and draws too concentrated, and fades slowly; "
            "least_visited gives calibrated draws"
        )
    if report["effective_leaves"] < 5:
        warnings.append("draws come from fewer than five leaves in effect: expect duplicates")
    return warnings
