"""The gold judge: reads a picture back into objects and says which of a caption's criteria hold.

Saturated regions are objects (backgrounds are nearly grey). Each region's colour is the palette colour nearest to its
interior, its shape the one whose drawing of the same area and centroid overlaps it most; a region that matches no
shape well is an object of shape "unknown", which no caption asks for, so smears, grids and noise fail.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from .captions import parse
from .drawing import signed_distance
from .scenes import COLOURS, SHAPES, Placed, Spec

CHROMA = 0.26  # max - min of RGB above which a pixel belongs to an object
MIN_AREA = 14  # pixels; smaller specks are ignored up to MAX_SPECKS of them
MAX_SPECKS = 3
MIN_OVERLAP = 0.72  # of the region with the drawn shape, minima over maxima
MARGIN = 4.0  # pixels between centres for a relation to hold
_PALETTE = np.array(list(COLOURS.values()))


@dataclass(frozen=True)
class Verdict:
    """Per criterion whether it holds, and the objects read. `score` is the fraction that holds, `strict` all."""

    criteria: dict[str, bool]
    objects: tuple[Placed, ...]

    @property
    def score(self) -> float:
        return sum(self.criteria.values()) / len(self.criteria)

    @property
    def strict(self) -> bool:
        return all(self.criteria.values())


def read(image: Tensor | np.ndarray) -> tuple[Placed, ...]:
    """Objects in one picture (3, 64, 64) in [0, 1], left to right. Unrecognised regions have shape "unknown"."""
    pixels = np.asarray(image, dtype=np.float64)
    if pixels.ndim != 3 or pixels.shape[0] != 3:
        raise ValueError(f"image: got shape {pixels.shape}, expected (3, H, W)")
    pixels = pixels.transpose(1, 2, 0)
    if not np.isfinite(pixels).all():
        raise ValueError("image: got NaN or infinite pixels, expected values in [0, 1]")
    smooth = ndimage.uniform_filter(pixels, size=(2, 2, 1)) if _is_noisy(pixels) else pixels
    mask = smooth.max(-1) - smooth.min(-1) > CHROMA
    nearest = ((smooth[:, :, None, :] - _PALETTE) ** 2).sum(-1).argmin(-1)
    labels, number = ndimage.label(mask)
    objects, specks = [], 0
    for k in range(1, number + 1):
        region = labels == k
        for part in _split_colours(region, nearest):
            if part.sum() < MIN_AREA:
                specks += part.sum() > 2
                continue
            objects.append(_read_region(part, smooth))
    if specks > MAX_SPECKS:
        objects.append(Placed("red", "unknown", 0.0, 0.0, 0.0))
    return tuple(sorted(objects, key=lambda o: o.x))


def _is_noisy(pixels: np.ndarray) -> bool:
    """Median absolute difference of neighbours; flat drawings have nearly none."""
    return float(np.median(np.abs(np.diff(pixels, axis=1)))) > 0.01


def _split_colours(region: np.ndarray, nearest: np.ndarray) -> list[np.ndarray]:
    """A region of two touching objects as two regions; one object with its edge pixels stays whole."""
    core = ndimage.binary_erosion(region)
    counts = np.bincount(nearest[core], minlength=len(_PALETTE)) if core.any() else np.zeros(len(_PALETTE))
    big = np.flatnonzero(counts >= max(MIN_AREA, 0.2 * counts.sum()))
    if len(big) < 2:
        return [region]
    parts = []
    for colour in big:
        pieces, number = ndimage.label(region & (nearest == colour))
        parts += [pieces == k for k in range(1, number + 1)]
    return [p for p in parts if p.sum() >= MIN_AREA]


def _read_region(region: np.ndarray, pixels: np.ndarray) -> Placed:
    core = ndimage.binary_erosion(region)
    inside = pixels[core] if core.sum() >= 6 else pixels[region]
    colour = np.median(inside, axis=0)
    name = list(COLOURS)[((colour - _PALETTE) ** 2).sum(-1).argmin()]
    ring = ndimage.binary_dilation(region, iterations=4) & ~ndimage.binary_dilation(region, iterations=2)
    background = np.median(pixels[ring], axis=0) if ring.any() else np.ones(3)
    axis = colour - background
    coverage = ((pixels - background) @ axis / max(axis @ axis, 1e-6)).clip(0, 1)
    coverage = np.where(ndimage.binary_dilation(region, iterations=2), coverage, 0.0)
    coverage[coverage < 0.15] = 0.0  # what JPEG spills
    shape, overlap, x, y, radius = _fit(coverage)
    rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    ratio = (rows[-1] - rows[0] + 1) / (columns[-1] - columns[0] + 1)
    if overlap < MIN_OVERLAP or not 0.66 < ratio < 1.5 or not _near_palette(colour):
        shape = "unknown"
    return Placed(name, shape, x, y, radius)


@cache
def _moments(shape: str) -> tuple[float, float]:
    """Area of the shape over radius squared, and how far its centroid lies below its centre, over the radius."""
    grid = np.linspace(-1.4, 1.4, 512)
    dx, dy = np.meshgrid(grid, grid)
    inside = signed_distance(shape, torch.as_tensor(dx), torch.as_tensor(dy), torch.tensor(1.0)).numpy() > 0
    return float(inside.mean() * 2.8**2), float(dy[inside].mean())


def _fit(coverage: np.ndarray) -> tuple[str, float, float, float, float]:
    """The shape whose drawing, of the same area and centroid, overlaps a coverage map (H, W) best.

    Returns shape, overlap (sum of minima over sum of maxima), centre x, centre y and radius in pixels.
    """
    mass = coverage.sum()
    down, right = np.mgrid[: coverage.shape[0], : coverage.shape[1]] + 0.5
    x, y = float((coverage * right).sum() / mass), float((coverage * down).sum() / mass)
    best = ("unknown", -1.0, x, y, 0.0)
    for shape in SHAPES:
        area, below = _moments(shape)
        radius = float(np.sqrt(mass / area))
        centre = y - below * radius
        depth = signed_distance(shape, torch.as_tensor(right - x), torch.as_tensor(down - centre), torch.tensor(radius))
        filled = (depth.numpy() + 0.5).clip(0, 1)
        overlap = float(np.minimum(filled, coverage).sum() / np.maximum(filled, coverage).sum())
        if overlap > best[1]:
            best = (shape, overlap, x, centre, radius)
    return best


def _near_palette(colour: np.ndarray) -> bool:
    return bool(((colour - _PALETTE) ** 2).sum(-1).min() < 0.35**2)


def judge(image: Tensor | np.ndarray, prompt: str | Spec) -> Verdict:
    """Read one picture (3, H, W) in [0, 1] and check a caption of the world against it.

    Criteria: "objects" (each named shape is there, in any colour), "colours" (each named colour-shape pair is there),
    "counts" (the picture holds exactly the named number of each pair, and nothing else) and, where the caption names
    one, "relation" (some such pair of objects stands so, by at least 4 pixels between centres).

    Raises:
        ValueError: the prompt is not in the world's grammar, or the image's shape or values are unusable.
    """
    spec = parse(prompt) if isinstance(prompt, str) else prompt
    objects = read(image)
    have: dict[tuple[str, str], int] = {}
    for o in objects:
        have[o.colour, o.shape] = have.get((o.colour, o.shape), 0) + 1
    shapes = {o.shape for o in objects}
    criteria = {
        "objects": all(shape in shapes for _, shape, _ in spec.groups),
        "colours": all((colour, shape) in have for colour, shape, _ in spec.groups),
        "counts": have == {(colour, shape): n for colour, shape, n in spec.groups},
    }
    if spec.relation:
        (c0, s0, _), (c1, s1, _) = spec.groups
        first = [o for o in objects if (o.colour, o.shape) == (c0, s0)]
        second = [o for o in objects if (o.colour, o.shape) == (c1, s1)]
        criteria["relation"] = any(_holds(spec.relation, a, b) for a in first for b in second)
    return Verdict(criteria, objects)


def _holds(relation: str, a: Placed, b: Placed) -> bool:
    along = {"left of": b.x - a.x, "right of": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}[relation]
    across = abs(b.y - a.y) if relation in ("left of", "right of") else abs(b.x - a.x)
    return along >= MARGIN and along >= 0.7 * across
