"""A stand-in for a pipeline's scheduler: every step of the pipeline's own loop goes through a function of ours.

A stock diffusers pipeline asks its scheduler which timesteps to run and what comes after each prediction. Standing
in for the scheduler is therefore enough to drive any of them, with their own conditioning, packing and guidance.
While no `LoopControl` is attached the stand-in is the real scheduler in every respect.
"""

import functools
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor


class UnsupportedPipeline(ValueError):
    """The pipeline cannot be driven through its scheduler; the message says why."""


class LeaveLoop(BaseException):
    """Leaves the pipeline from inside its loop (not an Exception: no handler on the way may stop it)."""


class LoopControl(Protocol):
    """Who decides what runs, in one pipeline call."""

    def on_schedule(self, scheduler: Any) -> None:
        """`set_timesteps` has just been called on the real scheduler."""
        ...

    def order(self, first: int, count: int) -> Iterator[int]:
        """The step indices to run, for a loop over `count` timesteps from index `first`."""
        ...

    def timestep(self, step_index: int, timestep: Tensor) -> Tensor:
        """What the loop is shown as this step's timestep, in place of the schedule's own."""
        ...

    def enter(self, step_index: int | None) -> None:
        """The loop is about to run this step; None: the loop has ended."""
        ...

    def on_step(self, prediction: Tensor, latents: Tensor) -> Tensor:
        """The pipeline's prediction at its latents; returns the next latents."""
        ...


class StepOutput(tuple):
    """What a scheduler's `step` returns, read as a tuple or as an output object."""

    prev_sample = property(lambda self: self[0])
    pred_original_sample = property(lambda self: self[1])  # where a pipeline decodes this one (LCM), it is the last


class Timesteps(Tensor):
    """The schedule's timesteps, whole in length, values and slices; only iteration is decided by the control.

    A shorter tensor would not do: pipelines compare lengths, slice by strength and read neighbours.
    """

    # Without this the subclass would spread into everything computed from it.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    control: LoopControl
    offset: int  # index in the schedule of this slice's first element

    @classmethod
    def of(cls, timesteps: Tensor, control: LoopControl, offset: int = 0) -> "Timesteps":
        wrapped = timesteps.as_subclass(cls)
        wrapped.control, wrapped.offset = control, offset
        return wrapped

    def __getitem__(self, key: Any) -> Tensor:  # type: ignore[override]
        part = self.as_subclass(Tensor)[key]
        if isinstance(key, slice) and key.step in (None, 1):
            return Timesteps.of(part, self.control, self.offset + key.indices(len(self))[0])
        return part

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        return Timesteps.of(self.as_subclass(Tensor).to(*args, **kwargs), self.control, self.offset)

    def __iter__(self) -> Iterator[Tensor]:
        # The pipeline's `for t in timesteps` comes here. Yielding some steps alone is how others are left out, and what
        # runs between two yields is the pipeline's own step: what it does there, it does as in a stock call.
        plain = self.as_subclass(Tensor)
        for index in self.control.order(self.offset, len(plain)):
            self.control.enter(index)
            yield self.control.timestep(index, plain[index - self.offset])
        self.control.enter(None)


class SchedulerStandIn:
    """Stands for `inner` in a pipeline; with a `control` attached, its loop and its steps are the control's.

    Anything not named here is the real scheduler's, on reading and on writing. `set_timesteps` and `step` keep the
    real signatures, which pipelines inspect to find out what they may pass.
    """

    _OWN = frozenset({"inner", "control", "set_timesteps", "step", "timesteps"})

    inner: Any
    control: LoopControl | None

    def __init__(self, inner: Any) -> None:
        self.inner, self.control = inner, None

        @functools.wraps(inner.set_timesteps)
        def set_timesteps(*args: Any, **kwargs: Any) -> Any:
            out = inner.set_timesteps(*args, **kwargs)
            if self.control is not None:
                self.control.on_schedule(inner)
            return out

        @functools.wraps(inner.step)
        def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.control is None:
                return inner.step(model_output, timestep, sample, *args, **kwargs)
            if sample.ndim > 1 and model_output.shape[1] == 2 * sample.shape[1]:
                model_output = model_output.chunk(2, dim=1)[0]  # learned variance: the mean comes first
            latents = self.control.on_step(model_output, sample)
            return StepOutput((latents, latents))

        self.set_timesteps, self.step = set_timesteps, step

    @property
    def timesteps(self) -> Tensor:
        if self.control is None:
            return self.inner.timesteps
        return Timesteps.of(self.inner.timesteps.detach(), self.control)

    @timesteps.setter
    def timesteps(self, value: Tensor) -> None:
        self.inner.timesteps = value
        if self.control is not None:
            self.control.on_schedule(self.inner)

    def scale_model_input(self, sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The identity: every supported scheduler keeps unit-variance latents."""
        return sample

    def __deepcopy__(self, memo: dict) -> Any:
        raise UnsupportedPipeline(
            "pipeline: got one that copies its scheduler to integrate several latents at once "
            "(sound beside film, or one schedule per frame), expected one latent tensor per loop"
        )

    def __len__(self) -> int:
        return len(self.inner)

    def __getattr__(self, name: str) -> Any:
        if name in self._OWN:  # not set yet
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._OWN:
            object.__setattr__(self, name, value)
        else:
            setattr(self.inner, name, value)

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # pipelines ask isinstance(scheduler, ...)
        return type(self.inner)
