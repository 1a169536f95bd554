"""Scenes to pixels: analytic shapes, antialiased, drawn for a whole batch at once."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .scenes import COLOURS, SHAPES, SIZE, Scene

PATCH = 8  # pixels a side of the patches that labels are given for


def signed_distance(shape: str, dx: Tensor, dy: Tensor, radius: Tensor) -> Tensor:
    """How deep (dx, dy) lies inside the shape, in pixels; negative outside. y points down, tips point up.

    `radius` is the nominal size: shapes of one radius have areas within 30 % of each other.
    """
    if shape == "circle":
        return 0.92 * radius - torch.hypot(dx, dy)
    if shape == "square":
        return 0.82 * radius - torch.maximum(dx.abs(), dy.abs())
    if shape == "triangle":  # three half planes; inradius r/2, shifted down so that the bounding box is centred
        low, inner = dy - 0.25 * 1.1 * radius, 0.55 * radius
        side = inner - (math.sqrt(3) / 2 * dx.abs() - 0.5 * low)
        return torch.minimum(side, inner - low)
    if shape == "star":  # one fifth, mirrored: the line from the tip (angle 0) to the notch (angle pi / 5)
        outer, notch = 1.15 * radius, 0.48 * 1.15 * radius
        low = dy - 0.06 * radius
        angle = torch.remainder(torch.atan2(dx, -low), 2 * math.pi / 5)
        angle = torch.minimum(angle, 2 * math.pi / 5 - angle)
        rho = torch.hypot(dx, low)
        px, py = rho * torch.cos(angle), rho * torch.sin(angle)
        ex, ey = notch * math.cos(math.pi / 5) - outer, notch * math.sin(math.pi / 5)
        return ((px - outer) * -ey + py * ex) / torch.hypot(ex, ey)
    raise ValueError(f"shape: got {shape!r}, expected one of {SHAPES}")


def draw(scenes: Sequence[Scene], size: int = SIZE) -> Tensor:
    """Draw scenes. Returns images (N, 3, size, size), float32 in [0, 1]; edges are antialiased over one pixel."""
    grid = torch.arange(size) + 0.5
    scale = size / SIZE
    down, right = torch.meshgrid(grid, grid, indexing="ij")
    background = torch.tensor([s.background for s in scenes])[:, :, None, None]
    slope = torch.tensor([s.gradient for s in scenes])[:, :, None, None]
    images = background + (slope[:, :1] * (right / size - 0.5) + slope[:, 1:] * (down / size - 0.5))
    images = images.clamp(0, 1)
    for k in range(max((len(s.objects) for s in scenes), default=0)):
        have = [i for i, s in enumerate(scenes) if len(s.objects) > k]
        for shape in SHAPES:
            rows = [i for i in have if scenes[i].objects[k].shape == shape]
            if not rows:
                continue
            objects = [scenes[i].objects[k] for i in rows]
            x, y, radius = (
                torch.tensor([getattr(o, name) for o in objects], dtype=torch.float32)[:, None, None] * scale
                for name in ("x", "y", "radius")
            )
            alpha = (signed_distance(shape, right - x, down - y, radius) + 0.5).clamp(0, 1)[:, None]
            colour = torch.tensor([COLOURS[o.colour] for o in objects])[:, :, None, None]
            images[rows] = images[rows] * (1 - alpha) + colour * alpha
    return images


def patch_labels(scenes: Sequence[Scene]) -> Tensor:
    """Which (colour, shape) covers the middle of each patch, (N, 64) int64; 0 is the background."""
    labels = torch.zeros(len(scenes), SIZE // PATCH, SIZE // PATCH, dtype=torch.long)
    centres = (np.arange(SIZE // PATCH) + 0.5) * PATCH
    for n, scene in enumerate(scenes):
        for o in scene.objects:
            rows = np.abs(centres - o.y) < max(o.radius * 0.8, PATCH / 2)
            columns = np.abs(centres - o.x) < max(o.radius * 0.8, PATCH / 2)
            value = 1 + list(COLOURS).index(o.colour) * len(SHAPES) + SHAPES.index(o.shape)
            labels[n][np.ix_(rows, columns)] = value
    return labels.flatten(1)
