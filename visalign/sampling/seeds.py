"""Noise that depends on keys alone: the same for a sample whatever its batch, process or place in a run."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def derived_seed(*keys: int) -> int:
    """A 32-bit seed from integers, far from theirs and each other's (torch's CPU generator reads 32 bits only)."""
    text = ":".join(str(int(key)) for key in keys)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")


def text_key(text: str) -> int:
    """A 32-bit key of a text, for `derived_seed`."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")


def step_noise(seeds: Sequence[int], step_index: int, like: Tensor) -> Tensor:
    """Standard normal noise of one step, shaped, placed and typed as `like` (N, ...); row n from seeds[n] and the step.

    Drawn on the CPU in float32, so that it does not depend on the device.
    """
    if len(seeds) != len(like):
        raise ValueError(f"seeds: got {len(seeds)}, expected {len(like)}, one per sample")
    rows = [
        torch.randn(like.shape[1:], generator=torch.Generator().manual_seed(derived_seed(seed, step_index)))
        for seed in seeds
    ]
    return torch.stack(rows).to(like.device, non_blocking=True).to(like.dtype)
