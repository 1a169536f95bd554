"""A tree of partly denoised states, its soft values, and the rules by which it grows.

Diffusion tree sampling and search (Jain et al. 2025, arXiv:2506.20701). The root stands above the noise: its children
are fresh rollouts. A node's children are independent draws of the kernel, so the value of a node, which estimates
V(x) = log E[exp(tilt r) | x] / tilt, is their mean under that map, and drawing by it gives the law tilted by
exp(tilt r).
"""

import math
from array import array
from dataclasses import dataclass

import numpy as np
from torch import Tensor

SELECTIONS = ("boltzmann", "mixed", "least_visited", "uct")


def soft_backup(values: np.ndarray, tilt: float) -> float:
    """(1/tilt) log mean exp(tilt v) of the children's values (n,): their mean at tilt 0, their maximum at infinity."""
    if tilt == 0:
        return float(values.mean())
    top = values.max()
    if math.isinf(tilt):
        return float(top)
    return float(top + np.log1p(np.expm1(tilt * (values - top)).mean()) / tilt)


def boltzmann(values: np.ndarray, tilt: float) -> np.ndarray:
    """softmax(tilt v), (n,): uniform at tilt 0, and over the largest at infinity."""
    top = values.max()
    weights = (values == top).astype(float) if math.isinf(tilt) else np.exp(tilt * (values - top))
    return weights / weights.sum()


def uct(values: np.ndarray, visits: np.ndarray, parent_visits: int, c: float) -> np.ndarray:
    """v + c sqrt(log N(parent) / N(child)), (n,): the child of the largest is taken."""
    return values + c * np.sqrt(math.log(parent_visits) / visits)


def widening_bound(visits: int, widening: float, exponent: float) -> float:
    """C N^alpha: a node with fewer children gets another one."""
    return widening * visits**exponent


@dataclass(frozen=True)
class Rules:
    """How a tree grows.

    Attributes:
        steps: T of the chain.
        branch_at: the steps, rising in 1 .. T-1, whose state may have several children; the root always may.
        tilt: of the target, in [0, infinity]; of rewards in units of their spread if `standardize`.
        widening, exponent: C > 0 and alpha in (0, 1), see `widening_bound`.
        selection: one of SELECTIONS: the child that is descended to.
        epsilon: the uniform share of "mixed".
        c_uct: exploration of "uct", in standard deviations of the leaves' rewards.
        leaves_at_once: rollouts that are selected before the first of them is scored.
        standardize: rollouts from the root by whose spread the tilt is divided; 0: it is not.
        cache: whether the predictions at branching states are kept.

    Raises:
        ValueError: a value out of range.
    """

    steps: int
    branch_at: tuple[int, ...] = ()
    tilt: float = 1.0
    widening: float = 2.0
    exponent: float = 0.8
    selection: str = "boltzmann"
    epsilon: float = 0.0
    c_uct: float = 0.0
    leaves_at_once: int = 1
    standardize: int = 0
    cache: bool = False

    def __post_init__(self) -> None:
        for name, fits, expected in (
            ("tilt", self.tilt >= 0, ">= 0"),
            ("widening", self.widening > 0, "> 0"),
            ("exponent", 0 < self.exponent < 1, "within (0, 1)"),
            ("selection", self.selection in SELECTIONS, f"one of {SELECTIONS}"),
            ("epsilon", 0 <= self.epsilon <= 1, "within [0, 1]"),
            ("c_uct", 0 <= self.c_uct < math.inf, ">= 0 and finite"),
            ("leaves_at_once", self.leaves_at_once >= 1, ">= 1"),
            ("standardize", self.standardize == 0 or self.standardize >= 2, "0, or >= 2 rollouts"),
            (
                "standardize",
                not self.standardize or 0 < self.tilt < math.inf,
                f"0 with tilt {self.tilt}, which no unit of reward changes",
            ),
            ("branch_at", _rising(self.branch_at, self.steps), f"rising steps in 1 .. {self.steps - 1}"),
        ):
            if not fits:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected {expected}")

    @property
    def levels(self) -> tuple[int, ...]:
        """The step that a node of each depth stands before: 0 for the root, T for leaves."""
        return (0, *self.branch_at, self.steps)


class Tree:
    """Nodes by number, the root first and a child after its parent; new ones come as whole rollouts, down to a leaf.

    A rollout is pending from its selection to `score`; pending nodes count as children, but are never looked into.

    Attributes:
        parent, depth, rollout: of each node; the rollout that made it.
        value, visits, scored: arrays, used up to `size`; a leaf's value is its reward.
        states, predictions: by node, (1, ...) on the CPU; none of the root.
        leaf: the leaf that each rollout ends in.
        queue: leaves whose rollout is pending.
        iterations: selections made so far.
        unit: the spread of rewards that the tilt is divided by; None: not measured.
    """

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.unit: float | None = None
        self.parent, self.depth, self.rollout = [-1], [0], [-1]
        self.value, self.visits, self.scored = np.zeros(64), np.ones(64, np.int64), np.zeros(64, bool)
        self.states: dict[int, Tensor] = {}
        self.predictions: dict[int, Tensor] = {}
        self.leaf = array("q")
        self.queue: list[int] = []
        self.iterations = 0
        self._children, self._pending = [array("q")], [0]

    @property
    def size(self) -> int:
        return len(self.parent)

    @property
    def tilt(self) -> float:
        """That of raw rewards."""
        return self.rules.tilt / (self.unit or 1.0)

    @property
    def leaves(self) -> np.ndarray:
        """The scored leaves (n,), by rollout."""
        found = np.array(self.leaf, np.int64)
        return found[self.scored[found]]

    @property
    def scored_leaves(self) -> int:
        """How many."""
        return len(self.leaf) - len(self.queue)

    @property
    def rewards(self) -> np.ndarray:
        """Of `leaves`, (n,)."""
        return self.value[self.leaves]

    @property
    def measuring(self) -> bool:
        """Whether the unit has still to be measured: rollouts start at the root until then."""
        return self.rules.standardize > 0 and self.unit is None

    def is_leaf(self, node: int) -> bool:
        return self.depth[node] == len(self.rules.levels) - 1

    def level(self, node: int) -> int:
        """The step that the node stands before."""
        return self.rules.levels[self.depth[node]]

    def count(self, node: int) -> int:
        """Its children, with pending ones."""
        return len(self._children[node])

    def children(self, node: int) -> np.ndarray:
        """Its scored children (n,), in the order of their making."""
        found = np.array(self._children[node], np.int64)
        return found[self.scored[found]] if self._pending[node] else found

    def path(self, node: int) -> list[int]:
        """From the root to the node."""
        found = [node]
        while found[-1]:
            found.append(self.parent[found[-1]])
        return found[::-1]

    def add(self, parent: int, rollout: int) -> int:
        """A new pending child, with value 0 and one visit; its number."""
        node = self.size
        if node == len(self.value):
            self.value = np.concatenate([self.value, np.zeros(node)])
            self.visits = np.concatenate([self.visits, np.ones(node, np.int64)])
            self.scored = np.concatenate([self.scored, np.zeros(node, bool)])
        self.parent.append(parent)
        self.depth.append(self.depth[parent] + 1)
        self.rollout.append(rollout)
        self._children.append(array("q"))
        self._pending.append(0)
        self._children[parent].append(node)
        self._pending[parent] += 1
        if self.is_leaf(node):
            self.leaf.append(node)
        return node

    def score(self, leaf: int, reward: float) -> None:
        """The reward of a pending leaf: its rollout is pending no more, and the values above it are backed up."""
        path = self.path(leaf)
        for node in path[1:]:
            if not self.scored[node]:
                self.scored[node] = True
                self._pending[self.parent[node]] -= 1
        self.value[leaf] = reward
        for node in reversed(path[:-1]):
            self.value[node] = soft_backup(self.value[self.children(node)], self.tilt)

    def restore(self, queue: list[int]) -> None:
        """Of a tree that was just added node by node: these leaves are pending, all others' rollouts are scored."""
        self.queue = queue
        pending = {self.rollout[leaf] for leaf in queue}
        for node in range(1, self.size):
            if self.rollout[node] not in pending:
                self.scored[node] = True
                self._pending[self.parent[node]] -= 1

    def measure(self) -> None:
        """Once the first rollouts are in, the unit is their rewards' spread (1 if they have none)."""
        if self.measuring and not self.queue and self.scored_leaves >= self.rules.standardize:
            self.unit = float(self.rewards[: self.rules.standardize].std()) or 1.0
            self.back_up()

    def back_up(self) -> None:
        """All values anew from those of the leaves."""
        for node in reversed(range(self.size)):
            if not self.is_leaf(node) and (node == 0 or self.scored[node]):
                scored = self.children(node)
                self.value[node] = soft_backup(self.value[scored], self.tilt) if len(scored) else 0.0


def _rising(steps: tuple[int, ...], end: int) -> bool:
    return all(0 <= before < after < end for before, after in zip((0, *steps), steps))
