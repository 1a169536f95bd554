"""Adjoint matching: towards p_base exp(lambda r) by regression, with the reward's gradient but no chain of activations.

    accelerate launch trainers/adjoint_matching.py                                # the shipped shapes world
    accelerate launch trainers/adjoint_matching.py --config trainers/recipes/adjoint_matching_sd35.yaml --reward hpsv21

Domingo-Enrich et al. 2024, arXiv:2409.08861. Images are sampled with the memoryless noise (flows) or DDIM at eta 1
(diffusions); the reward's gradient at the end is carried back to every step through the *base* model, one
vector-Jacobian product a step; then samples steps are trained to move the mean by -std^2 times it. Diversity stays,
for the optimum is a tilted base and not its mode. Departures: the last step of a flow is the ODE's and is not trained;
which steps are trained is as quoted of the paper; outliers are clamped, not dropped.
"""

from collections.abc import Mapping
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
from visalign.training.loop.learning import Updates, add_gradients
from visalign.training.loop.trainer import Trainer, launch, train
from visalign.training.loop.training_loop import Iteration, TrainingLoop
from visalign.training.reward_gradient.gradients import OTHERS, GradedReward, check_built, check_differentiable
from visalign.training.reward_gradient.parts import UpdateLog
from visalign.transitions import DDIM, MemorylessFlow, Transition


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


class AdjointMatching(Trainer):
    """Trajectories, their adjoints, the update."""

    name, config, kinds = "adjoint_matching", Config, ("flow", "diffusion")

    @classmethod
    def plan(cls, cfg: Config) -> preflight.Plan:
        check_differentiable(cfg.reward, OTHERS)
        return super().plan(cfg)

    def __init__(self, loop: TrainingLoop) -> None:
        super().__init__(loop)
        self.transition: Transition = MemorylessFlow() if self.schedule.kind == "flow" else DDIM(eta=1.0)
        self.stds = [self.transition.std(self.schedule, i) for i in range(self.cfg.num_steps)]
        self.noisy = [i for i, std in enumerate(self.stds) if std > 0]
        check_built(self.state.scorer.reward, OTHERS)
        self.reward = GradedReward(self.state.scorer.reward)
        guidance = self.cfg.train_guidance
        self.call_inputs = {} if guidance == self.generator.guidance_scale else {"guidance_scale": guidance}

    def iteration(self, step: int) -> Iteration:
        """Sample, differentiate the reward, match."""
        groups, (local,) = self.loop.groups(step, self.cfg.group_size)
        values, log, seen = self.update(step, local)
        return Iteration(values, log.images, *seen, len(groups) * self.cfg.group_size)

    def sample(self, samples: Samples) -> Trajectory:
        """Trajectories with every state on record."""
        with self.run.stage("rollout"):
            return rollout(
                self.generator,
                samples.prompts,
                samples.seeds,
                self.transition,
                noise_seeds=samples.noise_seeds,
                decode=False,
            )

    def terminal(self, samples: Samples, final: Tensor, log: UpdateLog) -> Tensor:
        """a_K = -lambda grad r(decode(x_K)), (N, ...)."""
        cfg, context, gradients = self.cfg, self.state.scorer.context(samples.prompts), []
        for copy in range(max(1, cfg.smoothing)):
            noise = step_noise(samples.noise_seeds, 20_000 + copy, final) * (
                cfg.smoothing_noise if cfg.smoothing else 0.0
            )
            with torch.enable_grad():
                x = (final + noise).detach().requires_grad_()
                images = self.generator.decode(x, samples.prompts)
                graded = self.reward(images, samples.prompts, samples.noise_seeds, context)
                gradients.append(torch.autograd.grad(graded.loss.sum(), x)[0])
            if copy == 0:
                log.add_samples(samples, images.detach(), graded.rewards)
        return cfg.reward_scale * (smoothed_gradient(torch.stack(gradients)) if cfg.smoothing else gradients[0])

    def adjoints(self, samples: Samples, trajectory: Trajectory, log: UpdateLog) -> tuple[dict[int, Tensor], ...]:
        """All states, and the lean adjoints, which belong to the base model."""
        states, last = dict(trajectory.latents), self.noisy[-1]
        if last + 1 < self.cfg.num_steps:  # a last step without noise is not on record
            states[last + 1] = trajectory.next_latents[last]

        def mean(k: int, x: Tensor) -> Tensor:
            prediction = self.generator.predict(x, k, samples.prompts, samples.seeds, **self.call_inputs)
            return self.transition(self.schedule, k, x, prediction)[0].mean

        with self.run.stage("adjoint"), self.state.policy.reference():
            adjoints = lean_adjoints(states, self.terminal(samples, trajectory.final, log), mean)
        log.add("adjoint_norm", adjoints[0].flatten(1).norm(dim=1))
        return states, adjoints

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

    def update(self, step: int, groups: list[Group]) -> tuple[dict[str, float], UpdateLog, tuple[Tensor, Tensor]]:
        """The iteration's optimiser update; what to log, the images, and the groups and rewards to watch."""
        cfg, log, updates = self.cfg, UpdateLog(), Updates(self.state, self.loop.accelerator, step)
        chosen = torch.Generator().manual_seed(derived_seed(cfg.seed, 21, step))
        steps = matched_steps(self.noisy, chosen, cfg.trained_share)
        scale = 1 / (cfg.prompts_per_step * cfg.group_size * len(steps))
        for samples in cut(groups, cfg.batch_size):
            states, adjoints = self.adjoints(samples, self.sample(samples), log)

            def loss(
                i: int, prediction: Tensor, others: Mapping[str, Tensor], states=states, adjoints=adjoints
            ) -> tuple[Tensor, dict[str, Tensor]]:
                losses = self.loss(states, adjoints, i, prediction, others["base"])
                return losses, {"matching_loss": losses.detach().mean()}

            with self.run.stage("train"):
                call = (self.generator, samples.prompts, samples.seeds, {i: states[i] for i in steps})
                references = {"base": self.state.policy.reference}
                updates.add(add_gradients(*call, loss, scale, references, inputs=self.call_inputs))
        updates.apply()
        values, ids, rewards = log.joined(self.loop.accelerator)
        seen = torch.zeros_like(ids) if cfg.group_size == 1 else ids, rewards  # one image a prompt: one group
        return values | updates.values(["matching_loss"]), log, seen


def main(cfg: Config) -> Path:
    """Train; returns the run folder."""
    return train(AdjointMatching, cfg)


def cli(argv: list[str] | None = None) -> None:
    launch(AdjointMatching, argv)


if __name__ == "__main__":
    cli()
