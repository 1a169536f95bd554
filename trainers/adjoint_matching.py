"""Adjoint matching: towards p_base exp(lambda r) by regression, with the reward's gradient but no chain of activations.

    accelerate launch trainers/adjoint_matching.py                                # the shipped shapes world
    accelerate launch trainers/adjoint_matching.py --config trainers/recipes/adjoint_matching_sd35.yaml --reward hpsv21

Domingo-Enrich et al. 2024, arXiv:2409.08861. Images are sampled with the memoryless noise (flows) or DDIM at eta 1
(diffusions); the reward's gradient at the end is carried back to every step through the *base* model, one
vector-Jacobian product a step; then some steps are trained to move the mean by -std^2 times it. Diversity stays,
for the optimum is a tilted base and not its mode. Departures: the last step of a flow is the ODE's and is not trained;
which steps are trained is as quoted of the paper; outliers are clamped, not dropped.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from visalign.data.prompts import Group
from visalign.objectives.adjoint import adjoint_matching_loss, lean_adjoints, matched_steps, smoothed_gradient
from visalign.sampling.rollout import Trajectory, rollout
from visalign.sampling.seeds import derived_seed, step_noise
from visalign.training.before import options, preflight
from visalign.training.loop.batches import Samples, cut
from visalign.training.loop.course import Course, open_course
from visalign.training.loop.learning import Updates, add_gradients
from visalign.training.reward_gradient.gradients import OTHERS, GradedReward, check_built, check_differentiable
from visalign.training.reward_gradient.parts import Learnt
from visalign.training.run import outcome
from visalign.transitions import DDIM, MemorylessFlow, Transition

KINDS = ("flow", "diffusion")


@dataclass(frozen=True)
class Config(options.CommonConfig):
    """Options of the trainer; those of every trainer are in `visalign.training.before.options.CommonConfig`."""

    # Sampling
    num_steps: int = 10  # denoising steps of a training image
    prompts_per_step: int = 16
    group_size: int = 1  # images a prompt
    # Objective
    reward_scale: float = 100.0  # lambda, in units of one over the reward: large is far from the base
    train_guidance: float = 1.0  # guidance_scale of adjoints and loss; sampling has its own
    pairing: Literal["same", "next"] = "same"  # x_k with a_k as published, or with a_{k+1}
    trained_share: float = 0.25  # the last steps always, and as large a share of the others at random
    outlier_limit: float = 1.6  # most a sample's loss of a step, in reward_scale^2; 0: none
    smoothing: int = 0  # noisy copies of the result over which the reward's gradient is averaged; 0: none
    smoothing_noise: float = 0.02  # std of their noise

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("prompts_per_step", "group_size", "reward_scale", "train_guidance"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected > 0")
        if self.num_steps < 3:
            raise ValueError(f"num_steps: got {self.num_steps}, expected >= 3 (two with noise, and the last)")
        if not 0 < self.trained_share <= 0.5:
            raise ValueError(f"trained_share: got {self.trained_share}, expected within (0, 0.5]")
        for name in ("outlier_limit", "smoothing", "smoothing_noise"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected >= 0")


class AdjointMatching:
    """One process's part in the training: trajectories, their adjoints, the update. The loop itself is `main`."""

    def __init__(self, course: Course):
        self.cfg, self.course, self.parts, self.run = course.cfg, course, course.parts, course.run
        self.generator, self.schedule = self.parts.generator, self.parts.generator.schedule
        preflight.check_kind(self.cfg.model, self.schedule.kind, KINDS)
        self.transition: Transition = MemorylessFlow() if self.schedule.kind == "flow" else DDIM(eta=1.0)
        self.stds = [self.transition.std(self.schedule, i) for i in range(self.cfg.num_steps)]
        self.noisy = [i for i, std in enumerate(self.stds) if std > 0]
        check_built(self.parts.scorer.reward, OTHERS)
        self.reward = GradedReward(self.parts.scorer.reward)
        guidance = self.cfg.train_guidance
        self.inputs = {} if guidance == self.generator.guidance_scale else {"guidance_scale": guidance}

    def sample(self, some: Samples) -> Trajectory:
        """Trajectories with every state on record."""
        with self.run.stage("rollout"):
            return rollout(
                self.generator, some.prompts, some.seeds, self.transition, noise_seeds=some.noise_seeds, decode=False
            )

    def terminal(self, some: Samples, final: Tensor, learnt: Learnt) -> Tensor:
        """a_K = -lambda grad r(decode(x_K)), (N, ...)."""
        cfg, context, gradients = self.cfg, self.parts.scorer.context(some.prompts), []
        for copy in range(max(1, cfg.smoothing)):
            noise = step_noise(some.noise_seeds, 20_000 + copy, final) * (cfg.smoothing_noise if cfg.smoothing else 0.0)
            with torch.enable_grad():
                x = (final + noise).detach().requires_grad_()
                images = self.generator.decode(x, some.prompts)
                graded = self.reward(images, some.prompts, some.noise_seeds, context)
                gradients.append(torch.autograd.grad(graded.loss.sum(), x)[0])
            if copy == 0:
                learnt.show(some, images.detach(), graded.rewards)
        return cfg.reward_scale * (smoothed_gradient(torch.stack(gradients)) if cfg.smoothing else gradients[0])

    def adjoints(self, some: Samples, trajectory: Trajectory, learnt: Learnt) -> tuple[dict[int, Tensor], ...]:
        """All states, and the lean adjoints, which belong to the base model."""
        states, last = dict(trajectory.latents), self.noisy[-1]
        if last + 1 < self.cfg.num_steps:  # a last step without noise is not on record
            states[last + 1] = trajectory.next_latents[last]

        def mean(k: int, x: Tensor) -> Tensor:
            prediction = self.generator.predict(x, k, some.prompts, some.seeds, **self.inputs)
            return self.transition(self.schedule, k, x, prediction)[0].mean

        with self.run.stage("adjoint"), self.parts.policy.reference():
            found = lean_adjoints(states, self.terminal(some, trajectory.final, learnt), mean)
        learnt.add("adjoint_norm", found[0].flatten(1).norm(dim=1))
        return states, found

    def loss(
        self, states: dict[int, Tensor], adjoints: dict[int, Tensor], i: int, prediction: Tensor, base: Tensor
    ) -> Tensor:
        """The loss (N,) of one step: the paper's, of flows divided by the step's length."""
        mean, base_mean = (self.transition(self.schedule, i, states[i], p)[0].mean for p in (prediction, base))
        adjoint = adjoints[i + (self.cfg.pairing == "next")]
        loss = adjoint_matching_loss(mean, base_mean, self.stds[i], adjoint)
        if self.schedule.kind == "flow":
            sigma, sigma_next = self.schedule.step(i)
            loss = loss / (sigma - sigma_next)
        limit = self.cfg.outlier_limit * self.cfg.reward_scale**2
        return loss.clamp(max=limit) if limit else loss

    def update(self, step: int, groups: list[Group]) -> tuple[dict[str, float], Learnt]:
        """The iteration's optimiser update; what to log, and what to watch."""
        cfg, learnt, updates = self.cfg, Learnt(), Updates(self.parts, self.course.accelerator, step)
        chosen = torch.Generator().manual_seed(derived_seed(cfg.seed, 21, step))
        steps = matched_steps(self.noisy, chosen, cfg.trained_share)
        scale = 1 / (cfg.prompts_per_step * cfg.group_size * len(steps))
        for some in cut(groups, cfg.batch_size):
            states, adjoints = self.adjoints(some, self.sample(some), learnt)

            def loss(
                i: int, prediction: Tensor, base: Tensor | None, states=states, adjoints=adjoints
            ) -> tuple[Tensor, dict[str, Tensor]]:
                assert base is not None
                losses = self.loss(states, adjoints, i, prediction, base)
                return losses, {"matching_loss": losses.detach().mean()}

            with self.run.stage("train"):
                kept = {i: states[i] for i in steps}
                policy = self.parts.policy
                sums = add_gradients(
                    self.generator, some.prompts, some.seeds, kept, loss, scale, policy, inputs=self.inputs
                )
                updates.add(sums)
        updates.apply()
        values, ids, rewards = learnt.joined(self.course.accelerator)
        self.seen = torch.zeros_like(ids) if cfg.group_size == 1 else ids, rewards  # one image a prompt: one group
        return values | updates.values(["matching_loss"]), learnt


def main(cfg: Config) -> Path:
    """Train; returns the run folder."""
    check_differentiable(cfg.reward, OTHERS)
    plan = preflight.make_plan(cfg, "adjoint_matching", kinds=KINDS)
    with open_course(cfg, plan, cfg.prompts_per_step) as course:
        trainer = AdjointMatching(course)
        for step in course.steps():
            groups, (mine,) = course.groups(step, cfg.group_size)
            values, learnt = trainer.update(step, mine)
            course.end_step(values, learnt.shown, *trainer.seen, len(groups) * cfg.group_size)
    return plan.folder


def cli(argv: list[str] | None = None) -> None:
    outcome.launch(main, Config, argv, "adjoint_matching", __doc__)


if __name__ == "__main__":
    cli()
