"""Any stock diffusers pipeline as a policy: initial noise, guided prediction, driven denoising, decoding.

There are no model adapters. The pipeline's own `__call__` runs, with a stand-in for its scheduler that hands every
step to a function of the caller; steps that are not wanted are passed with the denoiser stubbed out. So conditioning,
guidance, packing and decoding are the pipeline's own, in rollouts and in training alike.

The heart is an iterator, `stepping.Timesteps.__iter__`: the pipeline loops over its scheduler's timesteps, and so asks
us before each step, on which `loop.LoopRun` decides.
"""

import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from visalign.transitions import Schedule

from .calibration import Learned, learn
from .calls import (
    absent_components,
    call_parameters,
    check_batch,
    check_names,
    folder_defaults,
    refuse_unfit,
    to_images,
)
from .driver import PipelineDriver
from .loop import StepFn
from .schedulers import level_at, to_supported_scheduler
from .stepping import UnsupportedPipeline

__all__ = ["Generator", "UnsupportedPipeline", "to_supported_scheduler"]

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
        check_names(call_kwargs, call_parameters(pipeline))
        settings = {"num_inference_steps": num_steps, **call_kwargs}
        if guidance_scale is not None:
            check_names({"guidance_scale"}, call_parameters(pipeline))
            settings["guidance_scale"] = guidance_scale
        self.pipeline, self.num_steps, self.guidance_scale = pipeline, num_steps, guidance_scale
        self.call_kwargs, self.calibrate = call_kwargs, calibrate
        self._driver = PipelineDriver(pipeline, settings, seed_device)
        self._learned: dict[frozenset[str], Learned] = {}

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
        """A Generator over a model folder or hub id, from safetensors files only; `dtype` None means float32.

        The folder may hold `visalign.json`, with defaults: {"num_steps": 10, "guidance_scale": 1.0,
        "call_kwargs": {"height": 64}}. Arguments given here win.

        Raises:
            ValueError: no such folder, a folder without `model_index.json`, or an unreadable `visalign.json`.
        """
        defaults = folder_defaults(id_or_folder)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*torch_dtype.*", FutureWarning)  # the name that 0.38 knows, too
            pipeline = DiffusionPipeline.from_pretrained(
                str(id_or_folder),
                torch_dtype=dtype or torch.float32,
                use_safetensors=True,
                **absent_components(id_or_folder),
            )
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
        return self._driver.modules(list(names) or list(_USUAL_DENOISERS))

    @property
    def denoiser(self) -> nn.Module:
        """The main one of `denoisers`: the transformer or U-Net."""
        denoisers = self.denoisers
        if not denoisers:
            name = type(self.pipeline).__name__
            raise UnsupportedPipeline(
                f"pipeline: got {name} without a module named so, expected one of {_USUAL_DENOISERS}"
            )
        return next((denoisers[name] for name in _USUAL_DENOISERS if name in denoisers), next(iter(denoisers.values())))

    @property
    def schedule(self) -> Schedule:
        """The noise levels of the latest call, after the pipeline's own `set_timesteps`; runs a first use if none."""
        if self._driver.schedule is None:
            self.noise(["a photo"], [0])
        assert self._driver.schedule is not None
        return self._driver.schedule

    def arguments(self, prompts: Sequence[str], seeds: Sequence[int], **inputs: Any) -> dict[str, Any]:
        """The keyword arguments with which the pipeline is called; also right for a stock call of `pipeline`."""
        return self._driver.arguments(prompts, seeds, inputs)

    # What it does ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def noise(self, prompts: Sequence[str], seeds: Sequence[int], **inputs: Any) -> Tensor:
        """The loop's first latents, (N, ...) float32, drawn sample by sample from `seeds`."""
        learned = self._learn(prompts, seeds, inputs)
        seen: list[Tensor] = []

        def step_fn(_step_index: int, latents: Tensor, _prediction: Tensor) -> None:
            seen.append(latents)

        options: dict[str, Any] = dict(denoisers=learned.denoisers, steps={learned.first}, leave=True, stub_all=True)
        self._driver.run(prompts, seeds, inputs, step_fn, **options)
        return seen[0]

    def predict(
        self,
        latents: Tensor,
        step_index: int,
        prompts: Sequence[str],
        seeds: Sequence[int] | None = None,
        *,
        timestep: float | None = None,
        **inputs: Any,
    ) -> Tensor:
        """The guided prediction at `latents` (N, ...) and a step, (N, ...) float32, with gradient if grad is enabled.

        `seeds` matter only where the pipeline draws more than the initial noise (condition encoders that sample).
        With a `timestep` the network is told that one instead of the step's own; `level_at` says its noise level.
        """
        seen: list[Tensor] = []

        def step_fn(_step_index: int, _latents: Tensor, prediction: Tensor) -> None:
            seen.append(prediction)

        times = None if timestep is None else {step_index: timestep}
        self.denoise(prompts, _or_zeros(seeds, prompts), step_fn, latents={step_index: latents}, times=times, **inputs)
        return seen[0]

    def level_at(self, timestep: float) -> float:
        """The noise level of any timestep, as `Schedule.levels` has those of its steps: sigma, or cumulative alpha."""
        return level_at(self._driver.scheduler, timestep)

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
        times: Mapping[int, float] | None = None,
        **inputs: Any,
    ) -> Any:
        """One pipeline call whose steps start .. stop-1 are `step_fn(step_index, latents, prediction) -> next latents`.

        Steps outside are passed at no model cost. Latents and prediction come in float32.

        Args:
            latents: the state to enter step `start` with, (N, ...); None: the noise of `seeds`. A mapping from step
                to state is teacher forcing: exactly these steps run, each on its own state, and `step_fn` may return
                None wherever its result is not needed.
            decode: also decode the final latents.
            grad_steps: the steps whose prediction has a gradient, if grad is enabled; None: all that run. At others
                gradients still pass along the latents. Backward may be called inside `step_fn`; what it returns should
                then be detached, or the next step extends the freed graph.
            times: timesteps that the network is told at these steps, in place of their own.
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
        if not steps and not decode:
            return states[start] if states else self.noise(prompts, seeds, **inputs)
        options: dict[str, Any] = dict(denoisers=learned.denoisers, feed=learned.feed, grad_steps=grad_steps)
        options["times"] = times or {}
        run, media = self._driver.run(
            prompts, seeds, inputs, step_fn, steps=steps, states=states, leave=not decode, **options
        )
        return (run.latents, to_images(media)) if decode else run.latents

    def decode(
        self, latents: Tensor, prompts: Sequence[str], seeds: Sequence[int] | None = None, **inputs: Any
    ) -> Tensor:
        """Images (N, 3, H, W) or videos (N, F, 3, H, W) of final latents, float32 in [0, 1], differentiable."""
        seeds = _or_zeros(seeds, prompts)
        end = self._learn(prompts, seeds, inputs).last + 1
        return self.denoise(prompts, seeds, _never, latents=latents, start=end, decode=True, **inputs)[1]

    def first_step(self, prompts: Sequence[str], seeds: Sequence[int], **inputs: Any) -> int:
        """The loop's first step with inputs of these names: 0, or more for image-to-image."""
        return self._learn(prompts, seeds, inputs).first

    # Prompts, and the end --------------------------------------------------------------------------------------------

    def clear_prompts(self) -> None:
        """Forget all prompt embeddings; needed after a change of the text encoders' weights."""
        if self._driver.memo is not None:
            self._driver.memo.clear()

    def encode_anew(self) -> None:
        """From now on encode prompts anew in every call, with gradient where it is enabled: to train text encoders.

        The gradient then reaches the encoders through the denoiser's predictions. Backward frees the graph that the
        steps of a call share: call it once a call, or make a call for each step.
        """
        self._driver.encode_anew()

    def release_text_encoders(self) -> None:
        """Take the text encoders out of the pipeline, to the CPU; only prompts encoded before can then be used."""
        self._driver.release_text_encoders()

    def close(self) -> None:
        """Give the pipeline its own scheduler, text encoders and `encode_prompt` back."""
        self._driver.close()

    def __enter__(self) -> "Generator":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def _learn(self, prompts: Sequence[str], seeds: Sequence[int], inputs: dict[str, Any]) -> Learned:
        """What the first call with inputs of these names tells of the pipeline."""
        key = frozenset(inputs)
        if key not in self._learned:
            check_batch(prompts, seeds)
            count = len(prompts) if inputs else 1  # inputs may be one per prompt
            call = (list(prompts)[:count], list(seeds)[:count], inputs)
            self._learned[key] = learn(self._driver, call, compare=self.calibrate)
        return self._learned[key]


def _never(step_index: int, latents: Tensor, prediction: Tensor) -> Tensor:
    raise AssertionError(f"step {step_index} ran in a call that runs none")


def _or_zeros(seeds: Sequence[int] | None, prompts: Sequence[str]) -> Sequence[int]:
    return [0] * len(prompts) if seeds is None else seeds
