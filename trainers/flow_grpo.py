"""GRPO for flow-matching models: Flow-GRPO and its relatives, as flags of one loop.

    accelerate launch trainers/flow_grpo.py                                       # the shipped shapes world
    accelerate launch trainers/flow_grpo.py --config trainers/recipes/flow_grpo.yaml --reward my_reward.py:score

Flow-GRPO (arXiv:2505.05470), Flow-GRPO-Fast and MixGRPO windows (2507.21802), DanceGRPO (2505.07818), CPS (2509.05952),
GRPO-Guard (2510.22319), TempFlow's step weights (2508.04324). Departures: advantages are divided by max(std, 1e-4)
rather than std + 1e-4; the KL is the true one unless `--kl_type flow_grpo`; the noise of a sample depends on its seed
and step alone, so results do not depend on the number of processes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from visalign.advantages.group import clip_advantages, group_advantages
from visalign.advantages.own import check_advantages, own_advantages
from visalign.data.prompts import Group
from visalign.objectives.policy_gradient import (
    CLIPPED_STATS,
    StepWeight,
    clipped_loss,
    flow_grpo_kl_dt,
    kl_penalty,
    ratio_norm_log_ratio,
    step_weights,
)
from visalign.sampling.rollout import Solver, Trajectory, old_log_probs, recompute, rollout
from visalign.sampling.seeds import derived_seed
from visalign.sampling.windows import flash_post_steps, make_window, trained_steps
from visalign.training.before import options
from visalign.training.loop.batches import Batch, GatheredScores, cut
from visalign.training.loop.learning import Updates, add_gradients, rows_with_signal
from visalign.training.loop.trainer import Trainer, launch, train
from visalign.training.loop.training_loop import Iteration, TrainingLoop, images_of
from visalign.transitions import check_transition, make_transition


@dataclass(frozen=True)
class Config(options.CommonConfig):
    """Options of the trainer; those of every trainer are in `visalign.training.before.options.CommonConfig`."""

    # Sampling
    num_steps: int = 10  # denoising steps of a training image
    sampler: str = "flow_sde"  # flow_sde, dance_sde, cps, or a transition of your own: file.py:Class, called with eta
    eta: float = 0.7  # noise strength: 0.7 for flow_sde, 0.3 for dance_sde, 0.8 for cps
    window: Literal["all", "early", "random", "mix_random", "progressive", "decay", "exp_decay"] = "early"
    window_size: int | None = None  # stochastic steps; None: 2 for early; all takes none, the others need it
    window_span: tuple[int, int] | None = None  # for random: first and last + 1 step it may hold
    window_iterations: int | None = None  # for progressive and decays: iterations at each position
    solver: Solver | None = None  # of the steps after the window; None: dpm2m for early, else ode
    post_ratio: float | None = None  # MixGRPO-Flash: see `flash_post_steps`; None: 0.5 for early, else all steps
    timestep_fraction: float | None = None  # share of the stochastic steps trained; None: 0.99 for all, else 1
    timestep_choice: Literal["first", "random"] = "first"  # which ones
    prompts_per_step: int = 16  # groups an iteration
    group_size: int = 8  # images a prompt
    same_latents: bool = False  # one initial noise for a whole group
    # Objective
    advantages: str = "group"  # or your own function of (rewards, group_ids): file.py:function
    advantage_std: Literal["group", "global"] | None = None  # None: global; of the advantages by group
    max_advantage: float = 5.0
    clip_range: float = 1e-4  # on the ratio of mean-reduced likelihoods
    ratio: Literal["plain", "unscaled", "guard"] = "plain"  # unscaled: without 1/(2 std^2), as CPS's code
    step_weight: StepWeight = "none"
    kl_weight: float = 0.0
    kl_type: Literal["gaussian", "flow_grpo", "x", "v"] = "gaussian"
    inner_epochs: int = 1  # passes over the samples of an iteration
    updates_per_step: int = 1  # optimiser updates a pass; the groups are shared among them
    skip_zero_advantages: bool = True  # no forward for samples without signal, where kl_weight is 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_transition("sampler", self.sampler, ("flow_sde", "dance_sde", "cps"))
        check_advantages(self.advantages, self.advantage_std)
        if self.group_size < 2:
            raise ValueError(f"group_size: got {self.group_size}, expected >= 2 (one image has no baseline)")
        if not self.eta > 0:
            raise ValueError(f"eta: got {self.eta}, expected > 0 (no noise leaves no log-probability to learn from)")
        if self.prompts_per_step < 1 or self.prompts_per_step % self.updates_per_step:
            raise ValueError(
                f"prompts_per_step: got {self.prompts_per_step}, expected a multiple of updates_per_step "
                f"({self.updates_per_step})"
            )
        for name in ("clip_range", "max_advantage", "inner_epochs", "updates_per_step"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected > 0")
        if self.kl_weight < 0:
            raise ValueError(f"kl_weight: got {self.kl_weight}, expected >= 0")
        if self.sampler == "cps" and self.eta > 1:
            raise ValueError(f"eta: got {self.eta}, expected within (0, 1] for cps, a share of the noise")
        self._check_window()

    def _check_window(self) -> None:
        steps = self.make_window()(0)
        share = self.share_trained
        if not 0 < share <= 1 or len(steps) > 1 and int(share * len(steps)) < 1:
            raise ValueError(
                f"timestep_fraction: got {self.timestep_fraction} of {len(steps)} steps, expected within (0, 1] and at "
                "least one step"
            )
        low, high = self.window_span or (0, self.num_steps - 1)
        to_end = self.window == "all" or self.window == "random" and high == self.num_steps
        if to_end and self.window_size == 1 and self.sampler == "cps":
            raise ValueError(
                f"window_span: got {(low, high)}, expected one that ends before the last step (cps: no noise)"
            )
        if self.post_ratio is not None and (to_end or not 0 < self.post_ratio <= 1):
            raise ValueError(
                f"post_ratio: got {self.post_ratio} with window {self.window!r}, expected within (0, 1] and a window "
                "that leaves steps after it"
            )
        if self.solver not in (None, "ode") and self.window == "all":
            raise ValueError(f"solver: got {self.solver!r} with window 'all', which leaves it no steps, expected 'ode'")

    @property
    def share_trained(self) -> float:
        """Of the stochastic steps. All steps without the last: its std is tiny and its gradient huge."""
        if self.timestep_fraction is None:
            return 0.99 if self.window == "all" else 1.0
        return self.timestep_fraction

    @property
    def solver_after(self) -> Solver:
        """Of the steps after the window."""
        return self.solver or ("dpm2m" if self.window == "early" else "ode")

    @property
    def ratio_after(self) -> float | None:
        """Of `flash_post_steps`; None: all steps after the window."""
        return 0.5 if self.window == "early" and self.post_ratio is None else self.post_ratio

    def make_window(self):
        """The window of stochastic steps; options given for another kind of window are errors."""
        span = {} if self.window_span is None else {"span": self.window_span}
        dwell = {} if self.window_iterations is None else {"iterations": self.window_iterations}
        seed = {"seed": self.seed} if self.window in ("random", "mix_random") else {}
        return make_window(self.window, self.num_steps, self.window_size, **span, **dwell, **seed)


class FlowGRPO(Trainer):
    """Sampling, comparing within groups, updating by the clipped surrogate."""

    name, config, kinds = "flow_grpo", Config, ("flow",)

    def __init__(self, loop: TrainingLoop) -> None:
        super().__init__(loop)
        cfg = self.cfg
        self.transition = make_transition(cfg.sampler, eta=cfg.eta)
        self.window = cfg.make_window()
        self.stds = [self.transition.std(self.schedule, i) for i in range(cfg.num_steps)]
        self.step_weights = step_weights(cfg.step_weight, self.stds, self.schedule.levels)
        if cfg.advantages != "group" and self.scorer.output_kind == "advantages":
            raise ValueError(f"advantages: got {cfg.advantages!r} with {cfg.reward!r}, which gives advantages itself")
        if self.scorer.is_setwise and loop.accelerator.num_processes > 1:
            raise ValueError(
                f"reward: got {cfg.reward!r}, which scores all samples as one set, on "
                f"{loop.accelerator.num_processes} processes, expected 1"
            )

    def iteration(self, step: int) -> Iteration:
        """Sample and score, in the shares of the updates; then learn from all."""
        cfg, loop = self.cfg, self.loop
        groups, local = loop.groups(step, cfg.group_size, cfg.updates_per_step, cfg.same_latents)
        submitted = [loop.submit(self.sample(step, share)) for share in local]
        scores = loop.collect(submitted)
        advantages = self.advantages(scores)
        shares = scores.assign(submitted, advantages)
        values = scores.values() | {"advantage_abs_mean": advantages.abs().mean().item()} | self.update(step, shares)
        return Iteration(values, images_of(shares), *scores.as_gathered, len(groups) * cfg.group_size)

    def sample(self, step: int, groups: list[Group]) -> Iterator[Batch]:
        """Images of some groups, in micro-batches, with the stochastic steps on record."""
        cfg = self.cfg
        steps = [i for i in self.window(step) if self.stds[i] > 0]
        post = None if cfg.ratio_after is None else flash_post_steps(cfg.num_steps, max(steps), cfg.ratio_after)
        for samples in cut(groups, cfg.batch_size):
            with self.run.stage("rollout"):
                trajectory = rollout(
                    self.generator,
                    samples.prompts,
                    samples.seeds,
                    self.transition,
                    sde_steps=steps,
                    noise_seeds=samples.noise_seeds,
                    solver=cfg.solver_after,
                    post_steps=post,
                    store_means=cfg.ratio == "guard",
                    grad_mode=cfg.compile,
                )
            yield Batch(trajectory, samples.ids)

    def advantages(self, scores: GatheredScores) -> Tensor:
        """Of all samples of the iteration, (M,), from the scores of all processes; 0 where scoring failed."""
        cfg = self.cfg
        if self.scorer.output_kind == "advantages":
            advantages = self.scorer.combine(scores.shaped, scores.group_ids, scores.scored)
        elif cfg.advantages == "group":
            std: Literal["group", "global"] = cfg.advantage_std or "global"
            advantages = group_advantages(scores.total, scores.group_ids, std=std, valid=scores.valid)
        else:
            advantages = own_advantages(cfg.advantages, scores.total, scores.group_ids, scores.valid)
        return clip_advantages(advantages.float(), cfg.max_advantage) * scores.valid

    def steps_to_train(self, step: int, stored: list[int]) -> list[int]:
        """The recorded steps that get a gradient in this iteration."""
        first = trained_steps(stored, self.cfg.share_trained) if len(stored) > 1 else stored
        if self.cfg.timestep_choice == "first":
            return first
        generator = torch.Generator().manual_seed(derived_seed(self.cfg.seed, 5, step))
        chosen = torch.randperm(len(stored), generator=generator)[: len(first)]
        return sorted(stored[i] for i in chosen)

    def backward(self, batch: Batch, steps: list[int], scale: float) -> dict[str, Tensor]:
        """Add the gradient of a micro-batch: one pipeline call, backward in each trained step. Returns sums to log."""
        cfg, trajectory, advantages = self.cfg, batch.trajectory, batch.advantages
        assert advantages is not None
        if cfg.skip_zero_advantages and cfg.kl_weight == 0 and bool((advantages == 0).any()):
            rows = rows_with_signal(trajectory, advantages, cfg.dtype == "fp32")
            if not rows:
                return {}
            trajectory, advantages = trajectory.take(rows), advantages[rows]

        def loss(i: int, prediction: Tensor, others: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            return self.loss(trajectory, i, prediction, advantages, others.get("base"))

        states = {i: trajectory.latents[i] for i in steps}
        references = {"base": self.state.policy.reference} if cfg.kl_weight else {}
        return add_gradients(self.generator, trajectory.prompts, trajectory.seeds, states, loss, scale, references)

    def loss(
        self, trajectory: Trajectory, i: int, prediction: Tensor, advantages: Tensor, reference: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss (N,) of one step and its statistics."""
        cfg, std = self.cfg, self.stds[i]
        gaussian = recompute(trajectory, i, prediction, self.transition)
        log_prob = gaussian.log_prob(trajectory.next_latents[i])
        old = old_log_probs(trajectory, i, log_prob, gaussian.mean)
        if cfg.ratio == "guard":
            log_ratio = ratio_norm_log_ratio(log_prob, old, gaussian.mean, trajectory.means[i], std)
        else:
            log_ratio = (log_prob - old) * (2 * std**2 if cfg.ratio == "unscaled" else 1.0)
        loss, stats = clipped_loss(log_ratio, advantages, cfg.clip_range)
        loss = loss * self.step_weights[i]
        if reference is not None:
            base = recompute(trajectory, i, reference, self.transition)
            kl = kl_penalty(
                cfg.kl_type,
                gaussian,
                base,
                dt=flow_grpo_kl_dt(cfg.sampler, *self.schedule.step(i)) if cfg.kl_type == "flow_grpo" else None,
                prediction=prediction if cfg.kl_type == "v" else None,
                ref_prediction=reference if cfg.kl_type == "v" else None,
            )
            loss = loss + cfg.kl_weight * kl
            stats["kl"] = kl.detach().mean()
        return loss, stats

    def update(self, step: int, shares: list[list[Batch]]) -> dict[str, float]:
        """All optimiser updates of an iteration; returns what to log."""
        cfg, records = self.cfg, [batch.trajectory for share in shares for batch in share]
        updates = Updates(self.state, self.loop.accelerator, step, records)
        total = cfg.prompts_per_step // cfg.updates_per_step * cfg.group_size  # samples an update, on all processes
        for share in shares * cfg.inner_epochs:
            with self.run.stage("train"):
                for batch in share:
                    steps = self.steps_to_train(step, batch.trajectory.steps)
                    updates.add(self.backward(batch, steps, 1 / (total * len(steps))))
                updates.apply()
        return updates.values([*CLIPPED_STATS, *["kl"] * (cfg.kl_weight > 0)])


def main(cfg: Config) -> Path:
    """Train; returns the run folder."""
    return train(FlowGRPO, cfg)


def cli(argv: list[str] | None = None) -> None:
    launch(FlowGRPO, argv)


if __name__ == "__main__":
    cli()
