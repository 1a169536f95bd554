"""Soft value-based decoding: at every level the best, or a likely, of several continuations goes on.

SVDD (Li et al. 2024, arXiv:2408.08252) with the value of its PM variant, the reward of the estimate of x0 (the MC
variant needs a trained regressor, which is not here). In blocks of several steps it is CoDe. A heuristic: with finitely
many children its results do not follow the tilted law, unlike `fk`'s.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visalign.search.chain import Chain
from visalign.search.records import Event, Role


@dataclass(frozen=True)
class Decoding:
    """K independent chains at the end of a block.

    Attributes:
        latents: (K, ...), of the children chosen.
        values: (K, M), float64: of all children, the reward of the estimate of x0 or at the end of the result; empty
            where a block has no choice to make.
        chosen: (K,), int64: which child of each.
    """

    latents: Tensor
    values: Tensor
    chosen: Tensor


def choose_children(values: Tensor, tilt: float, uniforms: Tensor) -> Tensor:
    """A child for each row of values (K, M): drawn by exp(tilt * value); for tilt inf the best, the first of equals.

    uniforms: (K,) in [0, 1), one draw a row. Returns (K,), int64.
    """
    if tilt == math.inf:
        return values.argmax(1)
    reached = torch.softmax(tilt * values, 1).cumsum(1)
    points = (uniforms * reached[:, -1])[:, None]
    return torch.searchsorted(reached, points, right=True)[:, 0].clamp(max=values.shape[1] - 1)


def svdd(
    chain: Chain,
    *,
    chains: int | None = None,
    children: int = 20,
    tilt: float = math.inf,
    block: int = 1,
) -> Iterator[Event]:
    """M children a block, one of which goes on. An event for each block. NFE 1 + M (T - 1) a chain at most.

    The child chosen keeps its prediction, so that the next block starts from it without another call. Where a block
    draws no noise there is one child.

    Args:
        chains: K independent ones; None: as many as the budget holds. Child m of chain k has the step noise of entity
            k M + m, chain k the initial noise of entity k.
        children: M.
        tilt: a child is drawn in proportion to exp(tilt * value); inf takes the best, as the published code does.
        block: steps from one choice to the next; the last block is cut.

    Raises:
        ValueError: an option that cannot work, or more chains than the budget holds; before anything is spent.
    """
    if children < 1:
        raise ValueError(f"children: got {children}, expected >= 1")
    if not tilt >= 0:
        raise ValueError(f"tilt: got {tilt}, expected >= 0, or inf for the best")
    if block < 1:
        raise ValueError(f"block: got {block}, expected >= 1")
    count = _affordable(chain, chains, children)
    steps = chain.num_steps
    latents = chain.initial(range(count))
    prediction = chain.predict(latents, 0)
    for first in range(0, steps, block):
        last = min(first + block, steps)
        width = children if any(chain.stds[first:last]) else 1
        parents = torch.arange(count, device=latents.device).repeat_interleave(width)
        entities = [k * children + m for k in range(count) for m in range(width)]
        latents, prediction = latents[parents], prediction[parents]
        for i in range(first, last):
            gaussian, _ = chain.kernel(latents, i, prediction)
            latents = chain.draw(gaussian, i, entities)
            prediction = chain.predict(latents, i + 1) if i + 1 < steps else prediction
        if last == steps:
            values = chain.result(latents, entities).view(count, width)
        elif width > 1:
            values = chain.value(chain.kernel(latents, last, prediction)[1]).view(count, width)
        else:
            values = torch.zeros(count, 0, dtype=torch.float64)
        draws = torch.cat([torch.rand(1, generator=chain.random(Role.SELECT, k, first)) for k in range(count)])
        chosen = choose_children(values, tilt, draws.double()) if values.numel() else torch.zeros(count).long()
        rows = (torch.arange(count) * width + chosen).to(latents.device)
        latents, prediction = latents[rows], prediction[rows]
        yield chain.event(Decoding(latents, values, chosen), f"steps {first} to {last}: chose of {width}")


def svdd_nfe(num_steps: int, children: int) -> int:
    """Guided predictions a chain: 1 + M (T - 1), whatever the block."""
    return 1 + children * (num_steps - 1)


def svdd_least(num_steps: int, options: dict[str, Any]) -> int:
    """Guided predictions of the smallest run of `svdd`: all its chains, or one if they follow from the budget."""
    count = options.get("chains")
    return (1 if count is None else count) * svdd_nfe(num_steps, options.get("children", 20))


def _affordable(chain: Chain, chains: int | None, children: int) -> int:
    nfe = svdd_nfe(chain.num_steps, children)
    most = chain.ledger.left // nfe
    if chains is None and chain.ledger.max_nfe is None:
        raise ValueError("chains: got None without a budget, expected a number")
    count = most if chains is None else chains
    if not 1 <= count <= most:
        raise ValueError(f"chains: got {chains}, expected 1 .. {most}, at {nfe} denoiser calls each")
    return count
