"""One pass through a pipeline's own denoising loop: which steps run, where latents of ours enter, what a step does."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .stepping import LeaveLoop
from .stubs import Stubs

StepFn = Callable[[int, Tensor, Tensor], Tensor | None]


@dataclass
class LoopRun:
    """The `LoopControl` of one pipeline call.

    Attributes:
        step_fn: (step_index, latents float32, prediction float32) -> next latents, called at each step that runs.
        steps: the steps that run; the others pass through stubs and leave the latents as they are. None: all.
        states: latents to enter with at these steps, whatever came before.
        leave: leave the pipeline after the last of `steps`, without decoding.
        stubs, denoisers: what is stubbed, and by what.
        stub_all: run no denoiser at all (to see the loop's first latents).
        times: timesteps to show at these steps, in place of the schedule's own.
        grad: record gradients, at the steps that run (`grad_steps`: only at these of them).
    """

    step_fn: StepFn
    stubs: Stubs
    denoisers: dict[str, nn.Module]
    on_schedule: Callable[[Any], None]
    steps: Collection[int] | None = None
    states: Mapping[int, Tensor] = field(default_factory=dict)
    times: Mapping[int, float] = field(default_factory=dict)
    leave: bool = False
    stub_all: bool = False
    grad: bool = False
    grad_steps: Collection[int] | None = None

    latents: Tensor | None = None  # the latest state, float32
    at: int | None = None  # the step under way
    seen: list[int] = field(default_factory=list)  # steps whose `step` came
    dtype: torch.dtype | None = None  # of the pipeline's latents
    _handed: tuple[Tensor, Tensor] | None = None  # the state in float32, and as the pipeline got it
    _handover: bool = False  # the first step is passed once, stubbed, only to enter with latents of ours

    def feed(self, state: Tensor, handed: Tensor) -> None:
        """The pipeline is given `handed`, a copy of states[first], as its initial latents."""
        self._handed = (state, handed)

    def order(self, first: int, count: int) -> Iterator[int]:
        # A call that takes no latents has drawn its own by now. The first step is then run once more than the loop has:
        # stubbed, for nothing, so that what its `step` returns, and the next one begins with, is the state of ours.
        if first in self.states and self._handed is None:
            self._handover = True
            yield first
            self._handover = False
        yield from range(first, first + count)

    def timestep(self, step_index: int, timestep: Tensor) -> Tensor:
        return torch.full_like(timestep, self.times[step_index]) if step_index in self.times else timestep

    def enter(self, step_index: int | None) -> None:
        self.at = step_index
        runs = step_index is not None and self._runs(step_index)
        if runs or step_index is None:
            self.stubs.off()
        if not runs and step_index is not None or self.stub_all:
            self.stubs.on(self.denoisers)
        # `__call__` runs under no_grad, but the mode is the thread's, not the frame's: set here, it holds for what the
        # pipeline does until the next step, which is how gradients pass through a call that means to have none.
        if step_index is None:  # what follows is decoding
            torch.set_grad_enabled(self.grad and self.latents is not None and self.latents.requires_grad)
        else:
            torch.set_grad_enabled(self.grad and runs and (self.grad_steps is None or step_index in self.grad_steps))

    def on_step(self, prediction: Tensor, latents: Tensor) -> Tensor:
        if self.at is None:
            raise ValueError(
                "pipeline: got a step outside its loop over scheduler.timesteps, expected one per timestep"
            )
        step, self.dtype = self.at, latents.dtype
        with torch.set_grad_enabled(self.grad):  # along the latents, also where the prediction is a constant
            following = self._next(step, self._state(latents), prediction)
        return self._hand(following, latents.dtype)

    def _next(self, step: int, state: Tensor, prediction: Tensor) -> Tensor:
        if self._handover:
            return self.states[step]
        self.seen.append(step)
        following: Tensor | None = state
        if self._runs(step):
            following = self.step_fn(step, state, prediction.float())
            _check_next(following, state, step, optional=self._need_no_next(step))
            self.latents = following
            if self.leave and self.steps is not None and step == max(self.steps):
                raise LeaveLoop
        self.latents = self.states.get(step + 1, state if following is None else following)
        return self.latents

    def _runs(self, step: int) -> bool:
        return not self._handover and (self.steps is None or step in self.steps)

    def _need_no_next(self, step: int) -> bool:
        """Whether nothing will run on what this step returns."""
        return self.steps is not None and (step + 1 in self.states or (self.leave and step + 1 not in self.steps))

    def _state(self, latents: Tensor) -> Tensor:
        """The float32 state behind the pipeline's latents, with what the pipeline changed since it got them."""
        if self._handed is None or latents.dtype == torch.float32:
            return latents.float()
        state, handed = self._handed
        return state + (latents - handed).float()

    def _hand(self, state: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy for the pipeline (some write condition frames into it), through which gradients pass."""
        with torch.set_grad_enabled(self.grad):
            handed = state.to(dtype, copy=True)
        if handed.requires_grad:
            torch.set_grad_enabled(True)  # for what the pipeline does to it before the next step
        self._handed = (state, handed)
        return handed


def _check_next(following: Any, state: Tensor, step: int, optional: bool) -> None:
    if following is None and optional:
        return
    if not isinstance(following, Tensor) or following.shape != state.shape:
        got = f"shape {tuple(following.shape)}" if isinstance(following, Tensor) else type(following).__name__
        raise ValueError(f"step_fn: got {got} at step {step}, expected the next latents, {tuple(state.shape)}")
