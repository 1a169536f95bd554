"""What searches and their callers hand each other: a model to search, the best so far, an event, a valued estimate."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol

from torch import Tensor

from visalign.transitions import Schedule


class Role(IntEnum):
    """What a random number is for; each has a stream of its own."""

    INIT = 0  # initial noise
    STEP = 1  # noise of the kernel's steps
    RESAMPLE = 2  # which particles survive
    SELECT = 3  # which child a tree descends to
    SEARCH = 4  # proposals: neighbours of a noise, fresh noise again


class Model(Protocol):
    """What a chain needs of a `visalign.pipeline.generator.Generator`."""

    @property
    def schedule(self) -> Schedule: ...

    def noise(self, prompts: Sequence[str], seeds: Sequence[int], **inputs: Any) -> Tensor: ...

    def predict(self, latents: Tensor, step_index: int, prompts: Sequence[str], **inputs: Any) -> Tensor: ...

    def decode(self, latents: Tensor, prompts: Sequence[str], **inputs: Any) -> Tensor: ...


@dataclass(frozen=True)
class Best:
    """The result that the reward likes best so far.

    Attributes:
        reward: its score, higher is better.
        latents: (1, ...), final.
        image: (1, 3, H, W) in [0, 1], on the CPU.
        entity: what made it: the number of a rollout, particle or candidate.
        start: (1, ...), the initial noise, of searches that choose by it.
    """

    reward: float
    latents: Tensor
    image: Tensor
    entity: int
    start: Tensor | None = None


@dataclass(frozen=True)
class Event:
    """How a search stands. `best` None: nothing is finished yet.

    Attributes:
        nfe: spent so far.
        best: the best finished result so far; never worse than an earlier event's.
        state: the method's own: particles, a tree, a pool of rewards.
        rewards: those of the results finished since the event before, in order.
        note: what has just happened, for people.
    """

    nfe: int
    best: Best | None
    state: Any
    rewards: tuple[float, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Valued:
    """A prediction with the value of its one-step result and the gradient of that by the latents; all detached.

    Attributes:
        prediction, denoised: (N, ...).
        values: (N,), float64: the reward of the decoded `denoised`.
        gradient: (N, ...), of values by latents.
    """

    prediction: Tensor
    denoised: Tensor
    values: Tensor
    gradient: Tensor
