"""Rollouts of a tree: what they cost, which fit in a budget, and several of them finished together."""

from bisect import bisect_right

import torch
from torch import Tensor

from visalign.search.chain import Chain
from visalign.search.twist import draw_twisted

from .tree import Tree


def _origin(tree: Tree, leaf: int) -> int:
    """The node that the leaf's rollout starts from."""
    node = leaf
    while tree.rollout[node] == tree.rollout[leaf]:
        node = tree.parent[node]
    return node


def cost(tree: Tree, origin: int) -> int:
    """Predictions of a rollout from a node."""
    return tree.rules.steps - tree.level(origin) - (tree.rules.cache and origin != 0)


def cheapest(tree: Tree) -> int:
    """Predictions that any rollout needs, so far."""
    rules = tree.rules
    return rules.steps - rules.levels[-2] - rules.cache if rules.branch_at and tree.leaf else rules.steps


def affordable(tree: Tree, left: int) -> list[int]:
    """The first queued leaves, as many as have rollouts that fit in what is left: never one before an earlier one."""
    batch = []
    for leaf in tree.queue:
        left -= cost(tree, _origin(tree, leaf))
        if left < 0:
            break
        batch.append(leaf)
    return batch


def roll_out(chain: Chain, tree: Tree, batch: list[int], device: torch.device) -> None:
    """Finish these leaves' rollouts together: the levels are walked once, rows join at the level they start from."""
    origins = {leaf: _origin(tree, leaf) for leaf in batch}
    paths = {leaf: tree.path(leaf) for leaf in batch}
    depths = {level: depth for depth, level in enumerate(tree.rules.levels) if depth}
    log_weights = {leaf: [0.0] * len(path) for leaf, path in paths.items()}
    walking: list[int] = []
    parts: list[Tensor] = []
    for step in range(min(tree.level(origin) for origin in origins.values()), chain.num_steps):
        joining = [leaf for leaf in batch if tree.level(origins[leaf]) == step]
        if joining:
            walking += joining
            parts += _starts(chain, tree, joining, origins, device)
        # Rollouts that start deeper wait for the walk to reach their level: one prediction a level serves all of them,
        # and a row's noise is keyed by its rollout, so the company it walks in changes nothing.
        latents = torch.cat(parts)
        rows = [tree.rollout[leaf] for leaf in walking]
        prediction, gradient = _predict(chain, tree, latents, step, [origins[leaf] for leaf in joining])
        if tree.rules.cache and step in depths:
            for row, leaf in zip(prediction.cpu().split(1), walking):
                tree.predictions.setdefault(paths[leaf][depths[step]], row)
        gaussian = chain.kernel(latents, step, prediction)[0]
        if gradient is None:
            latents = chain.draw(gaussian, step, rows)
        else:
            scale = tree.rules.reward_guidance * tree.tilt * chain.stds[step] ** 2
            latents, ratios = draw_twisted(chain, gaussian, step, rows, gradient, scale, tree.rules.clip)
            for leaf, ratio in zip(walking, ratios.tolist()):
                log_weights[leaf][bisect_right(tree.rules.levels, step)] += ratio
        if step + 1 in depths:
            for row, leaf in zip(latents.cpu().split(1), walking):
                tree.states[paths[leaf][depths[step + 1]]] = row
        parts = [latents]
    latents = latents[[walking.index(leaf) for leaf in batch]]
    rewards = chain.result(latents, [tree.rollout[leaf] for leaf in batch])
    for leaf, reward in zip(batch, rewards.tolist()):
        tree.queue.remove(leaf)
        for node, log_weight in zip(paths[leaf], log_weights[leaf]):
            if tree.rules.weighted and not tree.scored[node]:
                tree.log_weight[node] = log_weight
        tree.score(leaf, reward)


def _starts(
    chain: Chain, tree: Tree, joining: list[int], origins: dict[int, int], device: torch.device
) -> list[Tensor]:
    """The states that rollouts of one level start from: noise of their own above the root."""
    if not origins[joining[0]]:
        return [chain.initial([tree.rollout[leaf] for leaf in joining])]
    return [tree.states[origins[leaf]].to(device) for leaf in joining]


def _predict(chain: Chain, tree: Tree, latents: Tensor, step: int, joined: list[int]) -> tuple[Tensor, Tensor | None]:
    """Predictions of the rows, (N, ...), and the gradients of the estimates' rewards where the step is guided.

    Predictions are those kept at the nodes that the last rows have just joined from, if any.
    """
    if _guided(chain, tree, step):
        valued = chain.value_gradient(latents, step)
        return valued.prediction, valued.gradient
    known = [tree.predictions[node].to(latents.device) for node in joined if node in tree.predictions]
    fresh = latents[: len(latents) - len(known)]
    return torch.cat([chain.predict(fresh, step), *known] if len(fresh) else known), None


def _guided(chain: Chain, tree: Tree, step: int) -> bool:
    """Whether the step is shifted: not while the unit of reward, and with it the tilt, is being measured."""
    rules = tree.rules
    late = step >= rules.guidance_start * rules.steps
    return rules.reward_guidance > 0 and late and chain.stds[step] > 0 and not tree.measuring
