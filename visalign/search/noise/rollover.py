"""Rollover budget forcing: step by step proposals, until one beats all before; what a step saves goes to the next."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from visalign.search.chain import Chain
from visalign.search.records import Event, Role
from visalign.transitions import ode_of


@dataclass
class Place:
    """A state (1, ...) at a step, with the prediction there, which has been paid for."""

    step: int
    latents: Tensor
    prediction: Tensor


@dataclass
class Walk:
    """One of the chains.

    Attributes:
        place: the state that proposals are made from.
        record: the best reward of an estimate so far, which a proposal must beat to be moved to.
        quota, spent: proposals that may be made at this step, and the number of the next, from 1.
        best, best_reward: of the proposals of this step; None before the first.
        finished: whether it has given a result.
    """

    place: Place
    record: float
    quota: int
    spent: int = 1
    best: Place | None = None
    best_reward: float = -math.inf
    finished: bool = False

    def go(self, quota: int) -> None:
        """To the best proposal, with this quota there."""
        assert self.best is not None
        self.place, self.best, self.best_reward = self.best, None, -math.inf
        self.quota, self.spent = quota, 0


@dataclass
class Rollover:
    """The chains, the quota of a step, the proposals each has made, and the moves that beat a record or did not."""

    walks: list[Walk] = field(default_factory=list)
    quota: int = 0
    rounds: int = 0
    rollovers: int = 0
    forced: int = 0


def rbf(chain: Chain, *, chains: int = 2, initial: int = 25) -> Iterator[Event]:
    """Rollover budget forcing (RBF; Kim et al. 2025, arXiv:2503.19385). The whole budget is laid out from the start.

    Each chain begins at the best of `initial` noises by the reward of their estimates of x0. From a state it proposes
    next states, one a round, by the kernel, which must draw noise, and moves to the first whose estimate beats all so
    far; the proposals that it did not need roll over to its next step. A step without such a proposal ends when its
    quota is spent, with its best. From the last noisy step proposals are made until the budget ends.

    A proposal costs one prediction. Ours: a result is a finished sample. A proposal of the last step is finished by the
    prediction it has been paid with; for chains that have not got there the steps of the ODE (of a consistency model,
    its own kernel) from the best proposal are kept in reserve.

    The paper's kernel for flows is `visalign.transitions.interpolant.VPSDE`, on a schedule of few steps.

    Args:
        chains: B; fewer where the budget holds no more.
        initial: noises of each, as many as the budget leaves beside its T - 1 further steps.

    Raises:
        ValueError: options below 1, a deterministic kernel, or a chain without a budget.
    """
    for option, value in (("chains", chains), ("initial", initial)):
        if value < 1:
            raise ValueError(f"{option}: got {value}, expected >= 1")
    if chain.ledger.max_nfe is None:
        raise ValueError("budget: got none, expected a number of denoiser calls to lay out over the steps")
    chain.require_noise()
    steps, left = chain.num_steps, chain.ledger.left
    chains = min(chains, left // steps)
    if not chains:
        return
    initial = min(initial, left // chains - (steps - 1))
    state = Rollover(quota=step_quota(left, chains, initial, steps))
    state.walks = _begin(chain, chains, initial, state.quota)
    yield chain.event(state, f"{chains} chains, {state.quota} proposals a step")
    while steps > 1 and chain.ledger.left >= chains + sum(_reserve(walk, steps) for walk in state.walks):
        for number, walk in enumerate(state.walks):
            reward = _propose(chain, walk, number, state.rounds * chains + number)
            _move(walk, reward, steps, state)
        state.rounds += 1
        yield chain.event(state, f"round {state.rounds}, steps {[walk.place.step for walk in state.walks]}")
    for number, walk in enumerate(state.walks):
        if not walk.finished:
            chain.result(_complete(chain, walk.best or walk.place, number), [number])
    yield chain.event(state, f"{state.rollovers} moves to a better one, {state.forced} forced")


def step_quota(max_nfe: int, chains: int, initial: int, steps: int) -> int:
    """Q = floor((max_nfe - initial chains) / (steps chains)), proposals of a chain at a step, at least 1."""
    return max((max_nfe - initial * chains) // (steps * chains), 1)


def _begin(chain: Chain, chains: int, initial: int, quota: int) -> list[Walk]:
    """The best of `initial` noises for each chain, by their estimates of x0."""
    latents = chain.initial(range(chains * initial))
    predictions = chain.predict(latents, 0)
    rewards = chain.value(chain.kernel(latents, 0, predictions)[1])
    walks = []
    for b in range(chains):
        k = b * initial + int(rewards[b * initial : (b + 1) * initial].argmax())
        walks.append(Walk(Place(0, latents[k : k + 1], predictions[k : k + 1]), float(rewards[k]), quota))
    return walks


def _reserve(walk: Walk, steps: int) -> int:
    """Predictions that finishing takes from the state: it has its own, the last step needs none after it."""
    return 0 if walk.finished else steps - 1 - walk.place.step


def _propose(chain: Chain, walk: Walk, number: int, entity: int) -> float:
    """One proposal, one prediction; its reward. The best of the step is kept; from the last one it is a result."""
    place, i = walk.place, walk.place.step
    gaussian, _ = chain.kernel(place.latents, i, place.prediction)
    latents = gaussian.sample(chain.noise([entity], i, place.latents, Role.SEARCH))
    prediction = chain.predict(latents, i + 1)
    if i + 2 == chain.num_steps:
        reward = float(chain.result(_complete(chain, Place(i + 1, latents, prediction), number), [number]))
        walk.finished = True
    else:
        reward = float(chain.value(chain.kernel(latents, i + 1, prediction)[1]))
    if walk.best is None or reward > walk.best_reward:
        walk.best, walk.best_reward = Place(i + 1, latents, prediction), reward
    return reward


def _move(walk: Walk, reward: float, steps: int, state: Rollover) -> None:
    """What follows from a proposal's reward: on to it if it beats the record, on to the best if the quota is spent.

    A proposal that beats the record is the best of its step, as the record is at least that of all before it.
    """
    can_move = walk.place.step < steps - 2
    if reward > walk.record:
        walk.record = reward
        if can_move:
            state.rollovers += 1
            walk.go(walk.quota - walk.spent + state.quota)
    elif can_move and walk.spent % walk.quota == 0:  # forced: the quota is gone, and nothing rolls over
        state.forced += 1
        walk.go(state.quota)
    walk.spent += 1


def _complete(chain: Chain, place: Place, number: int) -> Tensor:
    """The final latents from a place: its own prediction takes it one step, others the rest."""
    transition = chain.transition if chain.schedule.kind == "consistency" else ode_of(chain.schedule)
    latents, prediction = place.latents, place.prediction
    for i in range(place.step, chain.num_steps):
        if i > place.step:
            prediction = chain.predict(latents, i)
        latents = chain.draw(transition(chain.schedule, i, latents, prediction)[0], i, [number])
    return latents
