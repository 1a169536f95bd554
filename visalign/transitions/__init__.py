"""A step of a sampler as a distribution: (schedule, step, latents, prediction) -> Gaussian over the next latents."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

from visalign.locations import check_location, load_location
from visalign.names import build, unknown_name
from visalign.transitions.consistency import consistency_std, consistency_step
from visalign.transitions.diffusion import ddim, ddim_std
from visalign.transitions.flow import (
    cps,
    cps_std,
    dance_sde,
    dance_sde_std,
    dpm_solver_2m,
    flow_ddim,
    flow_ddim_std,
    flow_ode,
    flow_sde,
    flow_sde_std,
    shift_sigmas,
    velocity_to_denoised,
    velocity_to_noise,
)
from visalign.transitions.gaussian import Gaussian, unscaled_log_prob
from visalign.transitions.memoryless import MemorylessFlow
from visalign.transitions.schedule import Schedule

__all__ = [
    "TRANSITIONS",
    "check_transition",
    "CPS",
    "DDIM",
    "Consistency",
    "DanceSDE",
    "FlowDDIM",
    "FlowODE",
    "FlowSDE",
    "Gaussian",
    "MemorylessFlow",
    "Schedule",
    "Transition",
    "consistency_step",
    "cps",
    "dance_sde",
    "ddim",
    "dpm_solver_2m",
    "flow_ddim",
    "flow_ode",
    "flow_sde",
    "make_transition",
    "noisy_of",
    "ode_of",
    "sampler_of",
    "shift_sigmas",
    "unscaled_log_prob",
    "velocity_to_denoised",
    "velocity_to_noise",
]


class Transition(Protocol):
    """What a rollout, a trainer or a search needs to know of a sampler."""

    @property
    def name(self) -> str:
        """The name `make_transition` knows it by."""
        ...

    @property
    def stochastic(self) -> bool:
        """Whether it has any noise at all; single steps may still have none (see `std`)."""
        ...

    def std(self, schedule: Schedule, step_index: int) -> float:
        """Spread of one step, without tensors; 0 where the step is deterministic and has no log-probability."""
        ...

    def __call__(
        self, schedule: Schedule, step_index: int, latents: Tensor, prediction: Tensor
    ) -> tuple[Gaussian, Tensor]:
        """The Gaussian over the next latents and the estimate of x0, from latents and prediction (N, ...)."""
        ...


@dataclass(frozen=True)
class FlowODE:
    """Euler steps of a flow's ODE."""

    name: ClassVar[str] = "flow_ode"
    stochastic: ClassVar[bool] = False

    def std(self, schedule: Schedule, step_index: int) -> float:
        _levels(schedule, step_index, "flow", self.name)
        return 0.0

    def __call__(
        self, schedule: Schedule, step_index: int, latents: Tensor, prediction: Tensor
    ) -> tuple[Gaussian, Tensor]:
        sigma, sigma_next = _levels(schedule, step_index, "flow", self.name)
        return flow_ode(latents, prediction, sigma, sigma_next), velocity_to_denoised(latents, prediction, sigma)


@dataclass(frozen=True)
class FlowSDE:
    """Flow-GRPO's SDE, see `flow_sde`."""

    name: ClassVar[str] = "flow_sde"
    eta: float = 0.7  # noise strength; 0 is the ODE

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def std(self, schedule: Schedule, step_index: int) -> float:
        return flow_sde_std(*_levels(schedule, step_index, "flow", self.name), self.eta)

    def __call__(
        self, schedule: Schedule, step_index: int, latents: Tensor, prediction: Tensor
    ) -> tuple[Gaussian, Tensor]:
        sigma, sigma_next = _levels(schedule, step_index, "flow", self.name)
        gaussian = flow_sde(latents, prediction, sigma, sigma_next, self.eta)
        return gaussian, velocity_to_denoised(latents, prediction, sigma)


@dataclass(frozen=True)
class DanceSDE:
    """DanceGRPO's SDE, see `dance_sde`."""

    name: ClassVar[str] = "dance_sde"
    eta: float = 0.3  # diffusion coefficient; 0 is the ODE

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def std(self, schedule: Schedule, step_index: int) -> float:
        return dance_sde_std(*_levels(schedule, step_index, "flow", self.name), self.eta)

    def __call__(
        self, schedule: Schedule, step_index: int, latents: Tensor, prediction: Tensor
    ) -> tuple[Gaussian, Tensor]:
        sigma, sigma_next = _levels(schedule, step_index, "flow", self.name)
        gaussian = dance_sde(latents, prediction, sigma, sigma_next, self.eta)
        return gaussian, velocity_to_denoised(latents, prediction, sigma)


@dataclass(frozen=True)
class CPS:
    """Coefficients-preserving sampling, see `cps`; its last step is deterministic."""

    name: ClassVar[str] = "cps"
    eta: float = 0.8  # in [0, 1]; share of the noise drawn afresh, as an angle in quarter turns

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def std(self, schedule: Schedule, step_index: int) -> float:
        return cps_std(*_levels(schedule, step_index, "flow", self.name), self.eta)

    def __call__(
        self, schedule: Schedule, step_index: int, latents: Tensor, prediction: Tensor
    ) -> tuple[Gaussian, Tensor]:
        sigma, sigma_next = _levels(schedule, step_index, "flow", self.name)
        gaussian = cps(latents, prediction, sigma, sigma_next, self.eta)
        return gaussian, velocity_to_denoised(latents, prediction, sigma)


@dataclass(frozen=True)
class FlowDDIM:
    """DDIM's family on a flow, see `flow_ddim`: the noisy sampler of searches; its last step is deterministic."""

    name: ClassVar[str] = "flow_ddim"
    eta: float = 1.0  # in [0, 1]; 0 is the ODE, 1 draws all the noise afresh that the path allows

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def std(self, schedule: Schedule, step_index: int) -> float:
        return flow_ddim_std(*_levels(schedule, step_index, "flow", self.name), self.eta)

    def __call__(
        self, schedule: Schedule, step_index: int, latents: Tensor, prediction: Tensor
    ) -> tuple[Gaussian, Tensor]:
        sigma, sigma_next = _levels(schedule, step_index, "flow", self.name)
        gaussian = flow_ddim(latents, prediction, sigma, sigma_next, self.eta)
        return gaussian, velocity_to_denoised(latents, prediction, sigma)


@dataclass(frozen=True)
class DDIM:
    """DDIM steps of a diffusion, see `ddim`."""

    name: ClassVar[str] = "ddim"
    eta: float = 1.0  # in [0, 1]; 0 is deterministic, 1 the DDPM posterior

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def std(self, schedule: Schedule, step_index: int) -> float:
        return ddim_std(*_levels(schedule, step_index, "diffusion", self.name), self.eta)

    def __call__(
        self, schedule: Schedule, step_index: int, latents: Tensor, prediction: Tensor
    ) -> tuple[Gaussian, Tensor]:
        alpha, alpha_prev = _levels(schedule, step_index, "diffusion", self.name)
        return ddim(latents, prediction, alpha, alpha_prev, self.eta, schedule.prediction_type)


@dataclass(frozen=True)
class Consistency:
    """Multistep consistency sampling, see `consistency_step`; the last step returns the denoised estimate, no noise."""

    name: ClassVar[str] = "consistency"
    eta: float = 1.0  # in [0, 1]; 1 re-noises afresh (the usual sampler), 0 is deterministic

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def _step(self, schedule: Schedule, step_index: int) -> tuple[float, float]:
        alpha, alpha_prev = _levels(schedule, step_index, "consistency", self.name)
        return alpha, 1.0 if step_index == schedule.num_steps - 1 else alpha_prev

    def std(self, schedule: Schedule, step_index: int) -> float:
        return consistency_std(self._step(schedule, step_index)[1], self.eta)

    def __call__(
        self, schedule: Schedule, step_index: int, latents: Tensor, prediction: Tensor
    ) -> tuple[Gaussian, Tensor]:
        alpha, alpha_prev = self._step(schedule, step_index)
        return consistency_step(
            latents,
            prediction,
            schedule.times[step_index],
            alpha,
            alpha_prev,
            prediction_type=schedule.prediction_type,
            timestep_scaling=schedule.timestep_scaling,
            sigma_data=schedule.sigma_data,
            eta=self.eta,
        )


TRANSITIONS: dict[str, type] = {
    maker.name: maker for maker in (FlowODE, FlowSDE, DanceSDE, CPS, FlowDDIM, MemorylessFlow, DDIM, Consistency)
}


def make_transition(name: str, **options: Any) -> Transition:
    """Make a transition by its name in TRANSITIONS, or a user's class (or function) by where it is.

    Options are its fields (eta, where it has one). "module:attribute" and "path/to/file.py:attribute" are called with
    the options, and give a Transition.

    Raises:
        ValueError: an unknown name, location or option; the error names the nearest valid one.
    """
    if ":" not in name:
        return build(name, TRANSITIONS, "transition", **options)
    check_location("transition", name)
    maker = load_location("transition", name)
    try:
        transition = maker(**options)
    except TypeError as error:
        raise ValueError(f"transition: could not call {name!r} with {sorted(options)}: {error}") from error
    missing = [part for part in ("stochastic", "std", "__call__") if not hasattr(transition, part)]
    if missing:
        raise ValueError(f"transition: got {name!r}, which lacks {missing[0]!r}, expected a Transition")
    return transition


def check_transition(argument: str, name: str, names: Collection[str]) -> None:
    """Refuse a transition that is neither one of these nor a location; a user's file is not run.

    Raises:
        ValueError: names the nearest.
    """
    if ":" in name:
        check_location(argument, name)
    elif name not in names:
        raise unknown_name(argument, name, [*names, "module:attribute", "file.py:attribute"])


def ode_of(schedule: Schedule) -> Transition:
    """The deterministic transition of the schedule's kind: Euler, DDIM at eta 0, or consistency at eta 0."""
    kinds: dict[str, Transition] = {
        "flow": FlowODE(),
        "diffusion": DDIM(eta=0.0),
        "consistency": Consistency(eta=0.0),
    }
    return kinds[schedule.kind]


def noisy_of(schedule: Schedule, eta: float = 1.0) -> Transition:
    """The DDIM family's step of the schedule's kind, with noise: what searches branch and resample by."""
    kinds: dict[str, type] = {"flow": FlowDDIM, "diffusion": DDIM, "consistency": Consistency}
    return kinds[schedule.kind](eta=eta)


def sampler_of(schedule: Schedule) -> Transition:
    """What a model of this kind is usually sampled with: `ode_of`, but for consistency models, which re-noise."""
    return Consistency() if schedule.kind == "consistency" else ode_of(schedule)


def _levels(schedule: Schedule, step_index: int, kind: str, name: str) -> tuple[float, float]:
    if schedule.kind != kind:
        raise ValueError(f"schedule: got kind {schedule.kind!r}, expected {kind!r} for the transition {name!r}")
    return schedule.step(step_index)
