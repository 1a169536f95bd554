"""Two pictures side by side that should show the same objects, for rewards that judge consistency."""

import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from .building.tasks import near_miss
from .captions import caption
from .drawing import draw
from .judge import read
from .scenes import SIZE, Scene, Spec, place, sample_spec

KIND_WEIGHTS = (0.2, 0.3, 0.3, 0.0, 0.1, 0.1)  # no relations: objects may stand anywhere in either panel
CORNER = 0.82 * math.sqrt(2)  # how far a square's corner lies from its centre, in radii


def make_panels(count: int, seed: int = 0, split: str = "test") -> tuple[Tensor, list[str], Tensor]:
    """Pairs of panels on one ground, half of them with the same objects in other places and sizes.

    In the others one panel, either of them, shows a near miss: it differs in one respect (a colour, a shape, how many
    there are, one object more or fewer, colours swapped), and need not lie in the split.

    Args:
        split: whose meanings the prompts have.

    Returns:
        images (count, 3, 64, 128) in [0, 1]; prompts, which always ask for the same; bool (count,), whether it is.
    """
    rng = np.random.default_rng([seed, 23])
    specs = [sample_spec(rng, split, weights=KIND_WEIGHTS) for _ in range(count)]
    same = torch.from_numpy(rng.permutation(count) % 2 == 0)
    scenes = []
    for spec, alike in zip(specs, same.tolist()):
        pair = [spec, spec if alike else _miss(spec, rng)]
        left, right = (_place_apart(pair[k], rng) for k in rng.permutation(2))
        scenes += [left, replace(right, background=left.background, gradient=left.gradient)]
    pictures = torch.cat([draw(scenes[k : k + 256]) for k in range(0, len(scenes), 256)])
    return torch.cat([pictures[::2], pictures[1::2]], dim=3), [panel_prompt(s) for s in specs], same


def panel_prompt(spec: Spec) -> str:
    """The prompt for two panels of one meaning, in the form that `rewards/probability/paco.py` reads."""
    text = caption(spec)
    return f"a 1x2 grid of {text}. Left: {text}. Right: {text}."


def same_objects(images: Tensor) -> Tensor:
    """The exact judge of this task, a reward: 1 where both panels hold the same objects, read back from pixels, else 0.

    Args:
        images: (N, 3, 64, 128) in [0, 1].

    Returns:
        (N,), float32 on the CPU; a region that is none of the world's shapes agrees with nothing.
    """
    if images.shape[1:] != (3, SIZE, 2 * SIZE):
        raise ValueError(f"images: got shape {tuple(images.shape)}, expected (N, 3, {SIZE}, {2 * SIZE})")
    return torch.tensor([float(_agree(*image.detach().float().cpu().chunk(2, dim=2))) for image in images])


def _agree(left: Tensor, right: Tensor) -> bool:
    one, other = (sorted((o.colour, o.shape) for o in read(panel)) for panel in (left, right))
    return one == other and bool(one) and all(shape != "unknown" for _, shape in one)


def _place_apart(spec: Spec, rng: np.random.Generator) -> Scene:
    """A scene whose squares' corners, which reach beyond their circles, do not touch either."""
    while True:
        scene = place(spec, rng)
        pairs = combinations(scene.objects, 2)
        if all(math.hypot(a.x - b.x, a.y - b.y) > CORNER * (a.radius + b.radius) + 1.5 for a, b in pairs):
            return scene


def _miss(spec: Spec, rng: np.random.Generator) -> Spec:
    """A near miss that can be drawn (at most four objects) and does not name the same object twice."""
    while True:
        miss = near_miss(spec, rng)
        distinct = len({group[:2] for group in miss.groups}) == len(miss.groups)
        if distinct and miss.num_objects <= 4 and miss.key() != spec.key():
            return miss
