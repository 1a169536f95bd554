"""The shapes world: drawn scenes, captions, an exact judge, and small trained models, all offline."""

from pathlib import Path

import numpy as np

from visalign.lazy import lazily

from .captions import caption, parse
from .scenes import SIZE, SPLITS, place, sample_spec

__all__ = ["SIZE", "SPLITS", "WEIGHTS", "parse", "place", "world_prompts"]
__getattr__ = lazily(
    __name__, drawing=("draw",), judge=("read",), critic=("ShapesCritic",), pictures=("DrawnPictures", "crowded")
)

WEIGHTS = Path(__file__).parent / "weights"


def world_prompts(split: str, count: int, seed: int = 0) -> list[str]:
    """`count` captions of a split with distinct meanings, kinds in the proportions of training; the same for a seed.

    The first ones are the same for any `count`. Meanings repeat only where hardly any is left ("test" has about 430).

    Raises:
        ValueError: an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"split: got {split!r}, expected one of {SPLITS}")
    rng, misses = np.random.default_rng([seed, SPLITS.index(split)]), 0
    seen: set[str] = set()
    prompts: list[str] = []
    while len(prompts) < count:
        spec = sample_spec(rng, split)
        if spec.key() not in seen:
            misses = 0
        elif misses < 500:  # in a row; then too few new meanings are left
            misses += 1
            continue
        seen.add(spec.key())
        prompts.append(caption(spec, rng))
    return prompts
