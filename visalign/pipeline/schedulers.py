"""Diffusers schedulers as visalign knows them: which are driven, what others become, and their noise levels."""

from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from visalign.transitions.schedule import Schedule

from .stepping import UnsupportedPipeline

_DDIM = ("DDIMScheduler", "CogVideoXDDIMScheduler")
_DDIM_OPTIONS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "steps_offset",
    "prediction_type",
    "set_alpha_to_one",
    "rescale_betas_zero_snr",
)


def to_supported_scheduler(scheduler: Any) -> Any:
    """A scheduler whose step is plain Euler (flows), DDIM (diffusion) or LCM (consistency), for the same model.

    - `FlowMatchEulerDiscreteScheduler`, DDIM without clipping and `LCMScheduler` are returned as they are.
    - Flow schedulers of other orders (DPM-Solver++, UniPC, Heun with flow sigmas; as in Sana, Wan) become
      `FlowMatchEulerDiscreteScheduler` with the same shift.
    - Schedulers over betas (Euler, PNDM, DDPM, DPM-Solver, UniPC, ...; as in SDXL, PixArt) become `DDIMScheduler`
      over the same betas, without clipping: their sigma-space latents (x = x0 + sigma * noise) have no unit variance.
      The timestep spacing "leading" is kept; any other becomes "trailing", which visits the noisiest step too, and
      whose steps DDIM can take (its own "linspace" steps land beside the timesteps).

    Raises:
        UnsupportedPipeline: neither betas nor flow sigmas (EDM, TrigFlow, ...).
    """
    config, name = scheduler.config, type(scheduler).__name__
    if name == "FlowMatchEulerDiscreteScheduler":
        if not config.get("stochastic_sampling"):
            return scheduler
        return FlowMatchEulerDiscreteScheduler.from_config(config, stochastic_sampling=False)
    if name == "LCMScheduler":
        return scheduler
    if _is_flow(scheduler):
        return FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=config.get("num_train_timesteps", 1000),
            shift=config.get("flow_shift", config.get("shift", 1.0)) or 1.0,
            use_dynamic_shifting=bool(config.get("use_dynamic_shifting", False)),
        )
    if name in _DDIM and not (config.get("clip_sample") or config.get("thresholding")) and _keeps_spacing(config):
        return scheduler
    if not hasattr(scheduler, "alphas_cumprod") or "EDM" in name:
        raise UnsupportedPipeline(
            f"scheduler: got {name}, expected one over betas (DDIM, Euler, DPM-Solver, ...), with flow sigmas, or LCM"
        )
    options = {key: config[key] for key in _DDIM_OPTIONS if config.get(key) is not None}
    spacing = "leading" if config.get("timestep_spacing", "leading") == "leading" else "trailing"
    return DDIMScheduler(**options, timestep_spacing=spacing, clip_sample=False, thresholding=False)


def _is_flow(scheduler: Any) -> bool:
    config = scheduler.config
    return (
        "FlowMatch" in type(scheduler).__name__
        or bool(config.get("use_flow_sigmas"))
        or config.get("prediction_type") == "flow_prediction"
    )


def _keeps_spacing(config: Any) -> bool:
    return config.get("timestep_spacing", "leading") != "linspace"


def schedule_of(scheduler: Any) -> Schedule:
    """The noise levels of a supported scheduler, after its `set_timesteps`.

    A diffusion schedule ends at the scheduler's own last level (1 under `set_alpha_to_one`).
    """
    timesteps = scheduler.timesteps.detach()
    if "FlowMatch" in type(scheduler).__name__:
        sigmas = scheduler.sigmas.detach().to("cpu", torch.float32).clone()
        if 0 < 1 - sigmas[0].item() < 1e-6:
            sigmas[0] = 1.0  # a shifted 1, rounded
        return Schedule("flow", timesteps, sigmas=sigmas)
    alphas_cumprod = scheduler.alphas_cumprod.detach().cpu()
    last = torch.as_tensor(scheduler.final_alpha_cumprod, dtype=alphas_cumprod.dtype).reshape(1).cpu()
    levels = torch.cat([alphas_cumprod[timesteps.long().cpu()], last]).float()
    prediction_type = scheduler.config.get("prediction_type", "epsilon")
    if type(scheduler).__name__ != "LCMScheduler":
        return Schedule("diffusion", timesteps, alphas_cumprod=levels, prediction_type=prediction_type)
    return Schedule(
        "consistency",
        timesteps,
        alphas_cumprod=levels,
        prediction_type=prediction_type,
        timestep_scaling=float(scheduler.config.timestep_scaling),
        sigma_data=float(getattr(scheduler, "sigma_data", 0.5)),  # set by its first step
    )


def level_at(scheduler: Any, timestep: float) -> float:
    """The noise level of a timestep of a supported scheduler: sigma of a flow, cumulative alpha of the others.

    Raises:
        ValueError: a timestep outside the training's, or a fraction where they are whole numbers.
    """
    count = scheduler.config.num_train_timesteps
    if "FlowMatch" in type(scheduler).__name__:
        if not 0 <= timestep <= count:
            raise ValueError(f"timestep: got {timestep}, expected within [0, {count}]")
        return timestep / count
    if timestep != int(timestep) or not 0 <= timestep < count:
        raise ValueError(f"timestep: got {timestep}, expected a whole number within 0 .. {count - 1}")
    return float(scheduler.alphas_cumprod[int(timestep)])
