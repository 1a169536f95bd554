"""What a search has spent."""

import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch


class BudgetExceeded(RuntimeError):
    """A search went past its `max_nfe`: a fault of the method, which should have looked first."""


@dataclass
class Ledger:
    """Costs so far. What is cached costs nothing.

    Attributes:
        max_nfe: the budget; None: no bound.
        nfe: guided predictions, one a (sample, step): a pair of classifier-free guidance counts once.
        forwards, backwards: rows through the denoiser (that pair counts twice), and backward passes of rows.
        rewards, reward_gradients: images scored, and scored with gradient.
        decodes: latents decoded.
        tokens: written by language models (critics, rewriters).
        seconds: of wall time, since the ledger was made or taken up again.
    """

    max_nfe: int | None = None
    nfe: int = 0
    forwards: int = 0
    backwards: int = 0
    rewards: int = 0
    reward_gradients: int = 0
    decodes: int = 0
    tokens: int = 0
    _earlier: float = 0.0
    _since: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return self._earlier + time.monotonic() - self._since

    @property
    def left(self) -> int:
        """Guided predictions that may still be made."""
        return 2**62 if self.max_nfe is None else self.max_nfe - self.nfe

    def spend(self, nfe: int) -> None:
        """Count guided predictions, before they are made.

        Raises:
            BudgetExceeded: more than are left.
        """
        if nfe > self.left:
            raise BudgetExceeded(f"nfe: {self.nfe} spent, {nfe} more asked for, max_nfe is {self.max_nfe}")
        self.nfe += nfe

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it, with the peak bytes of the GPU (0 without one)."""
        counts = {name: value for name, value in asdict(self).items() if not name.startswith("_")}
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        return {**counts, "seconds": self.seconds, "peak_bytes": peak}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "Ledger":
        """Take up a saved one again; its clock goes on from its seconds."""
        counts = {name: value for name, value in saved.items() if name not in ("seconds", "peak_bytes")}
        return cls(**counts, _earlier=saved["seconds"])
