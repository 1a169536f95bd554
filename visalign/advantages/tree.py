"""Rewards of a tree's leaves to advantages of its edges, and which branches are trained.

An edge is named by the node it leads to; nodes of one depth are numbered 0 .. W-1, as in `sampling.branching.Tree`.
"""

from typing import Literal

import torch
from torch import Tensor

from .group import group_advantages, group_statistics


def node_means(rewards: Tensor, ancestors: Tensor, count: int, valid: Tensor | None = None) -> Tensor:
    """BranchGRPO's value of a node (arXiv:2509.06040): the mean reward of the leaves below it, (W,) float64.

    Args:
        rewards: (L,), of the leaves.
        ancestors: (L,), int64: the node of this depth that each leaf descends from.
        count: W, nodes of this depth, each with a leaf.
        valid: (L,) bool: leaves that could be scored; a node without any has 0. None: all.
    """
    if rewards.shape != ancestors.shape or rewards.dim() != 1:
        shapes = f"{tuple(rewards.shape)}, {tuple(ancestors.shape)}"
        raise ValueError(f"rewards, ancestors: got shapes {shapes}, expected (L,) each")
    if valid is not None:
        rewards, ancestors = rewards[valid], ancestors[valid]
    sums = torch.zeros(count, dtype=torch.float64).index_add(0, ancestors, rewards.detach().double())
    return sums / torch.bincount(ancestors, minlength=count).clamp(min=1)


def depth_advantages(
    values: Tensor, trees: Tensor, eps: float = 1e-8, least_std: float = 1e-6, valid: Tensor | None = None
) -> Tensor:
    """BranchGRPO's advantages of the nodes of one depth (arXiv:2509.06040), (W,) float32; each tree's sum to 0.

    (value - mean) / (std + eps) over the nodes of the same tree, ddof 1; 0 for a node that is alone at its depth and
    where the std is below `least_std`.

    Args:
        values: (W,), from `node_means`.
        trees: (W,), int64: the tree of each node.
        valid: (W,) bool: nodes with a value; the others get 0. None: all.
    """
    if valid is not None and not valid.all():
        out = torch.zeros(len(values))
        if valid.any():
            out[valid] = depth_advantages(values[valid], trees[valid], eps, least_std)
        return out
    advantages = group_advantages(values, trees, ddof=1, eps=eps, mode="add")
    stats = group_statistics(values, trees, ddof=1)
    spread = stats.stds[torch.searchsorted(stats.group_ids, trees)]
    return torch.where(spread < least_std, torch.zeros_like(advantages), advantages)


def keep_leaves(
    rewards: Tensor, branches: Tensor, mode: Literal["half", "extreme"], valid: Tensor | None = None
) -> Tensor:
    """BranchGRPO's pruning by width (arXiv:2509.06040) as its paper tells it: the leaves that are trained, (L,) bool.

    Edges above stay if they lead to one of these. What its code does is `keep_transitions`.

    Of the leaves of one branch (siblings of the last split) the better half, rounded down but at least one ("half"), or
    the best and the worst ("extremes"). Of equal ones the first. "none": all leaves.

    Args:
        rewards, branches: (L,); leaves of one branch have the same number.
        valid: (L,) bool: leaves that could be scored, of which these are chosen. None: all.
    """
    if mode not in ("half", "extreme"):
        raise ValueError(f"mode: got {mode!r}, expected 'half' or 'extreme'")
    valid = torch.ones(len(rewards), dtype=torch.bool) if valid is None else valid
    selected = torch.zeros_like(valid)
    for branch in branches[valid].unique():
        rows = ((branches == branch) & valid).nonzero().flatten()
        order = rows[rewards[rows].argsort(descending=True, stable=True)]
        worst = rows[rewards[rows].argmin()]
        selected[order[: max(1, len(rows) // 2)] if mode == "half" else torch.stack([order[0], worst])] = True
    return selected


def pruned_depths(step: int, size: int, iterations: int, last: int, stop: int) -> range:
    """BranchGRPO's pruning by depth (arXiv:2509.06040): the depths whose nodes are not trained in an iteration.

    A window of `size` depths that moves by one towards the noise every `iterations`, and stays where it begins at
    depth `stop`, the last split's, as in its code. There its first place is given by hand (15 to 18 of 20); ours is
    the deepest, up to `last`, the leaves' depth.
    """
    first = max(last - size + 1, 1)
    start = max(first - step // iterations, min(first, max(stop, 1)))
    return range(start, min(start + size, last + 1))


def keep_transitions(advantages: Tensor, branches: Tensor, trees: Tensor, mode: Literal["half", "extremes"]) -> Tensor:
    """BranchGRPO's pruning by width as its code has it: which transitions after the last split are trained, (K,) bool.

    "half": of each branch, what descends from one node of the last split, the half with the larger advantages, at least
    one. "extremes": of all the half that is farthest out, as many of the largest as of the smallest (one more of these
    where the number is odd), at least one of each. There "all" are those of a process; here of a tree, so that the
    number of processes changes nothing.

    Args:
        advantages, branches, trees: (K,), of the transitions of all layers after the last split.
    """
    if mode not in ("half", "extremes"):
        raise ValueError(f"mode: got {mode!r}, expected 'half' or 'extremes'")
    kept = torch.zeros(len(advantages), dtype=torch.bool)
    for group in (branches if mode == "half" else trees).unique():
        rows = ((branches if mode == "half" else trees) == group).nonzero().flatten()
        order = rows[advantages[rows].argsort(descending=True, stable=True)]
        if mode == "half":
            kept[order[: max(1, len(rows) // 2)]] = True
        else:
            count = max(2, len(rows) // 2)
            kept[order[: count // 2]] = kept[order[-(count - count // 2) :]] = True
    return kept


def tree_backup(
    advantages: Tensor,
    log_probs: Tensor,
    parents: Tensor,
    count: int,
    weights: Literal["uniform", "softmax"],
    valid: Tensor | None = None,
) -> Tensor:
    """TreeGRPO's advantage of a node (arXiv:2512.08153): the weighted mean of its children's, (M,), like `advantages`.

    With "softmax" the weight of a child is the softmax over siblings of the sampling policy's log-probability, as in
    the authors' algorithm. Which reduction of it they take is not known: with the mean over latent dimensions the
    weights are almost uniform, with the sum almost one-hot. "uniform" is ours.

    Args:
        advantages, log_probs: (E,), of the edges to the children.
        parents: (E,), int64.
        count: M, nodes, each with a child.
        valid: (E,) bool: edges with a scored leaf below; a node without any has 0. None: all.
    """
    if weights not in ("uniform", "softmax"):
        raise ValueError(f"weights: got {weights!r}, expected 'uniform' or 'softmax'")
    if valid is not None:
        advantages, log_probs, parents = advantages[valid], log_probs[valid], parents[valid]
    scores = torch.zeros_like(advantages) if weights == "uniform" else log_probs.to(advantages.dtype)
    top = torch.full((count,), -torch.inf, dtype=scores.dtype).scatter_reduce(0, parents, scores, "amax")
    exp = (scores - top[parents]).exp()
    zeros = advantages.new_zeros(count)
    mass = zeros.index_add(0, parents, exp)
    return zeros.index_add(0, parents, exp * advantages) / torch.where(mass > 0, mass, 1.0)


def progressive_steps(stage: int, first: int, last: int, stages: int) -> int:
    """B2-DiffuRL's number of trained steps at a stage (arXiv:2503.11240), counted from the image: first .. last.

    first + floor(stage (last - first + 1) / stages), and `last` from stage `stages` on.
    """
    if not 1 <= first <= last:
        raise ValueError(f"first, last: got {first}, {last}, expected 1 <= first <= last")
    if stage < 0 or stages < 1:
        raise ValueError(f"stage, stages: got {stage}, {stages}, expected >= 0 and >= 1")
    return min(last, first + stage * (last - first + 1) // stages)


def history_scores(rewards: Tensor, past: Tensor) -> Tensor:
    """B2-DiffuRL's normalised scores of one prompt, (N,) float32: by mean and std of these and earlier rewards.

    ddof 1, eps 1e-8; all 0 where the rewards are all equal, or there is but one.

    Args:
        rewards: (N,), of this stage. past: (M,), of the stages before that still count; may be empty.
    """
    rewards = rewards.detach().double()
    every = torch.cat([past.double(), rewards])
    if len(every) < 2 or bool((every == every[0]).all()):
        return torch.zeros(len(rewards))
    return ((rewards - every.mean()) / (every.std() + 1e-8)).float()


def select_branches(scores: Tensor, branches: Tensor, high: float = 0.5, low: float = -0.5) -> Tensor:
    """B2-DiffuRL's choice (arXiv:2503.11240): of the siblings of one split the best and the worst, if they stand out.

    The best where its score is >= high, the worst where its score is < low. Of equal ones the first.

    Args:
        scores: (N,), from `history_scores`.
        branches: (N,), int64: siblings have the same.

    Returns:
        (N,), bool: at most two of each.
    """
    if not low <= high:
        raise ValueError(f"high, low: got {high}, {low}, expected low <= high")
    selected = torch.zeros(len(scores), dtype=torch.bool)
    for branch in branches.unique():
        rows = (branches == branch).nonzero().flatten()
        best, worst = rows[scores[rows].argmax()], rows[scores[rows].argmin()]
        selected[best] |= bool(scores[best] >= high)
        selected[worst] |= bool(scores[worst] < low)
    return selected
