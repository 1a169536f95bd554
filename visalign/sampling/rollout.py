"""Sampling with a record: the states, actions and log-probabilities that a policy gradient needs.

The record is kept in the latents' own type (float32). Rollouts that branch are in `visalign.sampling.branching`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from visalign.transitions import Gaussian, Schedule, Transition, ode_of, velocity_to_denoised
from visalign.transitions.flow import dpm_solver_2m, flow_ode

from .seeds import step_noise

Solver = Literal["ode", "dpm2m"]


class Denoiser(Protocol):
    """What a rollout needs of a `visalign.pipeline.generator.Generator`."""

    @property
    def schedule(self) -> Schedule:
        """The schedule of the call in progress, or of the latest."""
        ...

    def denoise(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        step_fn: Callable[[int, Tensor, Tensor], Tensor],
        *,
        latents: Tensor | None = None,
        start: int | None = None,
        stop: int | None = None,
        decode: bool = False,
        **inputs: Any,
    ) -> Any:
        """One pipeline call; returns the final latents, or (latents, images) if `decode`."""
        ...

    def decode(self, latents: Tensor, prompts: Sequence[str], seeds: Sequence[int] | None = None, **inputs: Any) -> Any:
        """Images (N, 3, H, W) in [0, 1]."""
        ...


@dataclass
class Trajectory:
    """N samples, with the stochastic steps recorded. Dictionaries are keyed by step index; nothing carries gradient.

    Attributes:
        prompts, seeds: N of each; seeds are those of the initial noise.
        schedule: of the rollout; look levels up by step index.
        steps: the stochastic, recorded steps, ascending: the keys of the dictionaries below.
        latents: {step: (N, ...)}, the state x_i the step was taken from.
        next_latents: {step: (N, ...)}, the action: exactly the value the sampler went on with.
        log_probs: {step: (N,)}, of next_latents, mean over latent dimensions.
        means: {step: (N, ...)}, of the Gaussian (GRPO-Guard needs them); empty unless asked for.
        stds: {step: number}, of the Gaussian.
        denoised: {step: (N, ...)}, the estimate of x0 at every visited step, of the same forward; empty unless asked
            for.
        final: (N, ...), the final latents.
        images: (N, 3, H, W), float32 in [0, 1]; (N, F, 3, H, W) for video; None if not decoded.
        fresh: the weights are still those that sampled; see `old_log_probs`.
        gaps: how far log-probabilities of the same weights were from those recorded, as they were recorded anew.
        whole: what this is a minibatch of, at the places `rows`.
    """

    prompts: list[str]
    seeds: list[int]
    schedule: Schedule
    steps: list[int]
    final: Tensor
    latents: dict[int, Tensor] = field(default_factory=dict)
    next_latents: dict[int, Tensor] = field(default_factory=dict)
    log_probs: dict[int, Tensor] = field(default_factory=dict)
    means: dict[int, Tensor] = field(default_factory=dict)
    stds: dict[int, float] = field(default_factory=dict)
    denoised: dict[int, Tensor] = field(default_factory=dict)
    images: Tensor | None = None
    fresh: bool = False
    gaps: list[Tensor] = field(default_factory=list, repr=False)
    whole: "Trajectory | None" = field(default=None, repr=False)
    rows: Tensor | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, indices: Sequence[int]) -> "Trajectory":
        """The samples at these places, in this order: a minibatch."""
        rows = torch.as_tensor(list(indices), dtype=torch.int64, device=self.final.device)

        def rows_of(record: dict[int, Tensor]) -> dict[int, Tensor]:
            return {step: values[rows] for step, values in record.items()}

        return replace(
            self,
            prompts=[self.prompts[i] for i in indices],
            seeds=[self.seeds[i] for i in indices],
            final=self.final[rows],
            images=None if self.images is None else self.images[rows.to(self.images.device)],
            latents=rows_of(self.latents),
            next_latents=rows_of(self.next_latents),
            log_probs=rows_of(self.log_probs),
            means=rows_of(self.means),
            denoised=rows_of(self.denoised),
            whole=self,
            rows=rows,
        )


def rollout(
    generator: Denoiser,
    prompts: Sequence[str],
    seeds: Sequence[int],
    transition: Transition,
    *,
    sde_steps: Sequence[int] | None = None,
    noise_seeds: Sequence[int] | None = None,
    solver: Solver = "ode",
    post_steps: int | None = None,
    store_means: bool = False,
    store_denoised: bool = False,
    decode: bool = True,
    grad_mode: bool = False,
    **inputs: Any,
) -> Trajectory:
    """Sample N images, stochastic at `sde_steps` and deterministic elsewhere, in one pipeline call.

    Deterministic steps draw nothing. A stochastic step's noise depends on the sample's noise seed and the step index
    alone, never on the batch or on which other steps are stochastic.

    Args:
        prompts, seeds: N of each; seeds give the initial noise.
        transition: of the stochastic steps.
        sde_steps: the stochastic steps; None: all where the transition has a std above 0.
        noise_seeds: N, for the noise of the steps; None: `seeds`. Groups that share an initial noise need their own.
        solver: of the deterministic steps after the last stochastic one: "ode" (first order), or "dpm2m"
            (DPM-Solver++(2M), flows only). Those before are always "ode".
        post_steps: take only this many of the steps after the last stochastic one, evenly spread over the schedule's
            own levels (MixGRPO-Flash, flows only, needs sde_steps). Costs one pipeline call each but no model call for
            those left out.
        store_means: record the means too.
        store_denoised: record the estimates of x0 too: one-step projections at no further model call.
        decode: also decode the images.
        grad_mode: run with gradients enabled and throw them away, for models whose compiled graph differs otherwise;
            images are then decoded in a call of their own, without.
        inputs: arguments of the pipeline for this call.

    Raises:
        ValueError: wrong lengths; a step outside the schedule, or with std 0; an option that does not apply.
    """
    prompts, seeds = list(prompts), list(seeds)
    noise_seeds = seeds if noise_seeds is None else list(noise_seeds)
    for name, values in (("seeds", seeds), ("noise_seeds", noise_seeds)):
        if len(values) != len(prompts):
            raise ValueError(f"{name}: got {len(values)}, expected {len(prompts)}, one per prompt")
    if solver not in ("ode", "dpm2m"):
        raise ValueError(f"solver: got {solver!r}, expected 'ode' or 'dpm2m'")
    stepper = _Stepper(generator, transition, noise_seeds, sde_steps, solver, store_means, store_denoised)
    decode_within = decode and not grad_mode
    images = None
    with torch.set_grad_enabled(grad_mode):
        if post_steps is None:
            out = generator.denoise(prompts, seeds, stepper, decode=decode_within, **inputs)
        else:
            if not sde_steps:
                raise ValueError(f"sde_steps: got {sde_steps}, expected at least one step, with post_steps")
            stop = max(sde_steps) + 1
            out = generator.denoise(prompts, seeds, stepper, stop=stop, **inputs)
            visited = stepper.plan_post(stop, post_steps)
            for i in visited:
                last = decode_within and i == visited[-1]
                out = generator.denoise(
                    prompts, seeds, stepper, latents=out, start=i, stop=i + 1, decode=last, **inputs
                )
    final = out
    if decode_within:
        final, images = out
    elif decode:
        with torch.no_grad():
            images = generator.decode(final, prompts, seeds, **inputs)
    return stepper.trajectory(prompts, seeds, final, images)


def recompute(
    trajectory: Trajectory, step: int, prediction: Tensor, transition: Transition, schedule: Schedule | None = None
) -> Gaussian:
    """The Gaussian of a recorded step under a new prediction at its recorded state; with the prediction's gradient.

    Args:
        prediction: (N, ...), at trajectory.latents[step], by the same call as at rollout (guidance, embeddings, dtype).
        transition: the one of the rollout.
        schedule: None: the rollout's.
    """
    if step not in trajectory.latents:
        raise ValueError(f"step: got {step}, expected one of the recorded steps {trajectory.steps}")
    schedule = trajectory.schedule if schedule is None else schedule
    return transition(schedule, step, trajectory.latents[step], prediction)[0]


def step_log_prob(
    trajectory: Trajectory, step: int, prediction: Tensor, transition: Transition, schedule: Schedule | None = None
) -> Tensor:
    """The mean-reduced log-probability (N,) of the recorded action; equal to log_probs[step] for the same weights."""
    return recompute(trajectory, step, prediction, transition, schedule).log_prob(trajectory.next_latents[step])


def old_log_probs(trajectory: Trajectory, step: int, log_prob: Tensor, mean: Tensor) -> Tensor:
    """What the log-probability (N,) of this pass is compared with: that of the policy that sampled, (N,).

    In bf16 a row's prediction depends on the other rows of its batch, by far more than a clip range of 1e-4 bears. So
    while the weights are those that sampled (`fresh`), the pass is compared with itself: a ratio of exactly 1. It is
    recorded, and so is its `mean` where means are, for later passes over the same batch.
    """
    if not trajectory.fresh:
        return trajectory.log_probs[step]
    whole, rows = trajectory.whole or trajectory, slice(None) if trajectory.rows is None else trajectory.rows
    log_prob, mean = log_prob.detach(), mean.detach()
    whole.gaps.append((log_prob - whole.log_probs[step][rows]).abs().max())
    for record, values in ((whole.log_probs, log_prob), (whole.means, mean)):
        if step in record:
            record[step][rows] = values
    if step in trajectory.means:
        trajectory.means[step] = mean
    trajectory.log_probs[step] = log_prob
    return log_prob


class _Stepper:
    """The step function of one rollout. The schedule is known only once the pipeline has begun its loop."""

    def __init__(
        self,
        generator: Denoiser,
        transition: Transition,
        noise_seeds: list[int],
        sde_steps: Sequence[int] | None,
        solver: Solver,
        store_means: bool,
        store_denoised: bool = False,
    ):
        self.generator, self.transition, self.noise_seeds = generator, transition, noise_seeds
        self.sde_steps, self.solver, self.store_means = sde_steps, solver, store_means
        self.store_denoised = store_denoised
        self.schedule: Schedule | None = None
        self.ode: Transition | None = None
        self.stochastic: dict[int, float] = {}  # step: std
        self.next_level: dict[int, int] = {}  # where a step leads, if not to the next level
        self.previous: tuple[float, Tensor] | None = None  # of the second-order solver: sigma and denoised of this step
        self.earlier: tuple[float, Tensor] | None = None  # and of the step before
        self.record: dict[str, Any] = {
            name: {} for name in ("latents", "next_latents", "log_probs", "means", "denoised")
        }

    def plan(self) -> Schedule:
        schedule = self.generator.schedule
        stds = {i: self.transition.std(schedule, i) for i in range(schedule.num_steps)}
        chosen = [i for i in stds if stds[i] > 0] if self.sde_steps is None else sorted(set(self.sde_steps))
        for i in chosen:
            if i not in stds:
                raise ValueError(f"sde_steps: got {i}, expected within 0 .. {schedule.num_steps - 1}")
            if stds[i] == 0:
                raise ValueError(f"sde_steps: got step {i}, where {self.transition!r} has std 0, expected std > 0")
        if self.solver != "ode" and schedule.kind != "flow":
            raise ValueError(f"solver: got {self.solver!r} on a {schedule.kind} schedule, expected 'ode'")
        self.schedule, self.ode = schedule, ode_of(schedule)
        self.stochastic = {i: stds[i] for i in chosen}
        return schedule

    def plan_post(self, stop: int, count: int) -> list[int]:
        assert self.schedule is not None
        left = list(range(stop, self.schedule.num_steps))
        if self.schedule.kind != "flow":
            raise ValueError(f"post_steps: got {count} on a {self.schedule.kind} schedule, expected None")
        if not 1 <= count <= len(left):
            raise ValueError(f"post_steps: got {count}, expected 1 .. {len(left)}, the steps after the window")
        visited = [left[k * len(left) // count] for k in range(count)]
        self.next_level = dict(zip(visited, visited[1:] + [self.schedule.num_steps]))
        return visited

    def __call__(self, step_index: int, latents: Tensor, prediction: Tensor) -> Tensor:
        schedule = self.schedule or self.plan()
        latents, prediction = latents.detach(), prediction.detach()
        if self.store_denoised:
            assert self.ode is not None
            self.record["denoised"][step_index] = self.ode(schedule, step_index, latents, prediction)[1]
        if self.solver == "dpm2m":  # the window's estimates serve the first step after it
            sigma, before = schedule.levels[step_index], self.previous
            self.previous = sigma, velocity_to_denoised(latents, prediction, sigma)
            self.earlier = before
        if step_index in self.stochastic:
            return self._sample(schedule, step_index, latents, prediction)
        if schedule.kind == "flow" and step_index > max(self.stochastic, default=-1):
            return self._solve(schedule, step_index, latents, prediction)
        assert self.ode is not None
        return self.ode(schedule, step_index, latents, prediction)[0].mean

    def _sample(self, schedule: Schedule, step_index: int, latents: Tensor, prediction: Tensor) -> Tensor:
        gaussian, _ = self.transition(schedule, step_index, latents, prediction)
        next_latents = gaussian.sample(step_noise(self.noise_seeds, step_index, gaussian.mean))
        self.record["latents"][step_index] = latents
        self.record["next_latents"][step_index] = next_latents
        self.record["log_probs"][step_index] = gaussian.log_prob(next_latents)
        if self.store_means:
            self.record["means"][step_index] = gaussian.mean
        return next_latents

    def _solve(self, schedule: Schedule, step_index: int, latents: Tensor, prediction: Tensor) -> Tensor:
        sigma = schedule.levels[step_index]
        sigma_next = schedule.levels[self.next_level.get(step_index, step_index + 1)]
        if self.solver == "ode":
            return flow_ode(latents, prediction, sigma, sigma_next).mean
        assert self.previous is not None
        denoised, (sigma_prev, previous) = self.previous[1], self.earlier or (None, None)
        return dpm_solver_2m(latents, denoised, previous, sigma_prev, sigma, sigma_next)

    def trajectory(self, prompts: list[str], seeds: list[int], final: Tensor, images: Tensor | None) -> Trajectory:
        assert self.schedule is not None
        steps = sorted(self.record["latents"])
        if missed := sorted(set(self.sde_steps or ()) - set(steps)):
            raise ValueError(f"sde_steps: got {missed}, which this pipeline's loop does not visit, expected others")
        stds = {step: self.stochastic[step] for step in steps}
        images = None if images is None else images.detach()
        return Trajectory(prompts, seeds, self.schedule, steps, final.detach(), **self.record, stds=stds, images=images)
