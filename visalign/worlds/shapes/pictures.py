"""Pictures of the world for others: of captions, with their edges, and of all objects at once."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from visalign.data.pictures import Drawn
from visalign.rewards.verifiers.cycle import edge_magnitude

from .captions import parse
from .drawing import draw
from .scenes import COLOURS, SHAPES, SIZE, Placed, Scene, place


class DrawnPictures:
    """The world's captions, each drawn anew; the condition is the picture's edges."""

    conditioned = True

    def captions(self) -> None:
        """Any of the world's."""

    def check(self, captions: Sequence[str]) -> None:
        """Raise ValueError for a caption that cannot be drawn; names it."""
        for caption in captions:
            try:
                parse(caption)
            except ValueError as error:
                raise ValueError(
                    f"prompts: got {caption!r} with data 'shapes', which cannot draw it ({error})"
                ) from None

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], size: tuple[int, int]) -> Drawn:
        scenes = [place(parse(p), np.random.default_rng(s)) for p, s in zip(prompts, seeds)]
        if size[0] != size[1]:
            raise ValueError(f"data: got a model of size {size} for 'shapes', expected a square one")
        pictures = draw(scenes, size[0])
        edges = edge_magnitude(pictures)
        context = {"references": [[picture] for picture in pictures], "condition": edges}
        return Drawn(pictures, edges[:, None].expand(-1, 3, -1, -1).clamp(0, 1), context)


def crowded(size: int = 64) -> Tensor:
    """Every object of the shapes world at once, in a grid of rows for shapes and columns for colours: (3, size, size).

    Whatever a caption names is there; it is right for none.
    """
    across, down = SIZE / len(COLOURS), SIZE / len(SHAPES)
    objects = tuple(
        Placed(colour, shape, (column + 0.5) * across, (row + 0.5) * down, 0.45 * min(across, down))
        for row, shape in enumerate(SHAPES)
        for column, colour in enumerate(COLOURS)
    )
    return draw([Scene(objects)], size)[0]
