"""A tree of partly denoised states and its soft values.

Diffusion tree sampling and search (Jain et al. 2025, arXiv:2506.20701). The root stands above the noise: its children
are fresh rollouts. A node's children are independent draws of the kernel, so the value of a node, which estimates
V(x) = log E[exp(tilt r) | x] / tilt, is their mean under that map, and drawing by it gives the law tilted by
exp(tilt r). Children drawn from another law q than the kernel p weigh p / q each.
"""

from array import array

import numpy as np
from torch import Tensor

from .rules import Rules, boltzmann, soft_backup


class Tree:
    """Nodes by number, the root first and a child after its parent; new ones come as whole rollouts, down to a leaf.

    A rollout is pending from its selection to `score`; pending nodes count as children, but are never looked into.

    Attributes:
        parent, depth, rollout: of each node; the rollout that made it.
        value, visits, scored: arrays, used up to `size`; a leaf's value is its reward.
        log_weight: likewise: log p - log q of the steps from the parent; 0 where they were drawn from the kernel p.
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
        self.log_weight = np.zeros(64)
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
        nodes = np.array(self.leaf, np.int64)
        return nodes[self.scored[nodes]]

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
        nodes = np.array(self._children[node], np.int64)
        return nodes[self.scored[nodes]] if self._pending[node] else nodes

    def path(self, node: int) -> list[int]:
        """From the root to the node."""
        nodes = [node]
        while nodes[-1]:
            nodes.append(self.parent[nodes[-1]])
        return nodes[::-1]

    def add(self, parent: int, rollout: int) -> int:
        """A new pending child, with value 0 and one visit; its number."""
        node = self.size
        if node == len(self.value):
            self.value = np.concatenate([self.value, np.zeros(node)])
            self.visits = np.concatenate([self.visits, np.ones(node, np.int64)])
            self.scored = np.concatenate([self.scored, np.zeros(node, bool)])
            self.log_weight = np.concatenate([self.log_weight, np.zeros(node)])
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
            self.value[node] = self.backup(self.children(node))

    def backup(self, children: np.ndarray) -> float:
        """The value that these children give their parent."""
        return soft_backup(self.value[children], self.tilt, self.log_weight[children])

    def shares(self, children: np.ndarray) -> np.ndarray:
        """The probabilities (n,) at which siblings are drawn by their values."""
        return boltzmann(self.value[children], self.tilt, self.log_weight[children])

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
                self.value[node] = self.backup(scored) if len(scored) else 0.0
