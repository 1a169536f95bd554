"""VGPO, value-anchored group policy optimisation: a value for each denoising step.

    accelerate launch trainers/vgpo.py                                            # the shipped shapes world
    accelerate launch trainers/vgpo.py --config trainers/recipes/vgpo.yaml --reward my_reward.py:score

VGPO (arXiv:2512.12387) scores what the image would be after each step: the one-step projection of the state (eq. 9).
The estimate comes from the forward that the next step makes anyway, so the extra cost is decoding and scoring. Values
are sums along the trajectory (eq. 10), weights compare a trajectory's steps (eq. 11), advantages compare the group at
each step and add an absolute term (eqs. 12 and 13). The rest is Flow-GRPO (2505.05470).

Reconstructed, for neither code nor the full text could be read: the discount's direction and value, the size of the
absolute term (by default such that it is 0.1 on average) and the order of weight and normalisation; see
`visalign.advantages.process_values`.
Ours: rewards that go below 0 are shifted by their running minimum, weights are clamped to [0, 5], and advantages are
clipped after they are weighted.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from visalign.advantages.group import clip_advantages, group_statistics
from visalign.advantages.process_values import dual_advantages, process_values, shift_rewards, temporal_weights
from visalign.data.prompts import Group
from visalign.objectives.policy_gradient import CLIPPED_STATS, clipped_surrogate, flow_grpo_kl_dt, kl_penalty
from visalign.sampling.rollout import Trajectory, old_log_probs, recompute, rollout
from visalign.sampling.windows import trained_steps
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
    num_steps: int = 10  # denoising steps of a training image, all stochastic; each is decoded and scored
    sampler: str = "flow_sde"  # flow_sde, dance_sde, cps, or a transition of your own: file.py:Class, called with eta
    eta: float = 0.7  # noise strength: 0.7 for flow_sde, 0.3 for dance_sde, 0.8 for cps
    timestep_fraction: float = 0.99  # share of the steps trained, the first ones
    prompts_per_step: int = 8  # groups an iteration
    group_size: int = 8  # images a prompt
    same_latents: bool = False  # one initial noise for a whole group
    # Values and advantages
    discount: float = 0.9  # of later instant rewards; our guess
    absolute: float | None = None  # k of the absolute term; None: 0.1 / the mean value, a guess, too; 0: off
    absolute_steps: int | None = None  # first steps that have it; None: 5, or all where there are fewer
    max_weight: float = 5.0  # of a step among those of its trajectory
    negative_rewards: Literal["shift", "refuse"] = "shift"  # by the running minimum, or end with an error
    advantage_std: Literal["group", "global"] = "group"
    max_advantage: float = 5.0
    # Objective
    clip_range: float = 1e-4  # on the ratio of mean-reduced likelihoods
    kl_weight: float = 0.0
    kl_type: Literal["gaussian", "flow_grpo", "x", "v"] = "gaussian"
    inner_epochs: int = 1  # passes over the samples of an iteration, with an update each

    def __post_init__(self) -> None:
        super().__post_init__()
        check_transition("sampler", self.sampler, ("flow_sde", "dance_sde", "cps"))
        if self.group_size < 2:
            raise ValueError(f"group_size: got {self.group_size}, expected >= 2 (one image has no baseline)")
        for name in ("eta", "clip_range", "max_advantage", "inner_epochs", "prompts_per_step", "num_steps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected > 0")
        for name in ("kl_weight", "absolute"):
            if getattr(self, name) is not None and not getattr(self, name) >= 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected >= 0")
        if self.sampler == "cps" and self.eta > 1:
            raise ValueError(f"eta: got {self.eta}, expected within (0, 1] for cps, a share of the noise")
        if not 0 <= self.discount <= 1:
            raise ValueError(f"discount: got {self.discount}, expected within [0, 1]")
        if not 1 <= self.horizon <= self.num_steps:
            raise ValueError(f"absolute_steps: got {self.absolute_steps}, expected 1 .. {self.num_steps} (num_steps)")
        if self.absolute_steps is not None and self.absolute == 0:
            raise ValueError(f"absolute_steps: got {self.absolute_steps} with absolute 0, expected None")
        if not self.max_weight >= 1:
            raise ValueError(f"max_weight: got {self.max_weight}, expected >= 1, the mean weight")
        noisy = self.num_steps - (self.sampler == "cps")  # its last step has no noise
        if not 0 < self.timestep_fraction <= 1 or int(self.timestep_fraction * noisy) < 1:
            raise ValueError(
                f"timestep_fraction: got {self.timestep_fraction} of {noisy} stochastic steps, expected within (0, 1] "
                "and at least one step"
            )

    @property
    def horizon(self) -> int:
        """First steps that have the absolute term."""
        return min(5, self.num_steps) if self.absolute_steps is None else self.absolute_steps


class VGPO(Trainer):
    """Sampling, scoring the projection after each step, updating each step by its own advantage."""

    name, config, kinds = "vgpo", Config, ("flow",)

    def __init__(self, loop: TrainingLoop) -> None:
        super().__init__(loop)
        self.transition = make_transition(self.cfg.sampler, eta=self.cfg.eta)
        if self.scorer.is_setwise or self.scorer.output_kind != "scores":
            raise ValueError(
                f"reward: got {self.cfg.reward!r}, which has no value for a sample by itself, expected one that scores "
                "each (or each within its group): VGPO compares steps, too"
            )
        stochastic = [i for i in range(self.cfg.num_steps) if self.transition.std(self.schedule, i) > 0]
        self.trained = trained_steps(stochastic, self.cfg.timestep_fraction)

    def iteration(self, step: int) -> Iteration:
        """Sample and score every step's projection; then learn."""
        cfg, loop = self.cfg, self.loop
        groups, (local,) = loop.groups(step, cfg.group_size, same_latents=cfg.same_latents)
        submitted = [loop.submit(self.sample(local))]
        scores = loop.collect(submitted)
        advantages, values, seen = self.advantages(scores)
        (batches,) = scores.assign(submitted, advantages.flatten())
        return Iteration(values | self.update(step, batches), images_of([batches]), *seen, len(groups) * cfg.group_size)

    def sample(self, groups: list[Group]) -> Iterator[Batch]:
        """Images of some groups and of the projection after each step, in micro-batches."""
        for samples in cut(groups, self.cfg.batch_size):
            with self.run.stage("rollout"):
                trajectory = rollout(
                    self.generator,
                    samples.prompts,
                    samples.seeds,
                    self.transition,
                    noise_seeds=samples.noise_seeds,
                    store_denoised=True,
                    grad_mode=self.cfg.compile,
                )
            with self.run.stage("project"):
                images = torch.cat(self.project(trajectory))
            yield Batch(trajectory, self.ids(samples.ids), images)

    @torch.no_grad()
    def project(self, trajectory: Trajectory) -> list[Tensor]:
        """What the image would be after each step, T of (N, 3, H, W): x0 as the next step's forward estimates it."""
        assert trajectory.images is not None
        images = []
        for i in range(1, self.cfg.num_steps):
            images.append(self.generator.decode(trajectory.denoised[i], trajectory.prompts, trajectory.seeds))
        trajectory.denoised = {}
        return [*images, trajectory.images]  # after the last step the state is the image

    def ids(self, group_ids: Tensor) -> Tensor:
        """The groups (T * N,) of the images after each step: at each step, a group is another one."""
        return torch.cat([i * self.cfg.prompts_per_step + group_ids for i in range(self.cfg.num_steps)])

    def advantages(self, scores: GatheredScores) -> tuple[Tensor, dict[str, float], tuple[Tensor, Tensor]]:
        """Of each step (T, N), from the scores of all processes, 0 where failed; what to log, and what to watch.

        What to watch are groups and rewards (N,) of the images, this process's first.
        """
        cfg, count = self.cfg, self.cfg.num_steps
        rewards, valid = (v.view(count, -1) for v in (scores.total, scores.valid))  # step by step, group by group
        group_ids = scores.group_ids.view(count, -1)[0]
        if cfg.negative_rewards == "refuse" and bool((rewards < 0).any()):
            raise ValueError(f"reward: got {float(rewards.min()):g}, expected >= 0 (or negative_rewards 'shift')")
        rewards, self.state.extra["reward_minimum"] = shift_rewards(
            rewards, self.state.extra.get("reward_minimum", 0.0)
        )
        whole = valid.all(0)  # a step that failed leaves no values before it
        values = process_values(rewards, cfg.discount)
        weights = temporal_weights(values, limit=cfg.max_weight)
        absolute = self.absolute(values[: cfg.horizon, whole])
        advantages = dual_advantages(values, group_ids, absolute, cfg.horizon, cfg.advantage_std, valid=whole)
        advantages = clip_advantages(weights.float() * advantages, cfg.max_advantage)
        groups = group_statistics(values.mean(0), group_ids, valid=whole)
        lowest = self.state.extra["reward_minimum"]
        here = torch.isin(group_ids, scores.local(scores.group_ids))  # of its first step's images, as of all
        order = torch.cat([here.nonzero().flatten(), (~here).nonzero().flatten()])  # this process's first
        seen = group_ids[order], (rewards[-1] + lowest).masked_fill(~valid[-1], math.nan)[order]
        last = {k: part.view(count, -1)[-1][scores.scored[k].view(count, -1)[-1]] for k, part in scores.parts.items()}
        named = {f"reward_{label}": float(part.mean()) for label, part in last.items()} if len(last) > 1 else {}
        log = {
            "reward_mean": float(rewards[-1, valid[-1]].mean()) + lowest,
            "instant_reward_first": float(rewards[0, valid[0]].mean()) + lowest,
            "value_mean": float(values[:, whole].mean()),
            "value_std_in_group": groups.stds.mean().item(),
            "zero_std_groups": groups.zero_std_fraction,
            "temporal_weight_max": float(weights[:, whole].amax()) if whole.any() else 0.0,
            "advantage_abs_mean": advantages.abs().mean().item(),
            "failed_scores": int((~valid).sum()),
            **named,
        }
        return advantages, log, seen

    def absolute(self, values: Tensor) -> float:
        """k: as given, or such that the absolute term of these values is 0.1 on average."""
        if self.cfg.absolute is not None:
            return self.cfg.absolute
        mean = float(values.mean()) if values.numel() else 0.0
        return 0.1 / mean if mean > 1e-6 else 0.0

    def backward(self, batch: Batch, scale: float) -> dict[str, Tensor]:
        """Add the gradient of a micro-batch: one pipeline call, backward in each trained step. Returns sums to log."""
        assert batch.advantages is not None
        trajectory, advantages = batch.trajectory, batch.advantages.view(self.cfg.num_steps, -1)
        if self.cfg.kl_weight == 0:  # no forward for samples without signal
            live = advantages[self.trained].ne(0).any(0)
            rows = rows_with_signal(trajectory, live, self.cfg.dtype == "fp32")
            if not rows:
                return {}
            trajectory, advantages = trajectory.take(rows), advantages[:, rows]

        def loss(i: int, prediction: Tensor, others: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            return self.loss(trajectory, i, prediction, advantages[i], others.get("base"))

        states = {i: trajectory.latents[i] for i in self.trained}
        references = {"base": self.state.policy.reference} if self.cfg.kl_weight else {}
        return add_gradients(self.generator, trajectory.prompts, trajectory.seeds, states, loss, scale, references)

    def loss(
        self, trajectory: Trajectory, i: int, prediction: Tensor, advantages: Tensor, reference: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss (N,) of one step and its statistics."""
        cfg = self.cfg
        gaussian = recompute(trajectory, i, prediction, self.transition)
        log_prob = gaussian.log_prob(trajectory.next_latents[i])
        old = old_log_probs(trajectory, i, log_prob, gaussian.mean)
        loss, stats = clipped_surrogate(log_prob, old, advantages, cfg.clip_range)
        if reference is None:
            return loss, stats
        extra = {"prediction": prediction, "ref_prediction": reference} if cfg.kl_type == "v" else {}
        dt = flow_grpo_kl_dt(cfg.sampler, *self.schedule.step(i)) if cfg.kl_type == "flow_grpo" else None
        base = recompute(trajectory, i, reference, self.transition)
        kl = kl_penalty(cfg.kl_type, gaussian, base, dt=dt, **extra)
        return loss + cfg.kl_weight * kl, {**stats, "kl": kl.detach().mean()}

    def update(self, step: int, batches: list[Batch]) -> dict[str, float]:
        """The optimiser updates of an iteration; returns what to log."""
        cfg, records = self.cfg, [batch.trajectory for batch in batches]
        updates = Updates(self.state, self.loop.accelerator, step, records)
        scale = 1 / (cfg.prompts_per_step * cfg.group_size * len(self.trained))
        for _ in range(cfg.inner_epochs):
            with self.run.stage("train"):
                for batch in batches:
                    updates.add(self.backward(batch, scale))
                updates.apply()
        return updates.values([*CLIPPED_STATS, *["kl"] * (cfg.kl_weight > 0)])


def main(cfg: Config) -> Path:
    """Train; returns the run folder."""
    return train(VGPO, cfg)


def cli(argv: list[str] | None = None) -> None:
    launch(VGPO, argv)


if __name__ == "__main__":
    cli()
