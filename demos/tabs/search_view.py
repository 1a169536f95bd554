"""How a search stands, drawn so that it can be clicked: the tree's best branches, or the pictures it last looked at."""

from dataclasses import dataclass, field

from PIL import Image

from visalign.demos.markup import data_uri, note, text
from visalign.images import images_to_pil
from visalign.search import Chain, Event
from visalign.search.particles.particles import Particles
from visalign.search.tree.picture import leaf_images, places_of, shown_leaves
from visalign.search.tree.tree import Tree

LEAVES = 8
PICTURES = 16
ROW, COLUMN = 66, 56  # pixels: the height of a row, the least width of a column

CSS = """
.va-tree { position: relative; margin: 8px 0; width: 100%; max-width: 720px }
.va-leaves-first { direction: rtl }
.va-leaves-first .va-tree { direction: ltr }
.va-tree svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible }
.va-tree path { fill: none; stroke: #8a8f98; stroke-width: 1.5; vector-effect: non-scaling-stroke }
.va-tree button { position: absolute; transform: translate(-50%, -50%); }
.va-node { border: 1px solid var(--border-color-primary); border-radius: 6px; color: var(--body-text-color);
  background: var(--background-fill-primary); font-size: 12px; line-height: 1.2; padding: 3px 5px; cursor: pointer;
  text-align: center }
.va-node:hover, .va-node:focus-visible { outline: 3px solid #1f6fb4 }
.va-node img { display: block; width: 44px; height: 44px; object-fit: cover; margin: 0 auto 1px }
.va-grid .va-node img { width: 100%; height: auto }
"""
CLICK = """
element.addEventListener("click", (event) => {
  const node = event.target.closest("[data-node]");
  if (node) trigger("click", {node: node.dataset.node});
});
"""


@dataclass
class View:
    """What is on the page, and by node what a click on it shows: a picture and words."""

    html: str = ""
    nodes: dict[str, tuple[Image.Image, str]] = field(default_factory=dict)


class Viewer:
    """Views of one search; pictures of leaves are decoded once. To be called where the model may be used."""

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self._leaves: dict[int, Image.Image] = {}

    def view(self, event: Event, old: View) -> View:
        """How things stand at an event; an event without a state leaves the old view."""
        if isinstance(event.state, Tree):
            return self._tree(event.state) if event.state.scored_leaves else View(note("Nothing is finished yet."))
        return self._pictures(event) if event.state is not None and self.chain.images is not None else old

    def _tree(self, tree: Tree) -> View:
        rows = shown_leaves(tree, LEAVES)
        fresh = [leaf for leaf in rows if leaf not in self._leaves]
        if fresh:
            leaves = leaf_images(self.chain, tree, fresh)
            self._leaves |= {leaf: images_to_pil(image[None])[0] for leaf, image in leaves.items()}
        places, nodes, parts, edges = places_of(tree, rows), {}, "", ""
        columns, height = len(tree.rules.levels), len(rows) * ROW
        for node, (column, row) in sorted(places.items()):
            x, y = 100 * (column + 0.5) / columns, (row + 0.5) * ROW
            if node:
                before = places[tree.parent[node]]
                x0, y0 = 100 * (before[0] + 0.5) / columns, (before[1] + 0.5) * ROW
                middle = (x0 + x) / 2
                edges += f'<path d="M{x0:.1f} {y0:.0f} C{middle:.1f} {y0:.0f} {middle:.1f} {y:.0f} {x:.1f} {y:.0f}"/>'
            best = next(leaf for leaf in rows if node in tree.path(leaf))  # rows have the best of a branch first
            nodes[str(node)] = (self._leaves[best], _words(tree, node, best))
            thumbnail = self._leaves[node] if tree.is_leaf(node) else None
            parts += _button(str(node), f"{tree.value[node]:.3f}", thumbnail, x, y)
        summary = note(
            f"{tree.scored_leaves} results; the best {len(rows)}, and the way to each from the noise at the left."
        )
        box = f'viewBox="0 0 100 {height}" preserveAspectRatio="none" aria-hidden="true"'
        size = f"min-width:{columns * COLUMN}px;height:{height}px"
        frame = f'<div class="va-tree" style="{size}"><svg {box}>{edges}</svg>{parts}</div>'
        return View(f'{summary}<div class="va-scroll va-leaves-first">{frame}</div>', nodes)

    def _pictures(self, event: Event) -> View:
        assert self.chain.images is not None
        pictures = images_to_pil(self.chain.images[:PICTURES].clamp(0, 1))
        values: list[float] = []
        if isinstance(event.state, Particles):
            values, what = event.state.rewards.tolist(), "particles, as they would look if finished now"
        else:
            what = "pictures it scored last"
            values = list(event.rewards) if len(event.rewards) == len(self.chain.images) else []
        nodes, parts = {}, ""
        for k, picture in enumerate(pictures):
            value = f"{values[k]:.3f}" if k < len(values) else ""
            nodes[str(k)] = (picture, f"Picture {k + 1}{f', value {value}' if value else ''}.")
            parts += _button(str(k), value, picture)
        return View(note(f"The {what}.") + f'<div class="va-grid">{parts}</div>', nodes)


def _words(tree: Tree, node: int, best: int) -> str:
    if tree.is_leaf(node):
        return f"Result {tree.rollout[node] + 1}, reward {tree.value[node]:.4f}."
    level = "the root" if node == 0 else f"a state before step {tree.level(node) + 1} of {tree.rules.steps}"
    return (
        f"This is {level}: value {tree.value[node]:.4f}, {int(tree.visits[node]) - 1} visits, {tree.count(node)} "
        f"branches. The picture is its best result, reward {tree.value[best]:.4f}."
    )


def _button(
    node: str, words: str, picture: Image.Image | None = None, x: float | None = None, y: float | None = None
) -> str:
    place = "" if x is None else f' style="left:{x:.1f}%;top:{y:.0f}px"'
    image = "" if picture is None else f'<img alt="" src="{data_uri(picture)}">'
    label = f"node {node}" + (f", value {words}" if words else "")
    facts = f'data-node="{text(node)}" aria-label="{text(label)}"'
    return f'<button class="va-node" type="button" {facts}{place}>{image}{text(words)}</button>'
