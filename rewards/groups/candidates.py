"""Groups of candidate pictures as judges see them: who belongs together, and in what order they are shown."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from visalign.rewards.base import Context, RewardError


def group_places(prompts: Sequence[str], context: Context | None, name: str) -> list[list[int]]:
    """The samples of each group of `context["group_ids"]`, in order; without it all are one group.

    Raises:
        RewardError: different prompts in one group.
    """
    ids = (context or {}).get("group_ids")
    groups: dict[int, list[int]] = {}
    for n, group in enumerate([0] * len(prompts) if ids is None else torch.as_tensor(ids).tolist()):
        groups.setdefault(group, []).append(n)
    for members in groups.values():
        if len({prompts[n] for n in members}) > 1:
            problem = "got different prompts in one group, expected context['group_ids'] to tell groups apart"
            raise RewardError(name, problem, members[0], prompts[members[0]])
    return list(groups.values())


def picture_digest(picture: Tensor) -> bytes:
    """Tells pictures of different content apart."""
    return hashlib.sha256(picture.detach().float().cpu().contiguous().numpy().tobytes()).digest()


def shown_order(digests: Sequence[bytes], seed: int = 0) -> list[int]:
    """A random order to show pictures in, drawn from the seed and what is in them (see `picture_digest`).

    As it does not depend on the order they come in, a judge that favours a place gives a picture the same score
    wherever in its group it stood.
    """
    salt = hashlib.sha256(str(seed).encode() + b"".join(sorted(digests))).digest()
    return sorted(range(len(digests)), key=lambda n: hashlib.sha256(salt + digests[n]).digest())


def shown_pairs(digests: Sequence[bytes], seed: int = 0) -> list[tuple[int, int]]:
    """Each two of a group once, in the random order of `shown_order`."""
    size, pairs = len(digests), []
    for i in range(size):
        for j in range(i + 1, size):
            pairs.append((i, j) if shown_order([digests[i], digests[j]], seed)[0] == 0 else (j, i))
    return pairs
