"""Any stock diffusers pipeline as a policy: initial noise, guided prediction, driven denoising, decoding.

There are no model adapters. The pipeline's own `__call__` runs, with a stand-in for its scheduler that hands every
step to a function of the caller; steps that are not wanted are passed with the denoiser stubbed out. So conditioning,
guidance, packing and decoding are the pipeline's own, in rollouts and in training alike.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from visalign.calibration import Learned, check, learn
from visalign.loop import LoopRun, StepFn
from visalign.pipeline_calls import (
    call_arguments,
    call_parameters,
    check_batch,
    check_names,
    folder_defaults,
    own_random_state,
    refuse_unfit,
    to_images,
)
from visalign.prompt_memo import PromptMemo
from visalign.schedulers import schedule_of, to_supported_scheduler
from visalign.stepping import LeaveLoop, SchedulerStandIn, UnsupportedPipeline
from visalign.stubs import Stubs
from visalign.transitions import Schedule

_USUAL_DENOISERS = ("transformer", "unet", "transformer_2", "decoder", "prior")


class Generator:
    """A diffusers pipeline, driven step by step.

    Args:
        pipeline: any text-to-image, text-to-video or edit pipeline; its modules are put in eval mode, its scheduler
            is replaced by `to_supported_scheduler`'s until `close`. Used directly it stays a stock pipeline.
        num_steps: denoising steps per image.
        guidance_scale: the pipeline's own argument of that name (1 turns classifier-free guidance off; models with
            `true_cfg_scale` take it as a call argument); None: the pipeline's default.
        seed_device: where the per-sample noise is drawn; "cpu" makes it the same on every machine.
        calibrate: compare prediction and step with the stock ones at the first use, and refuse what differs.
        call_kwargs: further arguments of every pipeline call (height, width, negative_prompt, ...).

    Latents are opaque, (N, ...) as the pipeline's loop holds them (packed or not), in float32; images are
    (N, 3, H, W), videos (N, F, 3, H, W), float32 in [0, 1]. Sample k depends on prompts[k], seeds[k] and its inputs
    alone. During a call torch's global random state is forked and seeded by the first seed.

    Raises:
        UnsupportedPipeline: this pipeline cannot be driven this way; says why.
        ValueError: an argument that the pipeline does not have; names the nearest.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        num_steps: int = 10,
        guidance_scale: float | None = None,
        seed_device: str | torch.device = "cpu",
        calibrate: bool = True,
        **call_kwargs: Any,
    ) -> None:
        if num_steps < 1:
            raise ValueError(f"num_steps: got {num_steps}, expected >= 1")
        refuse_unfit(pipeline)
        self.pipeline, self.num_steps, self.guidance_scale = pipeline, num_steps, guidance_scale
        self.seed_device, self.calibrate = seed_device, calibrate
        self._parameters = call_parameters(pipeline)
        if guidance_scale is not None and "guidance_scale" not in self._parameters:
            raise ValueError(f"guidance_scale: got {guidance_scale}, expected None ({_name(pipeline)} has no guidance)")
        check_names(call_kwargs, self._parameters)
        self.call_kwargs = call_kwargs
        self._stubs = Stubs()
        self._learned: dict[frozenset[str], Learned] = {}
        self._schedule: Schedule | None = None
        self._released: dict[str, nn.Module] = {}
        self._install()

    @classmethod
    def from_pretrained(
        cls,
        id_or_folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        **call_kwargs: Any,
    ) -> "Generator":
        """A Generator over a model folder or hub id, from safetensors files only.

        The folder may hold `visalign.json`, with defaults: {"num_steps": 10, "guidance_scale": 1.0,
        "call_kwargs": {"height": 64}}. Arguments given here win.

        Raises:
            ValueError: no such folder, a folder without `model_index.json`, or an unreadable `visalign.json`.
        """
        defaults = folder_defaults(id_or_folder)
        pipeline = DiffusionPipeline.from_pretrained(str(id_or_folder), torch_dtype=dtype, use_safetensors=True)
        return cls(
            pipeline.to(device),
            num_steps=num_steps if num_steps is not None else defaults.get("num_steps", 10),
            guidance_scale=guidance_scale if guidance_scale is not None else defaults.get("guidance_scale"),
            **{**defaults.get("call_kwargs", {}), **call_kwargs},
        )

    # What it is ------------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return next(self.denoiser.parameters()).device

    @property
    def denoisers(self) -> dict[str, nn.Module]:
        """The modules that run inside the loop, by component name (before the first use: those of the usual names)."""
        names = dict.fromkeys(name for learned in self._learned.values() for name in learned.denoisers)
        modules = self.pipeline.components
        return {n: modules[n] for n in names or _USUAL_DENOISERS if isinstance(modules.get(n), nn.Module)}

    @property
    def denoiser(self) -> nn.Module:
        """The main one of `denoisers`: the transformer or U-Net."""
        denoisers = self.denoisers
        if not denoisers:
            raise UnsupportedPipeline(f"pipeline: got {_name(self.pipeline)}, expected one with a denoiser")
        return next((denoisers[name] for name in _USUAL_DENOISERS if name in denoisers), next(iter(denoisers.values())))

    @property
    def schedule(self) -> Schedule:
        """The noise levels of the latest call, after the pipeline's own `set_timesteps`; runs a first use if none."""
        if self._schedule is None:
            self.noise(["a photo"], [0])
        assert self._schedule is not None
        return self._schedule

    # What it does ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def noise(self, prompts: Sequence[str], seeds: Sequence[int], **inputs: Any) -> Tensor:
        """The loop's first latents, (N, ...) float32, drawn sample by sample from `seeds`."""
        first = self._learn(prompts, seeds, inputs).first
        seen: list[Tensor] = []

        def step_fn(_step_index: int, latents: Tensor, _prediction: Tensor) -> None:
            seen.append(latents)

        self._run(prompts, seeds, inputs, step_fn, steps={first}, leave=True, stub_all=True)
        return seen[0]

    def predict(
        self,
        latents: Tensor,
        step_index: int,
        prompts: Sequence[str],
        seeds: Sequence[int] | None = None,
        **inputs: Any,
    ) -> Tensor:
        """The guided prediction at `latents` (N, ...) and a step, (N, ...) float32, with gradient if grad is enabled.

        `seeds` matter only where the pipeline draws more than the initial noise (condition encoders that sample).
        """
        seen: list[Tensor] = []

        def step_fn(_step_index: int, _latents: Tensor, prediction: Tensor) -> None:
            seen.append(prediction)

        self.denoise(prompts, _or_zeros(seeds, prompts), step_fn, latents={step_index: latents}, **inputs)
        return seen[0]

    def denoise(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        step_fn: StepFn,
        *,
        latents: Tensor | Mapping[int, Tensor] | None = None,
        start: int | None = None,
        stop: int | None = None,
        decode: bool = False,
        grad_steps: Collection[int] | None = None,
        **inputs: Any,
    ) -> Any:
        """One pipeline call whose steps start .. stop-1 are `step_fn(step_index, latents, prediction) -> next latents`.

        Steps outside are passed at no model cost. Latents and prediction come in float32.

        Args:
            latents: the state to enter step `start` with, (N, ...); None: the noise of `seeds`. A mapping from step
                to state is teacher forcing: exactly these steps run, each on its own state, and `step_fn` may return
                None wherever its result is not needed.
            decode: also decode the final latents.
            grad_steps: the steps that record gradients, if grad is enabled; None: all that run. Backward may be called
                inside `step_fn`; what it returns should then be detached, or the next step extends the freed graph.
            inputs: arguments of the pipeline for this call (image, ...).

        Returns:
            The final latents, or (latents, images) if `decode`.
        """
        learned = self._learn(prompts, seeds, inputs)
        forced = isinstance(latents, Mapping)
        start = learned.first if start is None else start
        stop = learned.last + 1 if stop is None else stop
        if latents is None and start != learned.first:
            raise ValueError(f"latents: got None, expected the state at step {start} (start)")
        if not learned.first <= start <= stop <= learned.last + 1:
            raise ValueError(
                f"start, stop: got {start}, {stop}, expected {learned.first} <= start <= stop <= {learned.last + 1}"
            )
        states = dict(latents) if isinstance(latents, Mapping) else {} if latents is None else {start: latents}
        steps: Collection[int] = frozenset(states) if forced else range(start, stop)
        valid = range(learned.first, learned.last + 1 + (not forced))
        for step, state in states.items():
            if step not in valid:
                raise ValueError(f"step_index: got {step}, expected {valid.start} .. {valid.stop - 1}")
            if len(state) != len(prompts):
                raise ValueError(f"latents: got {len(state)} at step {step}, expected {len(prompts)}, one per prompt")
        run, media = self._run(
            prompts, seeds, inputs, step_fn, steps=steps, states=states, leave=not decode, grad_steps=grad_steps
        )
        return (run.latents, to_images(media)) if decode else run.latents

    def decode(
        self, latents: Tensor, prompts: Sequence[str], seeds: Sequence[int] | None = None, **inputs: Any
    ) -> Tensor:
        """Images (N, 3, H, W) or videos (N, F, 3, H, W) of final latents, float32 in [0, 1], differentiable."""
        seeds = _or_zeros(seeds, prompts)
        end = self._learn(prompts, seeds, inputs).last + 1
        return self.denoise(prompts, seeds, _never, latents=latents, start=end, decode=True, **inputs)[1]

    def check(self, prompts: Sequence[str], seeds: Sequence[int] | None = None, **inputs: Any) -> dict[str, float]:
        """Largest absolute differences to stock runs of the pipeline, see `calibration.check`."""
        return check(self, list(prompts), _or_zeros(seeds, prompts), inputs)

    # Prompts ---------------------------------------------------------------------------------------------------------

    def clear_prompts(self) -> None:
        """Forget all prompt embeddings; needed after a change of the text encoders' weights."""
        if self._memo is not None:
            self._memo.clear()

    def release_text_encoders(self) -> None:
        """Take the text encoders out of the pipeline, to the CPU; only prompts encoded before can then be used."""
        if self._memo is None:
            raise UnsupportedPipeline(f"pipeline: got {_name(self.pipeline)}, expected one with encode_prompt")
        self._memo.frozen = True
        for name, module in self.pipeline.components.items():
            if name.startswith("text_encoder") and isinstance(module, nn.Module):
                self._released[name] = module.to("cpu")
                self.pipeline.__dict__[name] = None

    # Installing ------------------------------------------------------------------------------------------------------

    def _install(self) -> None:
        pipe = self.pipeline
        self._stock_scheduler = pipe.scheduler
        self._stand_in = SchedulerStandIn(to_supported_scheduler(pipe.scheduler))
        pipe.__dict__["scheduler"] = self._stand_in  # not setattr, which would rewrite pipe.config
        self._progress = dict(getattr(pipe, "_progress_bar_config", {}))
        pipe.set_progress_bar_config(disable=True)
        self._memo = PromptMemo(pipe.encode_prompt) if hasattr(pipe, "encode_prompt") else None
        if self._memo is not None:
            pipe.__dict__["encode_prompt"] = self._memo.encode
        for module in pipe.components.values():
            if isinstance(module, nn.Module):
                module.eval()  # text encoders built directly keep their dropout on

    def close(self) -> None:
        """Give the pipeline its scheduler, text encoders and `encode_prompt` back."""
        self._stubs.off()
        if self.pipeline.__dict__.get("scheduler") is self._stand_in:
            self.pipeline.__dict__["scheduler"] = self._stock_scheduler
        if self._memo is not None:
            self.pipeline.__dict__.pop("encode_prompt", None)
        self.pipeline.__dict__.update(self._released)
        self._released.clear()
        self.pipeline._progress_bar_config = self._progress

    def __enter__(self) -> "Generator":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    # One call --------------------------------------------------------------------------------------------------------

    def arguments(self, prompts: Sequence[str], seeds: Sequence[int], **inputs: Any) -> dict[str, Any]:
        """The keyword arguments with which the pipeline is called, also for a stock call of `pipeline`."""
        check_batch(prompts, seeds)
        check_names(inputs, self._parameters)
        settings = {"num_inference_steps": self.num_steps, "output_type": "pt", "return_dict": False}
        if self.guidance_scale is not None:
            settings["guidance_scale"] = self.guidance_scale
        settings |= {**self.call_kwargs, **inputs}
        return call_arguments(self._parameters, settings, prompts, seeds, self.seed_device)

    def _learn(self, prompts: Sequence[str], seeds: Sequence[int], inputs: dict[str, Any]) -> Learned:
        """What the first call with inputs of these names tells of the pipeline."""
        key = frozenset(inputs)
        if key not in self._learned:
            check_batch(prompts, seeds)
            count = len(prompts) if inputs else 1  # inputs may be one per prompt
            self._learned[key] = learn(self, list(prompts)[:count], list(seeds)[:count], inputs)
        return self._learned[key]

    def _run(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        inputs: dict[str, Any],
        step_fn: StepFn,
        *,
        learned: Learned | None = None,
        output_type: str = "pt",
        **options: Any,
    ) -> tuple[LoopRun, Any]:
        """Call the pipeline under a `LoopRun` with these options; returns the run and the pipeline's output."""
        arguments = self.arguments(prompts, seeds, **inputs)
        if "output_type" in arguments:
            arguments["output_type"] = output_type
        learned = learned or self._learned.get(frozenset(inputs))
        denoisers = {name: self.pipeline.components[name] for name in (learned.denoisers if learned else ())}
        run = LoopRun(step_fn, self._stubs, denoisers, self._on_schedule, grad=torch.is_grad_enabled(), **options)
        first = run.states.get(learned.first) if learned else None
        if learned and first is not None and learned.takes_latents:
            arguments["latents"] = first.detach().to(learned.dtype, copy=True)
            run.feed(first, arguments["latents"])
        if self._stand_in.control is not None:
            raise RuntimeError("pipeline: got a call from inside step_fn, expected one call at a time")
        self._stand_in.control = run
        media = None
        try:
            with own_random_state(int(seeds[0]), self.device):
                media = type(self.pipeline).__call__(self.pipeline, **arguments)
        except LeaveLoop:
            pass
        finally:
            self._stand_in.control = None
            self._stubs.off()
        return run, media

    def _on_schedule(self, scheduler: Any) -> None:
        self._schedule = schedule_of(scheduler)


def _never(step_index: int, latents: Tensor, prediction: Tensor) -> Tensor:
    raise AssertionError(f"step {step_index} ran in a call that runs none")


def _or_zeros(seeds: Sequence[int] | None, prompts: Sequence[str]) -> Sequence[int]:
    return [0] * len(prompts) if seeds is None else seeds


def _name(pipeline: Any) -> str:
    return type(pipeline).__name__
