"""Losses of policy gradients over denoising steps: PPO's clipped surrogate, its ratios, and the KL to a reference."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from visalign.names import unknown_name
from visalign.transitions.gaussian import Gaussian, at_least_float32, per_sample

KLKind = Literal["gaussian", "flow_grpo", "x", "v"]
StepWeight = Literal["none", "tempflow", "inverse_dt"]
# Of `ppo_stats`, what trainers log
CLIPPED_STATS = ("ratio_mean", "approx_kl", "clip_fraction", "clip_fraction_positive", "clip_fraction_negative")


def clipped_surrogate(
    log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, clip_range: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's loss (Schulman et al. 2017, arXiv:1707.06347, eq. 7) of one step, per sample.

    Args:
        log_prob, old_log_prob: (N,), same reduction (mean over latent dimensions for the published clip ranges).
        advantages: (N,), clipped already.
        clip_range: c of [1 - c, 1 + c]; 1e-4 to 1e-6 with mean-reduced log-probabilities.

    Returns:
        The loss (N,), which vanishes in gradient for A > 0 beyond 1 + c and A < 0 below 1 - c, and `ppo_stats`.
    """
    return clipped_loss(log_prob - old_log_prob.detach(), advantages, clip_range)


def clipped_loss(log_ratio: Tensor, advantages: Tensor, clip_range: float) -> tuple[Tensor, dict[str, Tensor]]:
    """`clipped_surrogate` from a log-ratio (N,), such as that of `ratio_norm_log_ratio`."""
    if log_ratio.shape != advantages.shape or log_ratio.dim() != 1:
        shapes = f"{tuple(log_ratio.shape)}, {tuple(advantages.shape)}"
        raise ValueError(f"log_ratio, advantages: got shapes {shapes}, expected (N,) each")
    if not clip_range > 0:
        raise ValueError(f"clip_range: got {clip_range}, expected > 0")
    advantages = advantages.detach().to(log_ratio.dtype)
    ratio = log_ratio.exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range))
    return loss, ppo_stats(log_ratio, advantages, clip_range)


def ppo_stats(log_ratio: Tensor, advantages: Tensor, clip_range: float) -> dict[str, Tensor]:
    """What to watch during updates, as detached scalars (no device sync).

    ratio_mean, ratio_std; approx_kl = half the mean squared log-ratio; clip_fraction = share of the samples whose
    gradient the clip removes, and its parts with positive and with negative advantage. A ratio_mean that sinks below 1
    with clip_fraction_positive near 0 is the over-optimisation that GRPO-Guard describes.
    """
    log_ratio, advantages = log_ratio.detach(), advantages.detach()
    ratio = log_ratio.exp()
    high = ((advantages > 0) & (ratio > 1 + clip_range)).to(ratio.dtype).mean()
    low = ((advantages < 0) & (ratio < 1 - clip_range)).to(ratio.dtype).mean()
    return {
        "ratio_mean": ratio.mean(),
        "ratio_std": ratio.std(correction=0),
        "approx_kl": 0.5 * (log_ratio**2).mean(),
        "clip_fraction": high + low,
        "clip_fraction_positive": high,
        "clip_fraction_negative": low,
    }


def ratio_norm_log_ratio(
    log_prob: Tensor, old_log_prob: Tensor, mean: Tensor, old_mean: Tensor, std: Tensor | float
) -> Tensor:
    """GRPO-Guard's log-ratio (arXiv:2510.22319): (log p - log p_old + mean_d (mean - old_mean)^2 / (2 std^2)) * std.

    Equal to mean_d(noise * (mean - old_mean)): zero on average whatever the step, where the plain one sinks below 0 as
    1/std^2. Its gradient at the old weights is std times the plain one's. GRPO-Guard also divides the step's loss by
    sigma - sigma_next: `step_weights`.

    Args:
        log_prob, old_log_prob: (N,), mean-reduced.
        mean, old_mean: (N, ...), of the policy now and of the one that sampled (stored at rollout).
        std: of the step, > 0: a number, or one per sample with N elements.
    """
    if mean.shape != old_mean.shape:
        raise ValueError(f"old_mean: got shape {tuple(old_mean.shape)}, expected {tuple(mean.shape)}, as mean")
    if isinstance(std, Tensor):
        if std.numel() != mean.shape[0]:
            raise ValueError(f"std: got shape {tuple(std.shape)}, expected {mean.shape[0]} elements, one per sample")
        std = at_least_float32(std).flatten()
    elif not std > 0:
        raise ValueError(f"std: got {std}, expected > 0")
    shift = at_least_float32(mean) - at_least_float32(old_mean).detach()
    bias = per_sample(shift**2, "mean") / (2 * std**2)
    return (log_prob - old_log_prob.detach() + bias) * std


def kl_penalty(
    kind: KLKind,
    policy: Gaussian,
    reference: Gaussian,
    *,
    dt: float | None = None,
    prediction: Tensor | None = None,
    ref_prediction: Tensor | None = None,
) -> Tensor:
    """Divergence of one step from the frozen reference, (N,), a mean over latent dimensions. The gradient is policy's.

    Coefficients do not carry over between kinds: with 10 even steps 0.04 on "flow_grpo" is 0.004 on "gaussian".

    Args:
        kind: "gaussian", the true KL; "flow_grpo", as that code has it: divided by the squared diffusion and so lacking
            the |dt|, i.e. |dt| times the true one; "x", the squared difference of the means; "v", of the predictions.
        policy, reference: of the same transition and step; not used by "v".
        dt: sigma_next - sigma or its size; for "flow_grpo" alone.
        prediction, ref_prediction: (N, ...); for "v" alone.

    Raises:
        ValueError: an argument the kind needs is missing, or one it would ignore is given; a deterministic step with
            "gaussian" or "flow_grpo".
    """
    if kind not in ("gaussian", "flow_grpo", "x", "v"):
        raise unknown_name("kind", kind, ("gaussian", "flow_grpo", "x", "v"))
    if (dt is not None) != (kind == "flow_grpo"):
        raise ValueError(f"dt: got {dt}, expected a number for kind 'flow_grpo' and None otherwise (kind {kind!r})")
    given = [tensor is not None for tensor in (prediction, ref_prediction)]
    if given != [kind == "v"] * 2:
        raise ValueError(f"prediction, ref_prediction: expected both for kind 'v', none otherwise (kind {kind!r})")
    if prediction is not None and ref_prediction is not None:
        return _squared_difference(prediction, ref_prediction)
    if kind == "x":
        return _squared_difference(policy.mean, reference.mean)
    frozen = Gaussian(reference.mean.detach(), reference.std, reference.deterministic)
    return policy.kl(frozen) * (1.0 if dt is None else abs(dt))


def flow_grpo_kl_dt(sampler: str, sigma: float, sigma_next: float) -> float:
    """The `dt` of "flow_grpo" in `kl_penalty`, by the transition's name.

    Flow-GRPO's code divides by the squared "std_dev_t" that its step functions return. For the SDEs that is the
    diffusion, without the step's |dt|; for cps the step's whole spread, so that its KL is the true one: 1.
    """
    return 1.0 if sampler == "cps" else sigma_next - sigma


def tempflow_weights(stds: Sequence[float]) -> list[float]:
    """TempFlow-GRPO's weight of each step's loss (arXiv:2508.04324): std_i / mean_j std_j, of mean 1.

    Args:
        stds: spread of each step's transition (diffusion times sqrt(-dt)), all steps of the schedule; >= 0.
    """
    if len(stds) == 0 or min(stds) < 0 or max(stds) <= 0:
        raise ValueError(f"stds: got {list(stds)}, expected numbers >= 0, not all 0")
    mean = sum(stds) / len(stds)
    return [std / mean for std in stds]


def step_weights(kind: StepWeight, stds: Sequence[float], levels: Sequence[float]) -> list[float]:
    """Weight of each step's loss: 1; `tempflow_weights`; or for "inverse_dt" 1 / (sigma - sigma_next), GRPO-Guard's.

    Args:
        stds: as of `tempflow_weights`, T of them.
        levels: sigmas of the schedule, T + 1, falling.
    """
    if kind not in ("none", "tempflow", "inverse_dt"):
        raise unknown_name("kind", kind, ("none", "tempflow", "inverse_dt"))
    if kind == "tempflow":
        return tempflow_weights(stds)
    return [1 / (a - b) if kind == "inverse_dt" else 1.0 for a, b in zip(levels, levels[1:])]


def _squared_difference(values: Tensor, reference: Tensor) -> Tensor:
    if values.shape != reference.shape:
        raise ValueError(f"reference: got shape {tuple(reference.shape)}, expected {tuple(values.shape)}")
    return per_sample((at_least_float32(values) - at_least_float32(reference).detach()) ** 2, "mean")
