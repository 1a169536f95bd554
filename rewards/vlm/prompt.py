"""What a vision-language model run here is asked: a conversation as tokens, with the pictures and videos in it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visalign.rewards.embedding.frozen import content_key


@dataclass(frozen=True)
class Picture:
    """A picture (3, H, W) or a video (F, 3, H, W) in [0, 1], and what tells it from others; see `picture_key`."""

    pixels: Tensor
    key: str

    @property
    def is_video(self) -> bool:
        return self.pixels.ndim == 4


@dataclass(frozen=True)
class Prompt:
    """A conversation as tokens. The place of a picture or video is held by one token for each of its visual tokens."""

    text: str  # the chat template's output, with one placeholder a picture or video
    ids: tuple[int, ...]
    marks: tuple[Any, ...]  # ids, with each visual token's id replaced by its picture's key; equal marks, equal states
    pictures: tuple[Picture, ...]  # and videos, in the order of their places

    def followed_by(self, ids: Sequence[int]) -> "Prompt":
        """The same with further text tokens after it."""
        return Prompt(self.text, (*self.ids, *ids), (*self.marks, *ids), self.pictures)


@dataclass(frozen=True)
class Vision:
    """What the vision tower makes of a picture or video."""

    grid: tuple[int, int, int]  # steps in time, rows and columns of patches
    features: Tensor  # (tokens, D)
    deepstack: tuple[Tensor, ...]  # (tokens, D) each; Qwen3-VL adds them to its first layers


def picture_key(pixels: Tensor) -> str:
    """By content, so that a reference handed in again is known again; by identity where gradients must find it."""
    return f"tensor-{id(pixels)}" if pixels.requires_grad else content_key(pixels)


def left_pad(rows: Sequence[Sequence[int]], fill: int) -> tuple[Tensor, Tensor]:
    """Rows of ids as one tensor (N, longest), padded on the left, and its mask, 1 where a token is."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[fill] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask
