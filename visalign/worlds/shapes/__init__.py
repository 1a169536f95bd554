"""The shapes world: drawn scenes, captions, an exact judge, and small trained models, all offline."""

from pathlib import Path

import numpy as np

from .captions import caption
from .scenes import SPLITS, sample_spec

WEIGHTS = Path(__file__).parent / "weights"


def world_prompts(split: str, count: int, seed: int = 0) -> list[str]:
    """`count` captions of a split with distinct meanings, kinds in the proportions of training; the same for a seed.

    Raises:
        ValueError: an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"split: got {split!r}, expected one of {SPLITS}")
    rng, tries = np.random.default_rng([seed, SPLITS.index(split)]), 0
    seen: set[str] = set()
    prompts: list[str] = []
    while len(prompts) < count:
        tries += 1
        spec = sample_spec(rng, split)
        if spec.key() in seen and tries < 40 * count:
            continue  # after many tries few new meanings are left: repeat some
        seen.add(spec.key())
        prompts.append(caption(spec, rng))
    return prompts
