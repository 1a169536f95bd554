"""A picture of a tree: its best branches with values, visits and thumbnails, and all rewards beside them."""

import math
from collections.abc import Mapping

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from torch import Tensor

from visalign.search.chain import Chain

from .tree import Tree

ROW = 0.85  # inches a leaf
COLOURS = colormaps["viridis"]
PAPER = dict(facecolor="white", edgecolor="none", pad=0.8, alpha=0.8)  # behind text, over edges


def shown_leaves(tree: Tree, count: int = 12) -> list[int]:
    """The leaves of the best rewards, in the order of the picture's rows: a branch's together, the best one's first.

    Raises:
        ValueError: the tree has no leaves, or count is below 1.
    """
    if count < 1:
        raise ValueError(f"count: got {count}, expected >= 1")
    if not tree.scored_leaves:
        raise ValueError("tree: got one without leaves, expected a grown one")
    best = tree.leaves[np.argsort(-tree.rewards, kind="stable")[:count]].tolist()
    tops: dict[int, float] = {}  # of a node: its best reward
    for leaf in best:
        for node in tree.path(leaf):
            tops[node] = max(tops.get(node, -math.inf), float(tree.value[leaf]))
    return sorted(best, key=lambda leaf: [(-tops[node], node) for node in tree.path(leaf)])


def leaf_images(chain: Chain, tree: Tree, leaves: list[int]) -> dict[int, Tensor]:
    """The images (3, H, W) of leaves, decoded in the chain's batches for looking at; not in the ledger."""
    device, images = chain.initial([0]).device, []
    with torch.no_grad():
        for part in torch.cat([tree.states[leaf] for leaf in leaves]).split(chain.batch_size):
            images += list(chain.model.decode(part.to(device), [chain.prompt] * len(part), **chain.inputs).cpu())
    return dict(zip(leaves, images))


def draw_tree(tree: Tree, images: Mapping[int, Tensor] | None = None, *, leaves: int = 12, title: str = "") -> Figure:
    """The best branches, as a figure that `savefig` writes.

    Left: the paths to the best `leaves`, from the noise to the results; a node has the colour of its value, the size
    of its visits, both in figures, and "+n" for its children that are not shown. Right: the rewards of all leaves.

    Args:
        images: by leaf, (3, H, W) in [0, 1], as `leaf_images` decodes those of `shown_leaves`; others have no
            thumbnail.
    """
    rows = shown_leaves(tree, leaves)
    figure = Figure(figsize=(13, max(3.5, ROW * len(rows) + 1.2)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3.2, 1))
    nodes = sorted({node for leaf in rows for node in tree.path(leaf)})
    norm = Normalize(*_range(tree.value[nodes]))
    places = places_of(tree, rows)
    for node in nodes:
        _draw_node(left, tree, node, places, norm)
        hidden = tree.count(node) - sum(other != 0 and tree.parent[other] == node for other in nodes)
        if hidden:
            left.annotate(
                f"+{hidden}", places[node], (0, -15), textcoords="offset points", ha="center", size=7, bbox=PAPER
            )
    for leaf in rows:
        _draw_leaf(left, leaf, float(tree.value[leaf]), places[leaf], images or {})
    _finish(left, tree, len(rows), norm)
    _draw_rewards(right, tree, rows)
    figure.suptitle(title or f"{tree.scored_leaves} leaves, the best {len(rows)} shown")
    return figure


def places_of(tree: Tree, rows: list[int]) -> dict[int, tuple[float, float]]:
    """Column and row of each node on the way to these leaves: leaves one below the other, others amid theirs."""
    under: dict[int, list[int]] = {}
    for row, leaf in enumerate(rows):
        for node in tree.path(leaf):
            under.setdefault(node, []).append(row)
    return {node: (float(tree.depth[node]), (min(own) + max(own)) / 2) for node, own in under.items()}


def _draw_node(axes: Axes, tree: Tree, node: int, places: dict[int, tuple[float, float]], norm: Normalize) -> None:
    x, y = places[node]
    visits = int(tree.visits[node]) - 1  # the first is that of its making
    if node:
        start = places[tree.parent[node]]
        middle = (start[0] + x) / 2
        width = 0.8 + 0.8 * math.log1p(visits)
        axes.plot([start[0], middle, x], [start[1], y, y], color="0.75", linewidth=width, zorder=1)
    colour = COLOURS(norm(float(tree.value[node])))
    axes.scatter([x], [y], s=40 + 25 * math.log1p(visits), color=colour, edgecolor="0.2", linewidth=0.6, zorder=2)
    if tree.count(node) > 1:  # else the value is the child's
        text = f"{tree.value[node]:.3g}  ({visits})"
        axes.annotate(text, (x, y), (0, 9), textcoords="offset points", ha="center", size=7, bbox=PAPER)


def _draw_leaf(axes: Axes, leaf: int, reward: float, place: tuple[float, float], images: Mapping[int, Tensor]) -> None:
    offset = 10
    if leaf in images:
        image = images[leaf].detach().float().clamp(0, 1).permute(1, 2, 0).numpy()
        box = OffsetImage(image, zoom=50 / max(image.shape[:2]), interpolation="nearest")
        axes.add_artist(
            AnnotationBbox(box, place, (36, 0), xycoords="data", boxcoords="offset points", frameon=False, pad=0)
        )
        offset = 66
    axes.annotate(f"{reward:.4g}", place, (offset, 0), textcoords="offset points", va="center", size=9)


def _finish(axes: Axes, tree: Tree, rows: int, norm: Normalize) -> None:
    steps, levels = tree.rules.steps, tree.rules.levels
    names = ["root", *(f"after step {level}\nof {steps}" for level in levels[1:-1]), "results"]
    axes.set_xticks(range(len(levels)), names)
    axes.set_yticks([])
    axes.set_xlim(-0.4, len(levels) - 1 + 0.25 * len(levels))
    axes.set_ylim(rows - 0.4, -0.6)
    axes.spines[:].set_visible(False)
    axes.set_title("value (visits); +n children not shown", size=9)
    bar = axes.figure.colorbar(ScalarMappable(norm, COLOURS), ax=axes, location="bottom", fraction=0.03, aspect=50)
    bar.set_label("value; of a result: its reward")


def _draw_rewards(axes: Axes, tree: Tree, rows: list[int]) -> None:
    numbers = [tree.rollout[leaf] + 1 for leaf in tree.leaves]
    axes.plot(numbers, tree.rewards, ".", color="0.7", label="all results")
    axes.plot(numbers, np.maximum.accumulate(tree.rewards), color="tab:orange", label="best so far")
    axes.plot([tree.rollout[leaf] + 1 for leaf in rows], tree.value[rows], "o", color="tab:green", label="shown", ms=4)
    axes.set_xlabel("rollout")
    axes.set_ylabel("reward")
    axes.legend(loc="lower right", fontsize=8)


def _range(values: np.ndarray) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    return (low, high) if high > low else (low - 0.5, high + 0.5)
