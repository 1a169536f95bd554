"""What the world's CLIP learns from: scenes in pairs that nearly agree, spoilt pictures, and what each holds."""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from visalign.worlds.shapes.drawing import draw, patch_labels
from visalign.worlds.shapes.scenes import COLOURS, RELATIONS, SHAPES, SIZE, Scene, Spec, place, sample_spec


def near_miss(spec: Spec, rng: np.random.Generator) -> Spec:
    """A meaning that differs from `spec` in one respect; most often in how many objects there are.

    (A model that minds a missing object more than one too many rewards crowded pictures.)
    """
    groups: list[list] = [list(g) for g in spec.groups]
    k, draw_colour, draw_shape = rng.integers(len(groups)), list(COLOURS)[rng.integers(6)], SHAPES[rng.integers(4)]
    relation = spec.relation
    kinds = (
        ["count", "extra", "colour", "shape"] + ["fewer", "swap"] * (len(groups) > 1) + ["relation"] * bool(relation)
    )
    kind = kinds[rng.integers(len(kinds))]
    if kind == "count":
        groups[k][2] = int(rng.choice([n for n in (1, 2, 3, 4) if n != groups[k][2]]))
        relation = None if rng.random() < 0.5 else relation
    elif kind == "extra" and len(groups) < 3:
        groups, relation = [*groups, [draw_colour, draw_shape, 1]], None
    elif kind == "fewer":
        groups, relation = [g for i, g in enumerate(groups) if i != k], None
    elif kind == "swap":
        part = 0 if groups[0][0] != groups[1][0] else 1  # colours, or shapes where the colours are equal
        groups[0][part], groups[1][part] = groups[1][part], groups[0][part]
    elif kind == "relation":
        relation = RELATIONS[rng.integers(4)]
    else:
        groups[k][kind == "shape"] = draw_shape if kind == "shape" else draw_colour
    return Spec(tuple((c, s, n) for c, s, n in groups), relation)


@dataclass
class Task:
    """Training data: pictures (N, 3, 64, 64) uint8 of `specs`, their patch labels, and as many spoilt pictures.

    Scene 2k + 1 shows a near miss of scene 2k's meaning; spoilt picture k shows scene k with one object cut in two.
    """

    specs: list[Spec]
    pictures: Tensor
    labels: Tensor
    spoilt: Tensor


def make_task(pairs: int, rng: np.random.Generator, split: str = "train") -> Task:
    """Draw `pairs` meanings of a split, each with a near miss (a training meaning), and what spoils them."""
    specs = []
    for _ in range(pairs):
        specs.append(sample_spec(rng, split))
        specs.append(train_miss(specs[-1], rng))
    placed = [place(s, rng) for s in specs]
    pictures = torch.cat([(draw(placed[i : i + 256]) * 255).byte() for i in range(0, len(placed), 256)])
    spoilt = torch.cat([spoil(placed[i : i + 256], rng) for i in range(0, len(placed), 256)])
    return Task(specs, pictures, patch_labels(placed), spoilt)


def train_miss(spec: Spec, rng: np.random.Generator) -> Spec:
    """A near miss that is a training meaning and can be said and drawn: at most four objects, relations between two."""
    while True:
        miss = near_miss(spec, rng)
        distinct = len({group[:2] for group in miss.groups}) == len(miss.groups)
        drawable = miss.num_objects <= 4 and (miss.relation is None or miss.num_objects == 2)
        if distinct and drawable and miss.key() != spec.key() and miss.split() == "train":
            return miss


def spoil(scenes: list[Scene], rng: np.random.Generator) -> Tensor:
    """Scenes with a line through one object, beyond which there is another scene on the same ground; uint8."""
    others = [scenes[k] for k in rng.permutation(len(scenes))]
    beyond = [replace(o, background=s.background, gradient=s.gradient) for s, o in zip(scenes, others)]
    cuts = [s.objects[rng.integers(len(s.objects))] for s in scenes]
    angle = torch.from_numpy(rng.uniform(0, 2 * math.pi, len(scenes))).float()
    x, y = (torch.tensor([getattr(c, axis) for c in cuts])[:, None, None] for axis in ("x", "y"))
    down, right = torch.meshgrid(torch.arange(SIZE) + 0.5, torch.arange(SIZE) + 0.5, indexing="ij")
    side = (right - x) * angle.cos()[:, None, None] + (down - y) * angle.sin()[:, None, None]
    share = (side / 2).sigmoid()[:, None]
    return ((draw(scenes) * (1 - share) + draw(beyond) * share) * 255).byte()


def content(specs: list[Spec]) -> tuple[Tensor, Tensor]:
    """What a meaning holds: counts (N, 24) of every colour and shape, and the relation (N,) or -100 for none.

    The relation is that of the two objects in a fixed order, not in the order named.
    """
    counts, relations = torch.zeros(len(specs), len(COLOURS) * len(SHAPES), dtype=torch.long), []
    for n, spec in enumerate(specs):
        cells = [list(COLOURS).index(c) * len(SHAPES) + SHAPES.index(s) for c, s, _ in spec.groups]
        for cell, (_, _, count) in zip(cells, spec.groups):
            counts[n, cell] = count
        relation = -100 if spec.relation is None else RELATIONS.index(spec.relation)
        if relation >= 0 and cells[0] > cells[-1]:
            relation ^= 1  # left for right, above for below
        relations.append(relation)
    return counts, torch.tensor(relations)


def roughen(pictures: Tensor, random: torch.Generator) -> Tensor:
    """uint8 pictures to [-1, 1], each a little blurred and noisy, as a generator's are."""
    images = pictures.float() / 127.5 - 1
    amount = torch.rand(2, len(images), 1, 1, 1, generator=random).to(images.device)
    images = images.lerp(F.avg_pool2d(images, 3, 1, 1, count_include_pad=False), amount[0])
    return images + 0.1 * amount[1] * torch.randn(images.shape, generator=random).to(images.device)
