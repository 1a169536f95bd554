"""VGPO, value-anchored group policy optimisation: a value for each denoising step.

    accelerate launch trainers/vgpo.py                                            # the shipped shapes world
    accelerate launch trainers/vgpo.py --config trainers/recipes/vgpo.yaml --reward my_reward.py:score

VGPO (arXiv:2512.12387) scores what the image would be after each step: the one-step projection of the state (eq. 9).
The estimate comes from the forward that the next step makes anyway, so the extra cost is decoding and scoring. Values
are sums along the trajectory (eq. 10), weights compare a trajectory's steps (eq. 11), advantages compare the group at
each step and add an absolute term (eqs. 12 and 13). The rest is Flow-GRPO (2505.05470).

Reconstructed, for neither code nor the full text could be read: the discount's direction and value, the size of the
absolute term (hence 0 by default) and the order of weight and normalisation; see `visalign.advantages.process_values`.
Ours: rewards that go below 0 are shifted by their running minimum, weights are clamped to [0, 5], and advantages are
clipped after they are weighted.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from visalign.advantages.group import clip_advantages, group_statistics
from visalign.advantages.process_values import dual_advantages, process_values, shift_rewards, temporal_weights
from visalign.data.prompts import Group
from visalign.objectives.policy_gradient import CLIPPED_STATS, clipped_surrogate, kl_penalty
from visalign.sampling.rollout import Trajectory, recompute, rollout
from visalign.sampling.windows import trained_steps
from visalign.training.before import options, preflight
from visalign.training.loop.batches import Batch, cut
from visalign.training.loop.course import Course, open_course, shown
from visalign.training.loop.learning import Updates, add_gradients
from visalign.training.run import outcome
from visalign.transitions import make_transition

KINDS = ("flow",)


@dataclass(frozen=True)
class Config(options.CommonConfig):
    """Options of the trainer; those of every trainer are in `visalign.training.before.options.CommonConfig`."""

    # Sampling
    num_steps: int = 10  # denoising steps of a training image, all stochastic; each is decoded and scored
    sampler: Literal["flow_sde", "dance_sde", "cps"] = "flow_sde"
    eta: float = 0.7  # noise strength: 0.7 for flow_sde, 0.3 for dance_sde, 0.8 for cps
    timestep_fraction: float = 0.99  # share of the steps trained, the first ones
    prompts_per_step: int = 8  # groups an iteration
    group_size: int = 8  # images a prompt
    same_latents: bool = False  # one initial noise for a whole group
    # Values and advantages
    discount: float = 0.9  # of later instant rewards; our guess
    absolute: float = 0.0  # k of the absolute term, 0 turns it off; its size is a guess, too
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
        if self.group_size < 2:
            raise ValueError(f"group_size: got {self.group_size}, expected >= 2 (one image has no baseline)")
        for name in ("eta", "clip_range", "max_advantage", "inner_epochs", "prompts_per_step", "num_steps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected > 0")
        for name in ("kl_weight", "absolute"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected >= 0")
        if self.sampler == "cps" and self.eta > 1:
            raise ValueError(f"eta: got {self.eta}, expected within (0, 1] for cps, a share of the noise")
        if not 0 <= self.discount <= 1:
            raise ValueError(f"discount: got {self.discount}, expected within [0, 1]")
        if not 1 <= self.horizon <= self.num_steps:
            raise ValueError(f"absolute_steps: got {self.absolute_steps}, expected 1 .. {self.num_steps} (num_steps)")
        if self.absolute_steps is not None and not self.absolute:
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


class VGPO:
    """One process's part in the training: sampling, scoring, updating. The loop itself is `main`."""

    def __init__(self, course: Course):
        self.cfg, self.course, self.parts, self.run = course.cfg, course, course.parts, course.run
        self.generator, scorer = self.parts.generator, self.parts.scorer
        self.transition = make_transition(self.cfg.sampler, eta=self.cfg.eta)
        self.schedule = self.generator.schedule
        preflight.check_kind(self.cfg.model, self.schedule.kind, KINDS)
        if scorer.one_set or scorer.gives != "scores":
            raise ValueError(
                f"reward: got {self.cfg.reward!r}, which has no value for a sample by itself, expected one that scores "
                "each (or each within its group): VGPO compares steps, too"
            )
        stochastic = [i for i in range(self.cfg.num_steps) if self.transition.std(self.schedule, i) > 0]
        self.trained = trained_steps(stochastic, self.cfg.timestep_fraction)

    def sample(self, groups: list[Group]) -> list[Batch]:
        """Images of some groups and of the projection after each step, in micro-batches; handed on to the reward."""
        batches: list[Batch] = []
        for some in cut(groups, self.cfg.batch_size):
            with self.run.stage("rollout"):
                trajectory = rollout(
                    self.generator,
                    some.prompts,
                    some.seeds,
                    self.transition,
                    noise_seeds=some.noise_seeds,
                    store_denoised=True,
                    grad_mode=self.cfg.compile,
                )
            with self.run.stage("project"):
                images = torch.cat(self.project(trajectory))
            batches.append(Batch(trajectory, self.ids(some.ids), images))
            self.course.scoring.add(batches[-1])
        self.course.scoring.flush()
        return batches

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

    def assign_advantages(self, batches: list[Batch]) -> dict[str, float]:
        """Each step's advantages (T * N,), from the rewards of all processes; returns what to log."""
        cfg, count = self.cfg, self.cfg.num_steps
        all_ = self.course.scoring.collect(batches)
        rewards, valid = (v.view(count, -1) for v in (all_.rewards, all_.valid))  # step by step, group by group
        group_ids = all_.ids.view(count, -1)[0]
        if cfg.negative_rewards == "refuse" and bool((rewards < 0).any()):
            raise ValueError(f"reward: got {float(rewards.min()):g}, expected >= 0 (or negative_rewards 'shift')")
        rewards, self.parts.extra["reward_minimum"] = shift_rewards(
            rewards, self.parts.extra.get("reward_minimum", 0.0)
        )
        values = process_values(rewards, cfg.discount)
        weights = temporal_weights(values, limit=cfg.max_weight)
        advantages = dual_advantages(values, group_ids, cfg.absolute, cfg.horizon, cfg.advantage_std)
        advantages = clip_advantages(weights.float() * advantages, cfg.max_advantage)
        advantages = advantages * valid.all(0).double()  # 0: failed
        all_.assign(batches, advantages.flatten())
        groups = group_statistics(values.mean(0), group_ids)
        lowest = self.parts.extra["reward_minimum"]
        here = torch.isin(group_ids, torch.cat([b.group_ids[: len(b.trajectory)] for b in batches]))
        order = torch.cat([here.nonzero().flatten(), (~here).nonzero().flatten()])  # this process's first
        self.seen = group_ids[order], (rewards[-1] + lowest)[order]
        last = zip(all_.labels, all_.parts.view(len(all_.parts), count, -1)[:, -1])
        named = {f"reward_{label}": float(part.mean()) for label, part in last} if len(all_.labels) > 1 else {}
        return {
            "reward_mean": float(rewards[-1].mean()) + lowest,
            "instant_reward_first": float(rewards[0].mean()) + lowest,
            "value_mean": float(values.mean()),
            "value_std_in_group": groups.stds.mean().item(),
            "zero_std_groups": groups.zero_std_fraction,
            "temporal_weight_max": float(weights.max()),
            "advantage_abs_mean": advantages.abs().mean().item(),
            "failed_scores": int((~valid).sum()),
            **named,
        }

    def backward(self, batch: Batch, scale: float) -> dict[str, Tensor]:
        """Add the gradient of a micro-batch: one pipeline call, backward in each trained step. Returns sums to log."""
        assert batch.advantages is not None
        trajectory, advantages = batch.trajectory, batch.advantages.view(self.cfg.num_steps, -1)
        if self.cfg.kl_weight == 0:  # no forward for samples without signal
            rows = advantages[self.trained].ne(0).any(0).nonzero().flatten().tolist()
            if not rows:
                return {}
            trajectory, advantages = trajectory.take(rows), advantages[:, rows]

        def loss(i: int, prediction: Tensor, reference: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
            return self.loss(trajectory, i, prediction, advantages[i], reference)

        states = {i: trajectory.latents[i] for i in self.trained}
        base = self.parts.policy if self.cfg.kl_weight else None
        return add_gradients(self.generator, trajectory.prompts, trajectory.seeds, states, loss, scale, base)

    def loss(
        self, trajectory: Trajectory, i: int, prediction: Tensor, advantages: Tensor, reference: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss (N,) of one step and its statistics."""
        cfg = self.cfg
        gaussian = recompute(trajectory, i, prediction, self.transition)
        log_prob = gaussian.log_prob(trajectory.next_latents[i])
        loss, stats = clipped_surrogate(log_prob, trajectory.log_probs[i], advantages, cfg.clip_range)
        if reference is None:
            return loss, stats
        sigma, sigma_next = self.schedule.step(i)
        extra = {"prediction": prediction, "ref_prediction": reference} if cfg.kl_type == "v" else {}
        dt = sigma_next - sigma if cfg.kl_type == "flow_grpo" else None
        base = recompute(trajectory, i, reference, self.transition)
        kl = kl_penalty(cfg.kl_type, gaussian, base, dt=dt, **extra)
        return loss + cfg.kl_weight * kl, {**stats, "kl": kl.detach().mean()}

    def update(self, step: int, batches: list[Batch]) -> dict[str, float]:
        """The optimiser updates of an iteration; returns what to log."""
        cfg, updates = self.cfg, Updates(self.parts, self.course.accelerator, step)
        scale = 1 / (cfg.prompts_per_step * cfg.group_size * len(self.trained))
        for _ in range(cfg.inner_epochs):
            with self.run.stage("train"):
                for batch in batches:
                    updates.add(self.backward(batch, scale))
                updates.apply()
        return updates.values([*CLIPPED_STATS, *["kl"] * (cfg.kl_weight > 0)])


def main(cfg: Config) -> Path:
    """Train; returns the run folder."""
    plan = preflight.make_plan(cfg, "vgpo", kinds=KINDS)
    with open_course(cfg, plan, cfg.prompts_per_step) as course:
        trainer = VGPO(course)
        for step in course.steps():
            groups, (mine,) = course.groups(step, cfg.group_size, same_latents=cfg.same_latents)
            batches = trainer.sample(mine)
            values = trainer.assign_advantages(batches)
            values |= trainer.update(step, batches)
            course.end_step(values, shown(batches), *trainer.seen, len(groups) * cfg.group_size)
    return plan.folder


def cli(argv: list[str] | None = None) -> None:
    outcome.launch(main, Config, argv, "vgpo", __doc__)


if __name__ == "__main__":
    cli()
