"""A pipeline with the scheduler stand-in and the prompt memo installed, called under a `LoopRun`, and restored."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from visalign.transitions import Schedule

from .calls import (
    call_arguments,
    call_parameters,
    check_batch,
    check_names,
    own_random_state,
    refuse_unfit,
)
from .loop import LoopRun, StepFn
from .prompt_memo import PromptMemo
from .schedulers import schedule_of, to_supported_scheduler
from .stepping import LeaveLoop, SchedulerStandIn, UnsupportedPipeline
from .stubs import Stubs


class PipelineDriver:
    """Calls `pipeline` with its loop under control; while no call is under way the pipeline behaves as stock.

    Attributes:
        schedule: the noise levels of the latest call; None before the first.
        scheduler: the real scheduler behind the stand-in, as converted by `to_supported_scheduler`.
        memo: in front of the pipeline's `encode_prompt`, if it has one.
        settings: arguments of every call.
    """

    def __init__(self, pipeline: Any, settings: dict[str, Any], seed_device: str | torch.device) -> None:
        refuse_unfit(pipeline)
        self.pipeline, self.settings, self.seed_device = pipeline, settings, seed_device
        self.parameters = call_parameters(pipeline)
        self.schedule: Schedule | None = None
        self.scheduler = to_supported_scheduler(pipeline.scheduler)
        self.stand_in = SchedulerStandIn(self.scheduler)
        self.memo = PromptMemo(pipeline.encode_prompt) if hasattr(pipeline, "encode_prompt") else None
        self._stubs = Stubs()
        self._stock: dict[str, Any] = {"scheduler": pipeline.scheduler}
        self._progress = dict(getattr(pipeline, "_progress_bar_config", {}))
        self._install()

    def _install(self) -> None:
        pipe = self.pipeline
        pipe.__dict__["scheduler"] = self.stand_in  # not setattr, which would rewrite pipe.config
        if self.memo is not None:
            pipe.__dict__["encode_prompt"] = self.memo.encode
        pipe.set_progress_bar_config(disable=True)
        for module in pipe.components.values():
            if isinstance(module, nn.Module):
                module.eval()  # text encoders built directly keep their dropout on

    def close(self) -> None:
        """Give the pipeline its scheduler, text encoders, `encode_prompt` and progress bar back."""
        if self.pipeline.__dict__.get("scheduler") is not self.stand_in:
            return  # closed before
        self.pipeline.__dict__.pop("encode_prompt", None)
        self.pipeline.__dict__.update(self._stock)
        self.pipeline._progress_bar_config = self._progress

    def encode_anew(self) -> None:
        """Encode prompts anew in every call, with gradient where it is recorded."""
        self._memo().trained = True

    def _memo(self) -> PromptMemo:
        if self.memo is None:
            name = type(self.pipeline).__name__
            raise UnsupportedPipeline(f"pipeline: got {name} without encode_prompt, expected one with it")
        return self.memo

    def release_text_encoders(self) -> None:
        """Take the text encoders out of the pipeline, to the CPU, until `close`."""
        if self._memo().trained:
            raise ValueError("release_text_encoders: got text encoders under training, expected frozen ones")
        self._memo().frozen = True
        for name, module in self.pipeline.components.items():
            if name.startswith("text_encoder") and isinstance(module, nn.Module):
                self._stock[name] = module.to("cpu")
                self.pipeline.__dict__[name] = None

    def modules(self, names: Sequence[str]) -> dict[str, nn.Module]:
        """The components of these names that are modules."""
        components = self.pipeline.components
        return {name: components[name] for name in names if isinstance(components.get(name), nn.Module)}

    def arguments(self, prompts: Sequence[str], seeds: Sequence[int], inputs: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments of one call."""
        check_batch(prompts, seeds)
        check_names(inputs, self.parameters)
        settings = {**self.settings, "output_type": "pt", "return_dict": False, **inputs}
        return call_arguments(self.parameters, settings, prompts, seeds, self.seed_device)

    def run(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        inputs: dict[str, Any],
        step_fn: StepFn,
        *,
        denoisers: Sequence[str] = (),
        feed: tuple[int, torch.dtype] | None = None,
        output_type: str = "pt",
        **options: Any,
    ) -> tuple[LoopRun, Any]:
        """Call the pipeline under a `LoopRun` with these options; returns the run and the pipeline's output.

        Args:
            denoisers: components to stub where no step runs.
            feed: (first, dtype): a state of the loop's first step goes in as the call's `latents`, in this dtype.
        """
        arguments = self.arguments(prompts, seeds, inputs)
        if "output_type" in arguments:
            arguments["output_type"] = output_type
        grad = torch.is_grad_enabled()
        run = LoopRun(step_fn, self._stubs, self.modules(denoisers), self._on_schedule, grad=grad, **options)
        first: Tensor | None = run.states.get(feed[0]) if feed else None
        if feed and first is not None and not (grad and first.requires_grad):  # prepared under no_grad
            arguments["latents"] = first.detach().to(feed[1], copy=True)
            run.feed(first, arguments["latents"])
        if self.stand_in.control is not None:
            raise RuntimeError("pipeline: got a call from inside step_fn, expected one call at a time")
        self.stand_in.control = run
        if self.memo is not None:
            self.memo.grad = grad
        media = None
        try:
            with own_random_state(int(seeds[0]), self.pipeline.device):
                media = type(self.pipeline).__call__(self.pipeline, **arguments)
        except LeaveLoop:
            pass
        finally:
            self.stand_in.control = None
            self._stubs.off()
            if self.memo is not None:
                self.memo.grad = False
        return run, media

    def _on_schedule(self, scheduler: Any) -> None:
        self.schedule = schedule_of(scheduler)
