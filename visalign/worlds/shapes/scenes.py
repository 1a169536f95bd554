"""What a shapes picture is about: objects, counts and one relation, as a caption's meaning and as a placed scene.

A `Spec` is the meaning of a caption ("two red circles", "a red star above a blue square"); a `Scene` is one picture of
it: every object with a place and a size in pixels, and a background. `sample_spec` draws meanings from one of three
splits that share no meaning; `place` draws a scene for a meaning.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SIZE = 64  # pixels a side
SHAPES = ("circle", "square", "triangle", "star")
COLOURS = {
    "red": (0.86, 0.14, 0.16),
    "green": (0.12, 0.64, 0.22),
    "blue": (0.13, 0.30, 0.90),
    "yellow": (0.96, 0.84, 0.12),
    "purple": (0.60, 0.18, 0.80),
    "orange": (0.98, 0.50, 0.08),
}
RELATIONS = ("left of", "right of", "above", "below")
KINDS = ("single", "count", "pair", "relation", "triple", "mixed")
KIND_WEIGHTS = (0.2, 0.25, 0.2, 0.2, 0.075, 0.075)  # how often each is drawn
SPLITS = ("train", "test", "compositional")
HELD_OUT = {("purple", "star"), ("orange", "triangle"), ("green", "square"), ("blue", "circle")}  # never trained on
_OPPOSITE = {"right of": "left of", "below": "above"}


@dataclass(frozen=True)
class Spec:
    """Meaning of a caption: ((colour, shape, count), ...) in the order named; the first's relation to the second."""

    groups: tuple[tuple[str, str, int], ...]
    relation: str | None = None

    @property
    def num_objects(self) -> int:
        return sum(count for _, _, count in self.groups)

    @property
    def kind(self) -> str:
        """One of KINDS."""
        if self.relation:
            return "relation"
        if len(self.groups) == 1:
            return "single" if self.num_objects == 1 else "count"
        if any(count > 1 for _, _, count in self.groups):
            return "mixed"
        return "pair" if len(self.groups) == 2 else "triple"

    def key(self) -> str:
        """The same string for every wording of the same meaning ("A right of B" is "B left of A")."""
        groups, relation = list(self.groups), self.relation
        if relation in _OPPOSITE:
            groups, relation = groups[::-1], _OPPOSITE[relation]
        elif relation is None:
            groups = sorted(groups)
        return f"{groups}|{relation}"

    def split(self) -> str:
        """The split this meaning belongs to: "compositional" if it names a held-out pair, else by a stable hash."""
        if any((colour, shape) in HELD_OUT for colour, shape, _ in self.groups):
            return "compositional"
        return "test" if hashlib.md5(self.key().encode()).digest()[0] < 36 else "train"


@dataclass(frozen=True)
class Placed:
    """One object: its centre and circumscribed radius in pixels, x to the right and y down."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """A picture: objects, background colour (RGB in [0, 1]), its gradient across the picture, and colour jitter."""

    objects: tuple[Placed, ...]
    background: tuple[float, float, float] = (0.95, 0.95, 0.95)
    gradient: tuple[float, float] = (0.0, 0.0)


def sample_spec(
    rng: np.random.Generator,
    split: str = "train",
    kind: str | None = None,
    weights: Sequence[float] = KIND_WEIGHTS,
) -> Spec:
    """Draw a meaning of `kind` (default: by `weights`, one for each of KINDS) that lies in `split`."""
    if split not in SPLITS:
        raise ValueError(f"split: got {split!r}, expected one of {SPLITS}")
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, expected one of {KINDS}")
    kind = kind or KINDS[rng.choice(len(KINDS), p=weights)]
    while True:
        spec = _random_spec(rng, kind)
        if spec.split() == split:
            return spec


def _random_spec(rng: np.random.Generator, kind: str) -> Spec:
    number = {"single": 1, "count": 1, "pair": 2, "relation": 2, "triple": 3, "mixed": 2}[kind]
    cells = rng.choice(len(COLOURS) * len(SHAPES), size=number, replace=False)
    names = [(list(COLOURS)[c // len(SHAPES)], SHAPES[c % len(SHAPES)]) for c in cells]
    counts = [1] * number
    if kind == "count":
        counts = [int(rng.integers(2, 5))]
    if kind == "mixed":
        counts = list(((1, 2), (2, 1), (2, 2), (1, 3), (3, 1))[rng.integers(5)])
    relation = RELATIONS[rng.integers(4)] if kind == "relation" else None
    return Spec(tuple((colour, shape, n) for (colour, shape), n in zip(names, counts)), relation)


def place(spec: Spec, rng: np.random.Generator) -> Scene:
    """Draw a scene for a meaning: no two objects touch, all lie inside, and the relation holds by a clear margin."""
    small = spec.num_objects >= 3
    while True:
        objects: list[Placed] = []
        for colour, shape, count in spec.groups:
            for _ in range(count):
                placed = _try_place(colour, shape, objects, small, rng)
                if placed is not None:
                    objects.append(placed)
        if len(objects) == spec.num_objects and (spec.relation is None or _clearly(spec.relation, *objects[:2])):
            break
    tone = rng.uniform(0.35, 1.0)
    tint = rng.uniform(-0.05, 0.05, size=3)
    background = tuple(float(c) for c in np.clip(tone + tint, 0, 1))
    return Scene(tuple(objects), background, tuple(float(g) for g in rng.uniform(-0.12, 0.12, size=2)))  # type: ignore[arg-type]


def _try_place(colour: str, shape: str, others: list[Placed], small: bool, rng: np.random.Generator) -> Placed | None:
    for _ in range(20):
        radius = rng.uniform(8.5, 10.0) if small else rng.uniform(10.0, 13.5)
        x, y = rng.uniform(radius + 1.5, SIZE - radius - 1.5, size=2)
        if all(math.hypot(x - o.x, y - o.y) > radius + o.radius + 2.5 for o in others):
            return Placed(colour, shape, float(x), float(y), float(radius))
    return None


def _clearly(relation: str, a: Placed, b: Placed) -> bool:
    dx, dy = b.x - a.x, b.y - a.y
    along, across = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[relation]
    return abs(across) < 0.8 * along  # and as objects do not touch, along > 15 pixels
