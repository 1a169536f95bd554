"""The noise levels a sampler visits, checked once, with every coefficient also as a Python number.

Reading numbers here, when the schedule is made, keeps device synchronisations out of the denoising loop.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["flow", "diffusion", "consistency"]
PredictionType = Literal["epsilon", "sample", "v_prediction", "velocity"]

_PREDICTION_TYPES = {
    "flow": ("velocity",),
    "diffusion": ("epsilon", "sample", "v_prediction"),
    "consistency": ("epsilon", "sample", "v_prediction"),
}


@dataclass(frozen=True)
class Schedule:
    """T steps; step i goes from level i to level i + 1.

    Attributes:
        kind: "flow" has sigmas; "diffusion" and "consistency" have alphas_cumprod.
        timesteps: (T,), what the network is fed.
        sigmas: (T+1,), float32, strictly falling from at most 1 (noise) to 0 (image).
        alphas_cumprod: (T+1,), never falling, in [0, 1]; the last entry is the level of the result (1, or the
            smallest training level where the scheduler keeps it). A consistency model's last step returns its
            denoised estimate whatever the last entry.
        prediction_type: what the network predicts; "velocity" = noise - data for a flow.
        timestep_scaling, sigma_data: of a consistency model's boundary condition.
        levels: sigmas or alphas_cumprod, as Python numbers (T+1).
        times: timesteps, as Python numbers (T).

    Raises:
        ValueError: missing levels, wrong lengths, levels out of order or range, a kind and prediction type that do
            not go together, or a first sigma within 1e-6 of 1 but not 1 (a shifted schedule rounded in float32: the
            flow SDE's noise would explode there; round it to 1).
    """

    kind: Kind
    timesteps: Tensor
    sigmas: Tensor | None = None
    alphas_cumprod: Tensor | None = None
    prediction_type: PredictionType = "velocity"
    timestep_scaling: float = 10.0
    sigma_data: float = 0.5
    levels: tuple[float, ...] = field(init=False, repr=False, compare=False)
    times: tuple[float, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        if self.kind not in _PREDICTION_TYPES:
            raise ValueError(f"kind: got {self.kind!r}, expected one of {sorted(_PREDICTION_TYPES)}")
        if self.prediction_type not in _PREDICTION_TYPES[self.kind]:
            expected = _PREDICTION_TYPES[self.kind]
            raise ValueError(f"prediction_type: got {self.prediction_type!r}, expected one of {expected} ({self.kind})")
        name, unused = ("sigmas", "alphas_cumprod") if self.kind == "flow" else ("alphas_cumprod", "sigmas")
        if getattr(self, name) is None:
            raise ValueError(f"{name}: got None, expected (T+1,) for a {self.kind} schedule")
        if getattr(self, unused) is not None:
            raise ValueError(f"{unused}: got a tensor, expected None for a {self.kind} schedule")
        object.__setattr__(self, "levels", _numbers(getattr(self, name), name))
        object.__setattr__(self, "times", _numbers(self.timesteps, "timesteps"))
        if len(self.times) < 1 or len(self.levels) != len(self.times) + 1:
            raise ValueError(f"{name}: got {len(self.levels)} levels for {len(self.times)} timesteps, expected T+1, T")
        if self.kind == "flow":
            _check_sigmas(self.levels)
        else:
            _check_alphas(self.levels, self.prediction_type)
            for option in ("timestep_scaling", "sigma_data"):
                if getattr(self, option) <= 0:
                    raise ValueError(f"{option}: got {getattr(self, option)}, expected > 0")

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.times)

    def step(self, step_index: int) -> tuple[float, float]:
        """The levels before and after step `step_index`, in 0 .. T-1."""
        if not 0 <= step_index < self.num_steps:
            raise ValueError(f"step_index: got {step_index}, expected 0 .. {self.num_steps - 1}")
        return self.levels[step_index], self.levels[step_index + 1]


def _numbers(values: Tensor, name: str) -> tuple[float, ...]:
    if not isinstance(values, Tensor) or values.dim() != 1:
        raise ValueError(f"{name}: got {type(values).__name__}, expected a tensor of one dimension")
    numbers = tuple(values.detach().to("cpu", torch.float64).tolist())
    if not all(number == number and abs(number) != float("inf") for number in numbers):
        raise ValueError(f"{name}: got {numbers}, expected finite numbers")
    return numbers


def _check_sigmas(sigmas: tuple[float, ...]) -> None:
    if 1 - 1e-6 < sigmas[0] < 1:
        raise ValueError(f"sigmas: got a first sigma of {sigmas[0]!r}, expected exactly 1 or at most 1 - 1e-6")
    if sigmas[0] > 1 or sigmas[-1] != 0:
        raise ValueError(f"sigmas: got {sigmas[0]} to {sigmas[-1]}, expected at most 1 to exactly 0")
    if any(after >= before for before, after in zip(sigmas, sigmas[1:])):
        raise ValueError(f"sigmas: got {sigmas}, expected strictly falling")


def _check_alphas(alphas: tuple[float, ...], prediction_type: str) -> None:
    if any(after < before for before, after in zip(alphas, alphas[1:])):
        raise ValueError(f"alphas_cumprod: got {alphas}, expected never falling")
    if alphas[0] < 0 or alphas[-1] > 1 or alphas[-2] == 1:
        raise ValueError(f"alphas_cumprod: got {alphas}, expected within [0, 1], and only the last may be 1")
    if alphas[0] == 0 and prediction_type == "epsilon":
        raise ValueError(
            "alphas_cumprod: got 0 with epsilon prediction, expected > 0 (pure noise says nothing of data)"
        )
