"""A taste for shapes pictures that is known exactly: a formula of the scene, and the head that learns it from pictures.

A picture is the prettier, the more its objects stand out from the ground in lightness (contrast), the nearer their
centre of mass lies to the middle (balance), and the more room they leave to each other and to the edge (room). This is
a taste by decree, not anyone's: it stands in for people's ratings where these must be known without error.
"""

import math
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from .drawing import PATCH
from .scenes import COLOURS, SIZE, Scene

WEIGHTS_OF = {"contrast": 0.4, "balance": 0.4, "room": 0.2}
LOW, HIGH = 1.0, 10.0  # the ends of the scale, as of people's ratings
ENOUGH_CONTRAST = 40.0  # difference in lightness L* beyond which more does not help
OFF_BALANCE = 16.0  # pixels from the middle at which a picture has no balance left
ENOUGH_ROOM = 8.0  # pixels between objects, and to the edge, beyond which more does not help
FILE = "taste.safetensors"


def lightness(colour: np.ndarray) -> float:
    """CIE L* in [0, 100] of an sRGB colour (3,) in [0, 1]."""
    linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
    luminance = float(linear @ np.array([0.2126, 0.7152, 0.0722]))
    return 116 * luminance ** (1 / 3) - 16 if luminance > (6 / 29) ** 3 else luminance * (29 / 3) ** 3


def contrast(scene: Scene) -> float:
    """Mean over objects of their difference in lightness from the ground beneath their centre; in [0, 1], 1 is good."""
    parts = []
    for o in scene.objects:
        slope = scene.gradient[0] * (o.x / SIZE - 0.5) + scene.gradient[1] * (o.y / SIZE - 0.5)
        ground = (np.array(scene.background) + slope).clip(0, 1)
        difference = abs(lightness(np.array(COLOURS[o.colour])) - lightness(ground))
        parts.append(min(1.0, difference / ENOUGH_CONTRAST))
    return float(np.mean(parts))


def balance(scene: Scene) -> float:
    """How near the objects' centre of mass (by radius squared) lies to the middle; in [0, 1], 1 is in the middle."""
    mass = np.array([o.radius**2 for o in scene.objects])
    x, y = (float(mass @ [getattr(o, axis) for o in scene.objects] / mass.sum()) for axis in ("x", "y"))
    return max(0.0, 1 - math.hypot(x - SIZE / 2, y - SIZE / 2) / OFF_BALANCE)


def room(scene: Scene) -> float:
    """The smallest gap between two objects' circles, or one's and the edge; in [0, 1], 1 is roomy."""
    gaps = [min(o.x, o.y, SIZE - o.x, SIZE - o.y) - o.radius for o in scene.objects]
    for n, a in enumerate(scene.objects):
        gaps += [math.hypot(a.x - b.x, a.y - b.y) - a.radius - b.radius for b in scene.objects[:n]]
    return min(1.0, max(0.0, min(gaps) / ENOUGH_ROOM))


def taste(scene: Scene) -> float:
    """How pretty the scene is, from 1 to 10: 1 + 9 (0.4 contrast + 0.4 balance + 0.2 room); 1 without any object."""
    if not scene.objects:
        return LOW
    parts = {"contrast": contrast(scene), "balance": balance(scene), "room": room(scene)}
    return LOW + (HIGH - LOW) * sum(WEIGHTS_OF[name] * part for name, part in parts.items())


class TasteHead(nn.Module):
    """Patch tokens of the world's CLIP (N, 64, 128) to scores (N,) within 1 to 10.

    A few numbers are read from each patch, and the picture's from all of them together. (The pooled embedding has lost
    most of where things are.)
    """

    def __init__(self, width: int = 128, read: int = 8, hidden: int = 32) -> None:
        super().__init__()
        self.patch = nn.Linear(width, read)
        self.picture = nn.Linear((SIZE // PATCH) ** 2 * read, hidden)
        self.score = nn.Linear(hidden, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        seen = F.gelu(self.patch(tokens)).flatten(1)
        return LOW + (HIGH - LOW) * self.score(F.gelu(self.picture(seen))).squeeze(1).sigmoid()


def load_head(file: Path) -> TasteHead:
    """The head in a file of `visalign world build taste`, float32, frozen.

    Raises:
        ValueError: no such file, or one that holds something else.
    """
    from safetensors.torch import load_file

    if not file.is_file():
        raise ValueError(f"weights: got no file at {str(file)!r}; `visalign world build taste` makes one")
    head = TasteHead()
    try:
        head.load_state_dict({name: weight.float() for name, weight in load_file(file).items()})
    except Exception as error:  # not safetensors, other names, other shapes: each has an error type of its own
        summary = " ".join(str(error).split())[:200]
        raise ValueError(f"weights: could not read {str(file)!r} as a taste head: {summary}") from error
    return head.eval().requires_grad_(False)
