"""What a visitor asks for, and what a reward answers."""

from dataclasses import dataclass, field

from .settings import MAX_PROMPT

BASE, PLAIN = "base", "none"
SEARCHES = ("best-of-n", "fk", "dts-star")  # that a side may be drawn by
MOST_STEPS, MOST_PICTURES, MOST_BUDGET = 50, 8, 5000


@dataclass(frozen=True)
class Side:
    """How one side's pictures are made: a variant at a strength, plainly or by a search for a reward."""

    variant: str = BASE
    strength: float = 1.0
    search: str = PLAIN
    budget: int = 100  # denoiser calls a picture, of a search
    reward: str = ""  # what a search is for

    @property
    def name(self) -> str:
        strength = f" at {self.strength:g}" if self.variant != BASE and self.strength < 1 else ""
        search = f", {self.search} for {self.reward}, {self.budget} calls" if self.search != PLAIN else ""
        return f"{self.variant}{strength}{search}"


@dataclass(frozen=True)
class DrawRequest:
    """What is drawn: a prompt from seeds that count up, with the model's settings.

    Raises:
        ValueError: no prompt or a very long one, or a number out of range.
    """

    prompt: str
    seed: int
    count: int
    steps: int
    guidance: float | None

    def __post_init__(self) -> None:
        if not self.prompt.strip() or len(self.prompt) > MAX_PROMPT:
            raise ValueError(f"prompt: got {len(self.prompt.strip())} characters, expected 1 to {MAX_PROMPT}")
        for name, low, high in (("seed", 0, 2**31), ("count", 1, MOST_PICTURES), ("steps", 1, MOST_STEPS)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected {low} to {high}")
        if self.guidance is not None and not 0 <= self.guidance <= 50:
            raise ValueError(f"guidance: got {self.guidance:g}, expected 0 to 50")

    @property
    def seeds(self) -> list[int]:
        return [self.seed + k for k in range(self.count)]


@dataclass(frozen=True)
class Reading:
    """What one reward says of one picture; `problem` says why there is no score."""

    score: float | None
    criteria: dict[str, float] = field(default_factory=dict)
    rationale: str | None = None
    problem: str | None = None
