"""The rules by which a tree grows: how values are backed up, children chosen, nodes widened."""

import math
from dataclasses import dataclass

import numpy as np

SELECTIONS = ("boltzmann", "mixed", "least_visited", "uct")


def soft_backup(values: np.ndarray, tilt: float, log_weights: np.ndarray | float = 0.0) -> float:
    """(1/tilt) log mean(w exp(tilt v)) of the children's values (n,): the mean at tilt 0, the maximum at infinity.

    log_weights: log w (n,), of children drawn from q: log p - log q; without meaning at tilt 0.
    """
    top = values.max()
    if math.isinf(tilt):
        return float(top)
    if tilt == 0:
        return float(values.mean())
    terms = tilt * (values - top) + log_weights
    most = terms.max()
    return float(top + (most + np.log1p(np.expm1(terms - most).mean())) / tilt)


def boltzmann(values: np.ndarray, tilt: float, log_weights: np.ndarray | float = 0.0) -> np.ndarray:
    """softmax(tilt v + log w), (n,): uniform at tilt 0 without weights, and over the largest v at infinity."""
    top = values.max()
    if math.isinf(tilt):
        shares = (values == top).astype(float)
    else:
        terms = tilt * (values - top) + log_weights
        shares = np.exp(terms - terms.max())
    return shares / shares.sum()


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
        reward_guidance: how much of the tilt shifts each step's mean along the reward's gradient; 0: none.
        guidance_start: the share of the steps before which none is shifted.
        clip: bound on a shift, as `twist`.
        weighted: whether shifted children weigh p / q.

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
    reward_guidance: float = 0.0
    guidance_start: float = 0.2
    clip: float | None = 1.0
    weighted: bool = True

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
            ("reward_guidance", 0 <= self.reward_guidance < math.inf, ">= 0 and finite"),
            ("guidance_start", 0 <= self.guidance_start < 1, "within [0, 1), a share of the steps"),
            ("clip", self.clip is None or self.clip > 0, "> 0, or None"),
            (
                "reward_guidance",
                not self.reward_guidance or 0 < self.tilt < math.inf,
                f"0 with tilt {self.tilt}: a step is shifted by reward_guidance * tilt * its variance * the gradient",
            ),
            (
                "cache",
                not (self.reward_guidance and self.cache),
                "False with reward_guidance, which needs gradients, too",
            ),
            ("branch_at", _rising(self.branch_at, self.steps), f"rising steps in 1 .. {self.steps - 1}"),
        ):
            if not fits:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected {expected}")

    @property
    def levels(self) -> tuple[int, ...]:
        """The step that a node of each depth stands before: 0 for the root, T for leaves."""
        return (0, *self.branch_at, self.steps)


def _rising(steps: tuple[int, ...], end: int) -> bool:
    return all(0 <= before < after < end for before, after in zip((0, *steps), steps))
