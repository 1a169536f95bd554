"""Comparisons of pictures as numbers: cancelling a judge's bias for the first place, win rates, strengths.

The reward `win_rate`, made of these, is in `win_rate.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from visalign.rewards.base import Context, as_scores


class PairJudge(Protocol):
    """Compares pictures: first and second (N, 3, H, W) in [0, 1] and N prompts to the log-odds (N,) that the first is
    better. NaN where it gave no usable verdict. The context is that of rewards, one entry a pair.
    """

    def __call__(
        self, first: Tensor, second: Tensor, prompts: Sequence[str], context: Context | None = None
    ) -> Tensor: ...


@dataclass(frozen=True)
class Verdicts:
    """What a judge said of N pairs (i, j), asked in both orders; float32 on the CPU, NaN where it did not say."""

    forward: Tensor  # (N,) log-odds of i, shown first
    backward: Tensor  # (N,) log-odds of j, shown first

    @property
    def log_odds(self) -> Tensor:
        """(N,) that i is better: [l(i, j) - l(j, i)] / 2. Changes its sign exactly when i and j change places."""
        return (self.forward - self.backward) / 2

    @property
    def probability(self) -> Tensor:
        """(N,) that i is better: [P(i, j) + 1 - P(j, i)] / 2, in [0, 1]. Not the sigmoid of `log_odds`."""
        return (self.forward.sigmoid() + 1 - self.backward.sigmoid()) / 2

    @property
    def bias(self) -> Tensor:
        """(N,) log-odds that the judge gives to whatever stands first: [l(i, j) + l(j, i)] / 2."""
        return (self.forward + self.backward) / 2

    @property
    def consistent(self) -> Tensor:
        """(N,) bool: the same winner, or twice a tie, in both orders. Its mean is the consistency rate."""
        return self.forward.sign() == -self.backward.sign()

    @property
    def outcome(self) -> Tensor:
        """(N,) 1 where i wins in both orders, 0 where j does, 1/2 for ties, pairs at odds and missing verdicts."""
        return torch.where(self.consistent, (self.forward.sign() + 1) / 2, 0.5)


def ask_both(
    judge: PairJudge,
    first: Tensor,
    second: Tensor,
    prompts: Sequence[str],
    context: Context | None = None,
    name: str = "judge",
) -> Verdicts:
    """The judge's verdicts on N pairs, each asked in both orders, in one call of 2N pairs."""
    n = len(prompts)
    doubled = None if context is None else take_context(context, [*range(n), *range(n)], n)
    answers = judge(torch.cat([first, second]), torch.cat([second, first]), [*prompts, *prompts], doubled)
    forward, backward = as_scores(answers, name, [*prompts, *prompts]).detach().cpu().split(n)
    return Verdicts(forward, backward)


def take_context(context: Context, rows: Sequence[int], count: int) -> dict[str, Any]:
    """The context of some of `count` samples: of lists and tensors of that length the rows are picked."""
    picked: dict[str, Any] = {}
    for name, value in context.items():
        if isinstance(value, Tensor) and value.ndim and len(value) == count:
            picked[name] = value[torch.as_tensor(rows)]
        elif isinstance(value, (list, tuple)) and len(value) == count:
            picked[name] = [value[row] for row in rows]
        else:
            picked[name] = value
    return picked


def all_pairs(size: int) -> list[tuple[int, int]]:
    """Each two of a group once. Which stands first alternates, so that the first place falls to all equally often."""
    return [(i, j) if (i + j) % 2 else (j, i) for i in range(size) for j in range(i + 1, size)]


def drawn_pairs(size: int, opponents: int, generator: torch.Generator) -> list[tuple[int, int]]:
    """Pairs in which each of a group meets the same number of others, drawn: a circle in random order, each with its
    nearest. Equal numbers keep the win rates' sum at size/2. All pairs, where there are no more than asked for.

    Raises:
        ValueError: both numbers odd, when there is no such draw.
    """
    if opponents >= size - 1:
        return all_pairs(size)
    if opponents % 2 and size % 2:
        raise ValueError(f"opponents: got {opponents} in a group of {size}, expected an even number for an odd group")
    circle = torch.randperm(size, generator=generator).tolist()
    steps = range(1, opponents // 2 + 1)
    pairs = [(circle[k], circle[(k + step) % size]) for step in steps for k in range(size)]
    if opponents % 2:  # and those across the circle
        pairs += [(circle[k], circle[k + size // 2]) for k in range(size // 2)]
    return pairs


def win_rates(pairs: Sequence[tuple[int, int]], outcomes: Tensor, size: int) -> Tensor:
    """win_i = sum of i's outcomes / number of i's comparisons (Pref-GRPO, Wang et al. 2025, arXiv:2508.20751), (size,).

    Where all have as many comparisons the rates sum to size/2. A member without any gets 1/2.

    Args:
        outcomes: (P,) in [0, 1], of the first of each pair; the second has the rest.
    """
    first, second = pair_ends(pairs)
    points = torch.zeros(size, dtype=torch.float64)
    points.index_add_(0, first, outcomes.double()).index_add_(0, second, 1 - outcomes.double())
    counts = torch.bincount(torch.cat([first, second]), minlength=size)
    return torch.where(counts > 0, points / counts.clamp(min=1), 0.5).float()


def pair_ends(pairs: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    first, second = torch.tensor(pairs, dtype=torch.long).view(-1, 2).T
    return first, second
