"""Talking to a vision-language model, wherever it runs: what judges that ask questions are written against."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

Part = str | Tensor  # text, a picture (3, H, W), or a video (F, 3, H, W); pixels are floats in [0, 1]


@dataclass(frozen=True)
class Message:
    """One turn: `role` is "system", "user" or "assistant"; parts in the order the model reads them."""

    role: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Token:
    """A generated token: its text, its log-probability, and those of the likeliest tokens at its place."""

    text: str
    log_prob: float
    top: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """An answer, or why there is none; `tokens` are filled where log-probabilities were asked for."""

    text: str
    tokens: tuple[Token, ...] = ()
    error: str | None = None


class Chat(Protocol):
    """Answers N conversations, in order. A conversation that fails gives a Reply with `error`; nothing is raised."""

    name: str  # model, for messages and caches

    def __call__(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        top_logprobs: int = 0,
    ) -> list[Reply]: ...
