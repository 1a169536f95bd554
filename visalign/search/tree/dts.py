"""Diffusion tree sampling (DTS) and search (DTS*): rollouts that start from the promising states of earlier ones.

Jain, Sareen, Pedramfar and Ravanbakhsh 2025, arXiv:2506.20701, section 4 and algorithms 1 and 2, from the paper. Its
"root" is taken to stand above the initial noise, and several rollouts at a time are reconstructed from one sentence.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from visalign.search.chain import Chain
from visalign.search.records import Event, Role

from .file import TreeFile
from .rollout import affordable, cheapest, roll_out
from .rules import Rules, uct, widening_bound
from .tree import Tree

SHARED = (
    "leaves_at_once",
    "standardize",
    "cache",
    "reward_guidance",
    "guidance_start",
    "clip",
)  # Rules' too
FEW_STEPS = 8  # up to here every step branches
IDLE = 10_000  # selections in a row, all of scored leaves, after which a search ends: its bound lets no child in


@dataclass(frozen=True)
class Growth:
    """Options that both ways of growing a tree have.

    Attributes:
        widening, exponent: C and alpha of the bound C N^alpha of a node's children. None: 1 and 0.5 for budgets below
            100 full samples, where larger ones leave no rollout for the branches; else 2 and 0.8.
        branch_at: steps whose states may branch, besides the root. None: where 80, 60, 40 and 20 percent of the steps
            remain, or every step with 8 or fewer; less those whose branches would be copies.
        leaves_at_once: rollouts made together, faster and blind to each other; 1 is the paper's.
        standardize: this many rollouts first all start at the root; the tilt is divided by their rewards' spread.
        cache: keep the predictions at branching states: further children there cost one prediction less, and memory.
        reward_guidance: shift the mean of each step by reward_guidance * tilt * its variance * the gradient of the
            reward of the estimate of x0, at one backward pass a step; 0: none, 1: the step tilted, were it linear.
        guidance_start: the share of the steps before which none is shifted: estimates of x0 are vague there.
        clip: bound on a shift, in units of the step's noise; None: none.
        iterations: stop after so many selections, rounded up to whole batches; None: when the budget is spent.
        folder: where the tree is saved every `save_every` iterations and at the end; one that lies there is
            continued, its spending included, and gives what one long search would have given.
    """

    widening: float | None = None
    exponent: float | None = None
    branch_at: Sequence[int] | None = None
    leaves_at_once: int = 1
    standardize: int = 0
    cache: bool = False
    reward_guidance: float = 0.0
    guidance_start: float = 0.2
    clip: float | None = 1.0
    iterations: int | None = None
    folder: str | Path | None = None
    save_every: int = 100


def _with_growth(search: Callable[..., Iterator[Event]]) -> Callable[..., Iterator[Event]]:
    """A search (chain, growth, *, own options) as one that takes Growth's fields by keyword beside its own."""
    chain, _, *own = inspect.signature(search).parameters.values()
    shared = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
        for f in dataclasses.fields(Growth)
    ]

    @functools.wraps(search)
    def merged(chain: Chain, **options: Any) -> Iterator[Event]:
        growth = Growth(**{p.name: options.pop(p.name) for p in shared if p.name in options})
        return search(chain, growth, **options)

    merged.__signature__ = inspect.Signature([chain, *own, *shared])  # type: ignore[attr-defined]
    return merged


@_with_growth
def dts(
    chain: Chain,
    growth: Growth,
    *,
    tilt: float = 1.0,
    allocation: str = "boltzmann",
    epsilon: float | None = None,
    weighted: bool = True,
) -> Iterator[Event]:
    """Diffusion tree sampling: a tree whose leaves, drawn by its values, have the law of the base times exp(tilt r).

    Anytime. The events' state is the `Tree`, which goes on growing; draw from it with `draw_leaves`. There is an event
    after each batch in which something was rolled out: to select a scored leaf costs nothing and changes visits alone.

    Args:
        growth: `Growth`'s fields, by keyword.
        tilt: inverse temperature in [0, infinity].
        allocation: the child descended to: "boltzmann", by values as in the paper; "least_visited", for calibrated
            draws; "mixed", by values but for an `epsilon` share of uniform choices (None: 0.3).
        weighted: guided children weigh p / q, so that draws have the tilted law still. The weights spread as latents
            grow, and soon one child has all; False is the published heuristic, whose draws lean further.

    Raises:
        ValueError: options that cannot work, or a folder with another search.
    """
    if allocation not in ("boltzmann", "mixed", "least_visited"):
        raise ValueError(f"allocation: got {allocation!r}, expected 'boltzmann', 'mixed' or 'least_visited'")
    if epsilon is not None and allocation != "mixed":
        raise ValueError(f"epsilon: got {epsilon} with allocation {allocation!r}, expected 'mixed'")
    epsilon = (0.3 if epsilon is None else epsilon) if allocation == "mixed" else 0.0
    yield from _grow(chain, "dts", growth, tilt, selection=allocation, epsilon=epsilon, weighted=weighted)


@_with_growth
def dts_star(chain: Chain, growth: Growth, *, tilt: float = 10.0, c_uct: float = 0.0) -> Iterator[Event]:
    """Diffusion tree search: the tree of `dts`, that descends to the child of the largest upper confidence bound.

    The backup is still soft: it follows the branch of most tilted mass, so `greedy_leaf` may differ from the best.
    Guided children have no weights, as published: values are those of the shifted steps.

    Args:
        growth: `Growth`'s fields, by keyword.
        tilt: as `dts`; good for rewards that spread by some tenths among a prompt's pictures, see `standardize` for
            others.
        c_uct: exploration, in standard deviations of the leaves' rewards so far. The paper names no number; without
            any, the widening explores, and that found more here.
    """
    yield from _grow(chain, "dts-star", growth, tilt, selection="uct", c_uct=c_uct, weighted=False)


def _grow(chain: Chain, method: str, growth: Growth, tilt: float, **own: Any) -> Iterator[Event]:
    """Select leaves_at_once times, roll out what the budget allows of it, score, back up."""
    shared = {name: getattr(growth, name) for name in SHARED}
    iterations = growth.iterations
    shared["widening"], shared["exponent"] = _widths(chain, growth.widening, growth.exponent)
    rules = Rules(chain.num_steps, _branches(chain, growth.branch_at), tilt, **shared, **own)
    free = {"widening": growth.widening, "exponent": growth.exponent}
    file = TreeFile(chain, method, growth.folder, growth.save_every, free)
    if iterations is None and chain.ledger.max_nfe is None:
        raise ValueError("iterations: got None, expected a number, for a chain without a budget")
    if rules.reward_guidance:
        chain.require_gradient()
    device = chain.initial([0]).device
    tree = file.open(rules, device)
    last, rolled = math.inf if iterations is None else iterations, tree.iterations
    try:
        while tree.queue or tree.iterations < last:
            if not tree.queue:
                if chain.ledger.left < max(1, cheapest(tree)) or tree.iterations - rolled > IDLE:
                    break
                for _ in range(tree.rules.leaves_at_once):
                    _select(chain, tree)
            batch = affordable(tree, chain.ledger.left)
            if tree.queue and not batch:
                break
            if batch:
                roll_out(chain, tree, batch, device)
                tree.measure()
                rolled = tree.iterations
                yield chain.event(tree, f"{tree.scored_leaves} leaves")
            file.save_if_due(tree)
    finally:
        file.save(tree)


# Select --------------------------------------------------------------------------------------------------------------


def _select(chain: Chain, tree: Tree) -> None:
    """Descend to a leaf, or to a node that gets another child: a rollout of it is queued. One more visit on the path.

    A node is descended into while it has a scored child and as many children as its bound.
    """
    tree.iterations += 1
    rules, node, path = tree.rules, 0, [0]
    chances = torch.rand(len(rules.levels), generator=chain.random(Role.SELECT, tree.iterations)).tolist()
    c = rules.c_uct * float(tree.rewards.std()) if rules.c_uct and tree.scored_leaves else 0.0
    while not tree.is_leaf(node):
        bound = widening_bound(int(tree.visits[node]), rules.widening, rules.exponent)
        fresh = tree.measuring or not rules.branch_at or tree.count(node) < bound
        if fresh or not len(below := tree.children(node)):
            path += _expand(tree, node)
            break
        node = int(below[_choose(tree, node, below, chances[len(path) - 1], c)])
        path.append(node)
    tree.visits[path] += 1


def _choose(tree: Tree, node: int, below: np.ndarray, chance: float, c: float) -> int:
    """The place in `below` of the child to descend to; chance is uniform in [0, 1)."""
    rules, values = tree.rules, tree.value[below]
    if rules.selection == "least_visited":
        return int(tree.visits[below].argmin())
    if rules.selection == "uct":
        return int(uct(values, tree.visits[below], int(tree.visits[node]), c).argmax())
    shares = (1 - rules.epsilon) * tree.shares(below) + rules.epsilon / len(below)
    reached = np.cumsum(shares)
    return int(np.searchsorted(reached[:-1], chance * reached[-1], side="right"))


def _expand(tree: Tree, node: int) -> list[int]:
    """A new pending rollout from the node down to a leaf; its nodes."""
    rollout, made = len(tree.leaf), []
    while not tree.is_leaf(node):
        node = tree.add(node, rollout)
        made.append(node)
    tree.queue.append(node)
    return made


# Options -------------------------------------------------------------------------------------------------------------


def _branches(chain: Chain, given: Sequence[int] | None) -> tuple[int, ...]:
    """The branching steps: those asked for, or the default ones that have noise before the next.

    Raises:
        ValueError: steps out of order or range, or whose branches would be copies.
    """
    steps = chain.num_steps
    if given is None:
        usual = (
            range(1, steps) if steps <= FEW_STEPS else [steps - round(part * steps) for part in (0.8, 0.6, 0.4, 0.2)]
        )
    else:
        usual = [int(step) for step in given]
        Rules(steps, tuple(usual))  # in order and range
    branches: tuple[int, ...] = ()
    for step in reversed(usual):
        end = branches[0] if branches else steps
        if any(chain.stds[step:end]):
            branches = (step, *branches)
        elif given is not None:
            raise ValueError(f"branch_at: got {tuple(given)}, whose steps {step} to {end} draw no noise: copies")
    return branches


def _widths(chain: Chain, widening: float | None, exponent: float | None) -> tuple[float, float]:
    """C and alpha, by the budget where they are None."""
    budget = chain.ledger.max_nfe
    small = budget is not None and budget < 100 * chain.num_steps
    return (
        (1.0 if small else 2.0) if widening is None else widening,
        (0.5 if small else 0.8) if exponent is None else exponent,
    )
