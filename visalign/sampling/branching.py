"""Rollouts that branch: what several images have in common is denoised once.

A tree grows from the noise of each prompt. At a fork, one forward of a node serves all its children: they are draws
from the same Gaussian. A forward is spent on every node, so G images that share their first k of T steps take
k + G (T - k) rows of the denoiser rather than G T.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from visalign.transitions import Schedule, Transition, ode_of

from .seeds import derived_seed, step_noise


@dataclass(frozen=True)
class Fork:
    """The children that a growing node has at one step, in this order; at least one.

    Nodes that have left have one child at each step, by the ODE.

    Attributes:
        grow: by the stochastic step, and growing on.
        leave: by the stochastic step, and leaving.
        ode: one by the ODE, growing on.
        ode_leave: one by the ODE, leaving.
    """

    grow: int = 0
    leave: int = 0
    ode: bool = False
    ode_leave: bool = False

    def __post_init__(self) -> None:
        if self.grow < 0 or self.leave < 0 or not (self.grow or self.leave or self.ode or self.ode_leave):
            raise ValueError(f"fork: got {self}, expected at least one child, and numbers >= 0")

    def children(self) -> list[tuple[bool, bool]]:
        """(stochastic, growing) of each."""
        kinds = [(True, True)] * self.grow + [(True, False)] * self.leave
        return kinds + [(False, True)] * self.ode + [(False, False)] * self.ode_leave


@dataclass
class Layer:
    """One step of a tree, from the M nodes before it to the E nodes after it, which are ordered by their parents.

    Attributes:
        parents: (E,), int64, the node before of each node after.
        drawn: (K,), int64, ascending: the nodes after that came by the stochastic step. The others came by the ODE.
        latents: (M, ...), the nodes before; None where K is 0.
        next_latents: (K, ...), the actions: the states of the nodes in `drawn`.
        log_probs: (K,), of the actions, mean over latent dimensions.
    """

    parents: Tensor
    drawn: Tensor
    latents: Tensor | None
    next_latents: Tensor
    log_probs: Tensor


@dataclass
class Tree:
    """P trees, one a prompt, all of one form; nothing carries gradient.

    Attributes:
        prompts, seeds: P of each.
        schedule: of the rollout.
        roots: T + 1 of (W,): the prompt that each node of a depth belongs to; nodes are ordered by it.
        layers: T of them; layer i is step i.
        final: (L, ...), the leaves' latents.
        images: (L, 3, H, W), float32 in [0, 1]; None if not decoded.
        forwards: rows that went through the denoiser.
        fresh, gaps: as of a `Trajectory`.
    """

    prompts: list[str]
    seeds: list[int]
    schedule: Schedule
    roots: list[Tensor]
    layers: list[Layer]
    final: Tensor
    images: Tensor | None
    forwards: int
    fresh: bool = False
    gaps: list[Tensor] = field(default_factory=list, repr=False)

    def old_log_probs(self, i: int, edges: Tensor, log_prob: Tensor) -> Tensor:
        """As `visalign.sampling.rollout.old_log_probs`, of some edges of layer i, (K,)."""
        layer = self.layers[i]
        if self.fresh:
            self.gaps.append((log_prob.detach() - layer.log_probs[edges]).abs().max())
            layer.log_probs[edges] = log_prob.detach()
        return layer.log_probs[edges]

    def __len__(self) -> int:
        return len(self.final)

    @property
    def leaf_prompts(self) -> list[str]:
        return [self.prompts[root] for root in self.roots[-1].tolist()]

    @property
    def separate_forwards(self) -> int:
        """Rows that as many images would have taken without sharing."""
        return len(self) * self.schedule.num_steps

    def ancestors(self) -> list[Tensor]:
        """T + 1 of (L,): the node of each depth that each leaf descends from, or is."""
        ancestors = [torch.arange(len(self))]
        for layer in reversed(self.layers):
            ancestors.append(layer.parents[ancestors[-1]])
        return ancestors[::-1]


def branched_rollout(
    generator: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    transition: Transition,
    forks: Mapping[int, Fork],
    *,
    noise_seeds: Sequence[int] | None = None,
    batch_size: int | None = None,
    decode: bool = True,
    grad_mode: bool = False,
    **inputs: Any,
) -> Tree:
    """Grow a tree from each prompt's noise to its images.

    The noise of a node depends on its noise seed and its path alone, never on the batch or on other trees.

    Args:
        generator: a `visalign.pipeline.generator.Generator`.
        prompts, seeds: P of each; seeds give the initial noise.
        transition: of the stochastic steps.
        forks: by step; growing nodes have one child by the ODE at other steps.
        noise_seeds: P, for the noise of the steps; None: `seeds`.
        batch_size: most rows of a forward and of a decoding; None: all.
        grad_mode: run with gradients enabled and throw them away, see `visalign.sampling.rollout.rollout`.
        inputs: arguments of the pipeline for every call, the same for all prompts.

    Raises:
        ValueError: wrong lengths; a fork outside the schedule, or a stochastic child where the transition has std 0.
    """
    prompts, seeds = list(prompts), list(seeds)
    noise_seeds = seeds if noise_seeds is None else list(noise_seeds)
    for name, given in (("seeds", seeds), ("noise_seeds", noise_seeds)):
        if len(given) != len(prompts):
            raise ValueError(f"{name}: got {len(given)}, expected {len(prompts)}, one per prompt")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, expected >= 1")
    schedule: Schedule = generator.schedule
    _check_forks(forks, schedule, transition)
    grower = _Grower(schedule, transition, forks, noise_seeds)
    states: Tensor | None = None
    start, forwards = 0, 0
    while start < schedule.num_steps:
        stop = grower.plan(start)
        rows = len(grower.seeds)
        roots = [(prompts[r], seeds[r]) for r in grower.roots[start].tolist()]
        for low in range(0, rows, batch_size or rows):
            high = min(rows, low + (batch_size or rows))
            begin = {} if states is None else {"latents": states[low:high], "start": start}
            grower.low, grower.high = low, high
            with torch.set_grad_enabled(grad_mode):
                generator.denoise(
                    [p for p, _ in roots[low:high]],
                    [s for _, s in roots[low:high]],
                    grower,
                    stop=stop,
                    **begin,
                    **inputs,
                )
        states = grower.close()
        forwards += rows * (stop - start)
        start = stop
    assert states is not None
    tree = Tree(prompts, seeds, schedule, grower.roots, grower.layers, states, None, forwards)
    if decode:
        roots = [(prompts[r], seeds[r]) for r in tree.roots[-1].tolist()]
        size = batch_size or len(tree)
        with torch.no_grad():
            pieces = [
                generator.decode(states[k : k + size], *zip(*roots[k : k + size]), **inputs)
                for k in range(0, len(tree), size)
            ]
        tree.images = torch.cat(pieces)
    return tree


class _Grower:
    """The step function of a tree's pipeline calls: each runs a chunk of nodes up to and with the next change of width.

    `plan` lays out the nodes of these steps, `low` and `high` are the chunk's first and last + 1, `close` joins them.
    """

    def __init__(self, schedule: Schedule, transition: Transition, forks: Mapping[int, Fork], seeds: list[int]):
        self.schedule, self.transition, self.forks, self.ode = schedule, transition, forks, ode_of(schedule)
        self.seeds, self.growing = list(seeds), [True] * len(seeds)  # of the nodes before the next step
        self.roots: list[Tensor] = [torch.arange(len(seeds))]
        self.layers: list[Layer] = []
        self.planned: dict[int, tuple[list[int], list[bool], list[int]]] = {}  # parents, stochastic, seeds
        self.pieces: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}  # states before, drawn after, log-probs
        self.following: list[Tensor] = []
        self.low = self.high = 0  # nodes of the chunk

    def plan(self, start: int) -> int:
        """Lay out the steps from `start` on; returns the one after the first at which the number of nodes changes."""
        self.planned, self.pieces, self.following = {}, {}, []
        self.next_seeds, self.next_growing, roots = self.seeds, self.growing, self.roots[-1]
        for i in range(start, self.schedule.num_steps):
            parents, drawn, growing, seeds = [], [], [], []
            for m, (seed, grows) in enumerate(zip(self.next_seeds, self.next_growing)):
                children = self.forks.get(i, Fork(ode=True)).children() if grows else [(False, False)]
                several = sum(stochastic for stochastic, _ in children) > 1
                for k, (stochastic, on) in enumerate(children):
                    parents.append(m)
                    drawn.append(stochastic)
                    growing.append(on)
                    seeds.append(derived_seed(seed, 6, i, k) if stochastic and several else seed)
            self.planned[i] = parents, drawn, seeds
            self.pieces[i] = []
            self.next_seeds, self.next_growing, roots = seeds, growing, roots[parents]
            self.roots.append(roots)
            if len(parents) != len(self.seeds):
                return i + 1
        return self.schedule.num_steps

    def __call__(self, step_index: int, latents: Tensor, prediction: Tensor) -> Tensor:
        latents, prediction = latents.detach(), prediction.detach()
        parents, drawn, seeds = self.planned[step_index]
        local = [e for e, m in enumerate(parents) if self.low <= m < self.high]
        rows = torch.tensor([parents[e] - self.low for e in local], device=latents.device)
        random = [k for k, e in enumerate(local) if drawn[e]]
        following = self.ode(self.schedule, step_index, latents, prediction)[0].mean[rows]
        actions, log_probs = following[:0], latents.new_zeros(0)
        if random:
            gaussian = self.transition(self.schedule, step_index, latents, prediction)[0].take(rows[random])
            actions = gaussian.sample(step_noise([seeds[local[k]] for k in random], step_index, gaussian.mean))
            log_probs = gaussian.log_prob(actions)
            following = following.clone()
            following[random] = actions
        self.pieces[step_index].append((latents, actions, log_probs))
        if step_index == max(self.planned):
            self.following.append(following)
            return latents  # the pipeline is left here, and its width cannot change
        return following

    def close(self) -> Tensor:
        """Record the planned steps; returns the states after them."""
        for i, (parents, drawn, _) in self.planned.items():
            latents, actions, log_probs = (torch.cat(parts) for parts in zip(*self.pieces[i]))
            rows = torch.tensor(drawn).nonzero().flatten()
            self.layers.append(Layer(torch.tensor(parents), rows, latents if len(rows) else None, actions, log_probs))
        self.seeds, self.growing = self.next_seeds, self.next_growing
        return torch.cat(self.following)


def _check_forks(forks: Mapping[int, Fork], schedule: Schedule, transition: Transition) -> None:
    for i, fork in forks.items():
        if not 0 <= i < schedule.num_steps:
            raise ValueError(f"forks: got step {i}, expected within 0 .. {schedule.num_steps - 1}")
        if (fork.grow or fork.leave) and transition.std(schedule, i) == 0:
            raise ValueError(f"forks: got {fork} at step {i}, where {transition!r} has std 0, expected std > 0")
