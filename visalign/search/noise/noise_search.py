"""Search over the noise that a picture starts from (Ma et al. 2025, arXiv:2501.09732): random, zero-order, over paths.

Meant for deterministic samplers, where the initial noise decides all. With a kernel that draws noise `zero_order` holds
the step noise fixed, so that the picture is a function of the initial noise still.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from visalign.search.chain import Chain
from visalign.search.records import Event, Role
from visalign.transitions import Schedule
from visalign.transitions.interpolant import path_at, renoise


@dataclass
class NoiseSearch:
    """Rounds done, rewards of all results in order, and where the search stands: the pivot and its reward, or None."""

    rounds: int = 0
    rewards: list[float] = field(default_factory=list)
    pivot: Tensor | None = None
    pivot_reward: float = -math.inf


def random_search(chain: Chain, *, first: int = 2, growth: int = 2) -> Iterator[Event]:
    """Best of N in rounds: `first` noises, then `growth` times as many, and so on while the budget lasts.

    Candidate i is entity i, so the results are those of best of N. Source: 2^round noises in round 1, 2, ... of the
    published re-implementation (tt-scale-flux), which stops after four.

    Raises:
        ValueError: first or growth below 1.
    """
    for option, value in (("first", first), ("growth", growth)):
        if value < 1:
            raise ValueError(f"{option}: got {value}, expected >= 1")
    state, size = NoiseSearch(), first
    while count := min(size, chain.ledger.left // chain.num_steps):
        entities = range(len(state.rewards), len(state.rewards) + count)
        state.rounds, size = state.rounds + 1, size * growth
        for part in (entities[k : k + chain.batch_size] for k in range(0, count, chain.batch_size)):
            starts = chain.initial(part)
            state.rewards += chain.result(chain.finish(starts, 0, part), part, starts).tolist()
            yield chain.event(state, f"round {state.rounds} of {count}: {len(state.rewards)} drawn in all")


def zero_order(chain: Chain, *, neighbours: int = 4, cosine: float = 0.95) -> Iterator[Event]:
    """Climb from a noise to the best of its neighbours; where none is better, go on from a fresh noise.

    A round costs neighbours * T predictions, a fresh pivot T. Anytime: the last round is cut to the budget.

    Args:
        neighbours: of the pivot, a round. The paper's choice for text to image is 2.
        cosine: to the pivot, in (-1, 1), see `neighbour_noise`. The distance is norm * sqrt(2 (1 - cosine)).

    Raises:
        ValueError: options out of range.
    """
    if neighbours < 1:
        raise ValueError(f"neighbours: got {neighbours}, expected >= 1")
    if not -1 < cosine < 1:
        raise ValueError(f"cosine: got {cosine}, expected within (-1, 1)")
    state, fresh = NoiseSearch(), 0
    while chain.ledger.left >= chain.num_steps:
        if state.pivot is None:
            state.pivot = chain.initial([fresh])
            state.pivot_reward = float(_results(chain, state.pivot, state))
            fresh += 1
            yield chain.event(state, f"pivot {fresh}: {state.pivot_reward:.4g}")
            continue
        count = min(neighbours, chain.ledger.left // chain.num_steps)
        pivots = state.pivot.expand(count, *state.pivot.shape[1:])
        names = range(len(state.rewards), len(state.rewards) + count)
        candidates = neighbour_noise(pivots, chain.noise(names, 0, pivots, Role.SEARCH), cosine)
        rewards = _results(chain, candidates, state)
        state.rounds += 1
        k = int(rewards.argmax())
        better = float(rewards[k]) > state.pivot_reward
        if better:
            state.pivot, state.pivot_reward = candidates[k : k + 1], float(rewards[k])
        else:
            state.pivot = None
        yield chain.event(state, f"round {state.rounds}: {'to a neighbour' if better else 'none better'}")


def neighbour_noise(noise: Tensor, gaussian: Tensor, cosine: float) -> Tensor:
    """Noise (N, ...) of the same norm at a fixed angle: |n| (c n/|n| + sqrt(1 - c^2) w), w the part of a Gaussian
    that is orthogonal to n, of norm 1.

    One number has no orthogonal part: c n + sqrt(1 - c^2) gaussian there, which keeps the law of n and not its norm.

    Args:
        noise, gaussian: (N, ...), the latter standard normal.
    """
    sine = math.sqrt(1 - cosine**2)
    if noise[0].numel() == 1:
        return cosine * noise + sine * gaussian
    n, w = noise.flatten(1).double(), gaussian.flatten(1).double()
    norm = n.norm(dim=1, keepdim=True)
    w = w - (w * n).sum(1, keepdim=True) / norm**2 * n
    w = w / w.norm(dim=1, keepdim=True)
    return (cosine * n + sine * norm * w).to(noise.dtype).view_as(noise)


def paths(
    chain: Chain,
    *,
    starts: int = 2,
    branches: int = 4,
    level: float = 0.11,
    forward: float = 0.78,
    backward: float = 0.81,
) -> Iterator[Event]:
    """Search over paths: sample down to a low noise level, then again and again put noise back, branch and select.

    ① `starts` noises are sampled down to `level`. ② Each gets noise put back, to a level `forward` above, `branches`
    times; ③ these are sampled down by `backward`, and ④ the best `starts` of them all go on, by the reward of the
    estimate of x0 of their last step, which costs no prediction more; until level 0 is reached. Then from the top with
    fresh noises, while the budget lasts. A round for which there would be too little left to finish after it takes
    fewer branches, or is left out.

    Levels are places of the schedule, see `path_rounds`; a round takes `branches` * (steps) predictions a start.

    Raises:
        ValueError: options out of range.
    """
    for option, value, least in (("starts", starts, 1), ("branches", branches, 2)):
        if value < least:
            raise ValueError(f"{option}: got {value}, expected >= {least}")
    low, rounds = path_rounds(chain.schedule, level, forward, backward)
    state, entity, fresh = NoiseSearch(), 0, 0
    while count := min(starts, chain.ledger.left // chain.num_steps):
        latents, entities, at = chain.initial(range(fresh, fresh + count)), list(range(entity, entity + count)), low
        fresh, entity = fresh + count, entity + count
        for i in range(low):
            latents = chain.step(latents, i, entities)
        yield chain.event(state, f"{count} sampled to {noise_level(chain.schedule, low):.3g}")
        for high, end in rounds:
            spare = chain.ledger.left - count * (chain.num_steps - end)  # the survivors are finished whatever happens
            taken = min(branches, spare // (count * (end - high)))
            if taken < 2:
                break
            entities = list(range(entity, entity + count * taken))
            entity += count * taken
            latents, estimates = _branch(chain, latents.repeat_interleave(taken, 0), at, high, end, entities)
            at = end
            if end == chain.num_steps:
                break
            survivors = chain.value(estimates).argsort(descending=True, stable=True)[:count].tolist()
            latents, entities = latents[survivors], [entities[k] for k in survivors]
            state.rounds += 1
            yield chain.event(state, f"round {state.rounds}: {count} of {count * taken} go on from step {end}")
        latents = chain.finish(latents, at, entities)
        state.rewards += chain.result(latents, entities).tolist()
        yield chain.event(state, f"{len(state.rewards)} finished")


def path_rounds(
    schedule: Schedule, level: float = 0.11, forward: float = 0.78, backward: float = 0.81
) -> tuple[int, list[tuple[int, int]]]:
    """The place where paths are first stopped, and of each round those that noise is put back to and sampled down to.

    From level s a round goes up to s + forward and down to max(s + forward - backward, 0): ceil(level / (backward -
    forward)) rounds on a fine schedule. On a coarse one each is the nearest place, and a round is at least one step
    further than the round before, so that there are fewer [R].

    Raises:
        ValueError: options that do not lead up and then further down.
    """
    if not (level > 0 and 0 < forward < backward and level + forward <= 1):
        got = f"{level}, {forward}, {backward}"
        raise ValueError(
            f"level, forward, backward: got {got}, expected level > 0, 0 < forward < backward, level + forward <= 1"
        )
    levels = [noise_level(schedule, i) for i in range(schedule.num_steps + 1)]

    def nearest(wanted: float, first: int, last: int) -> int:
        return min(range(first, last + 1), key=lambda i: abs(levels[i] - wanted))

    last = schedule.num_steps
    if last == 1:  # nothing between noise and result
        return 0, []
    low = at = nearest(level, 1, last - 1)
    rounds: list[tuple[int, int]] = []
    while at < last:
        high = nearest(level + forward, 0, at - 1)
        level = max(level + forward - backward, 0.0)
        end = last if level < 1e-9 else nearest(level, at + 1, last)
        rounds.append((high, end))
        at = end
    return low, rounds


def noise_level(schedule: Schedule, index: int) -> float:
    """sigma / (alpha + sigma) at a place of the schedule, in [0, 1]: a flow's own level, and its like elsewhere."""
    alpha, sigma = path_at(schedule, index)
    return sigma / (alpha + sigma)


def _results(chain: Chain, noise: Tensor, state: NoiseSearch) -> Tensor:
    """Rewards (N,) of what these noises become, all by the same step noise."""
    entities = range(len(state.rewards), len(state.rewards) + len(noise))
    rewards = chain.result(chain.finish(noise, 0, [0] * len(noise)), entities, noise)
    state.rewards += rewards.tolist()
    return rewards


def _branch(chain: Chain, latents: Tensor, at: int, high: int, end: int, entities: list[int]) -> tuple[Tensor, Tensor]:
    """Put noise back from place `at` to `high`, sample down to `end`: the states there and the last estimates of x0."""
    noise = chain.noise(entities, high, latents, Role.SEARCH)
    latents = renoise(latents, path_at(chain.schedule, at), path_at(chain.schedule, high), noise)
    estimates = latents
    for i in range(high, end):
        gaussian, estimates = chain.kernel(latents, i, chain.predict(latents, i))
        latents = chain.draw(gaussian, i, entities)
    return latents, estimates
