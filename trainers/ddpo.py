"""Policy gradients for diffusion and consistency models: DDPO, RLCM and TexForce, as flags of one loop.

    accelerate launch trainers/ddpo.py                     # offline: the shapes world's diffusion model
    accelerate launch trainers/ddpo.py --config trainers/recipes/ddpo_sd15.yaml --reward my_reward.py:score

DDPO with importance sampling (Black et al. 2023, arXiv:2305.13301) on DDIM(eta) steps, RLCM (Oertell et al. 2024,
arXiv:2404.03673) on consistency steps by PPO or REBEL, TexForce (Chen et al. 2023, arXiv:2311.15657) with LoRA on the
text encoders. Departures: advantages are divided by max(std, 1e-4) rather than std + 1e-6; all samples of an iteration
train the same steps, where DDPO's code shuffles them sample by sample (with all steps trained the sum is the same);
RLCM's last action, whose noise no picture shows, is not trained; the noise of a sample depends on its seed and step.
Flow-matching models are trained by `flow_grpo.py`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from visalign.advantages.group import clip_advantages, group_advantages
from visalign.advantages.per_prompt import PromptStatistics, normalised
from visalign.data.prompts import Group
from visalign.objectives.policy_gradient import CLIPPED_STATS, clipped_loss, kl_penalty, ppo_stats
from visalign.objectives.rebel import rebel_loss, rebel_weights
from visalign.sampling.rollout import Trajectory, old_log_probs, recompute, rollout, step_log_prob
from visalign.sampling.seeds import derived_seed
from visalign.training.before import options
from visalign.training.loop.batches import Batch, GatheredScores, cut
from visalign.training.loop.learning import Updates, add_gradients, add_sums, rows_with_signal
from visalign.training.loop.trainer import Trainer, launch, train
from visalign.training.loop.training_loop import Iteration, TrainingLoop, images_of
from visalign.transitions import DDIM, Consistency, Transition


@dataclass(frozen=True)
class Config(options.CommonConfig):
    """Options of the trainer; those of every trainer are in `visalign.training.before.options.CommonConfig`."""

    model: str = "shapes-diffusion"  # a shipped model, a diffusers folder, or a hub id; no flow-matching model
    policy: Literal["denoiser", "text", "both"] = "denoiser"  # what is trained; text: LoRA on the text encoders
    # Sampling
    num_steps: int = 10  # denoising steps of a training image; 4 to 16 for consistency models
    eta: float = 1.0  # share of the noise that each step draws afresh; 1: DDPM's, or the usual consistency sampler's
    prompts_per_step: int = 8
    group_size: int = 16  # images a prompt; rebel pairs them
    timestep_fraction: float = 0.3  # share of the stochastic steps trained
    timestep_choice: Literal["random", "first"] = "random"  # which ones, anew in every iteration
    # Objective
    objective: Literal["ppo", "rebel"] = "ppo"
    statistics: Literal["prompt", "batch", "group"] = "prompt"  # what normalises a reward
    buffer_size: int | None = None  # rewards kept a prompt; None: 16; for statistics prompt
    buffer_min: int | None = None  # from so many on they are used, else the iteration's; None: buffer_size
    max_advantage: float = 5.0
    clip_range: float | None = None  # on the ratio of mean-reduced likelihoods; None: 1e-4; for ppo
    rebel_scale: float | None = None  # eta_r; None: 1; for rebel
    kl_weight: float = 0.0  # of the KL to the model as it was
    inner_epochs: int = 1  # passes over the samples of an iteration
    updates_per_step: int = 1  # optimiser updates a pass; the prompts are shared among them

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.eta <= 1:
            raise ValueError(f"eta: got {self.eta}, expected within (0, 1] (no noise leaves no log-probability)")
        if self.num_steps < 2:
            raise ValueError(f"num_steps: got {self.num_steps}, expected >= 2 (one step has no noise to learn from)")
        if not 0 < self.timestep_fraction <= 1:
            raise ValueError(f"timestep_fraction: got {self.timestep_fraction}, expected within (0, 1]")
        for name in ("group_size", "max_advantage", "inner_epochs", "updates_per_step", "prompts_per_step"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected > 0")
        if self.prompts_per_step % self.updates_per_step:
            raise ValueError(
                f"prompts_per_step: got {self.prompts_per_step}, expected a multiple of updates_per_step "
                f"({self.updates_per_step})"
            )
        if self.kl_weight < 0:
            raise ValueError(f"kl_weight: got {self.kl_weight}, expected >= 0")
        self._check_objective()
        if self.policy != "denoiser" and not self.lora_rank:
            raise ValueError(f"lora_rank: got 0 with policy {self.policy!r}, expected > 0 (a LoRA on text encoders)")
        if self.policy != "denoiser" and self.release_text_encoders:
            raise ValueError(f"release_text_encoders: got true with policy {self.policy!r}, which trains them")

    def _check_objective(self) -> None:
        for name, owner in (("clip_range", "ppo"), ("rebel_scale", "rebel")):
            value = getattr(self, name)
            if value is not None and self.objective != owner:
                raise ValueError(f"{name}: got {value} with objective {self.objective!r}, expected none ({owner} only)")
            if value is not None and not value > 0:
                raise ValueError(f"{name}: got {value}, expected > 0")
        if self.objective == "rebel" and (self.group_size % 2 or self.batch_size % 2):
            raise ValueError(
                f"group_size, batch_size: got {self.group_size}, {self.batch_size} with objective 'rebel', expected "
                "even numbers (it compares pairs of images of one prompt)"
            )
        if self.statistics == "group" and self.group_size < 2:
            raise ValueError(f"group_size: got {self.group_size} with statistics 'group', expected >= 2")
        if self.statistics == "prompt":
            PromptStatistics(self.buffer_size or 16, self.buffer_min)
        elif (self.buffer_size, self.buffer_min) != (None, None):
            raise ValueError(f"buffer_size, buffer_min: got one with statistics {self.statistics!r}, expected none")


class DDPO(Trainer):
    """Sampling, comparing with each prompt's own past, updating by PPO or REBEL."""

    name, config, kinds = "ddpo", Config, ("diffusion", "consistency")

    def __init__(self, loop: TrainingLoop) -> None:
        super().__init__(loop)
        cfg = self.cfg
        consistency = self.schedule.kind == "consistency"
        self.transition: Transition = Consistency(eta=cfg.eta) if consistency else DDIM(eta=cfg.eta)
        if self.scorer.is_setwise or self.scorer.output_kind != "scores":
            raise ValueError(
                f"reward: got {cfg.reward!r}, which scores sets or gives advantages, expected a score for each sample"
            )
        self.tracker: PromptStatistics | None = None
        if cfg.statistics == "prompt":
            self.tracker = PromptStatistics(cfg.buffer_size or 16, cfg.buffer_min)
            self.tracker.load_state_dict(self.state.extra.get("prompt_rewards", {}))

    def iteration(self, step: int) -> Iteration:
        """Sample and score, in the shares of the updates; then learn from all."""
        cfg, loop = self.cfg, self.loop
        groups, local = loop.groups(step, cfg.group_size, cfg.updates_per_step)
        submitted = [loop.submit(self.sample(share)) for share in local]
        scores = loop.collect(submitted)
        advantages, values = self.advantages(scores, groups)
        shares = scores.assign(submitted, advantages)
        values |= scores.values() | {"advantage_abs_mean": advantages.abs().mean().item()} | self.update(step, shares)
        return Iteration(values, images_of(shares), *scores.as_gathered, len(groups) * cfg.group_size)

    def sample(self, groups: Sequence[Group]) -> Iterator[Batch]:
        """Images of some prompts, in micro-batches, every step with noise on record."""
        for samples in cut(groups, self.cfg.batch_size):
            with self.run.stage("rollout"):
                trajectory = rollout(
                    self.generator, samples.prompts, samples.seeds, self.transition, grad_mode=self.cfg.compile
                )
            yield Batch(trajectory, samples.ids)

    def advantages(self, scores: GatheredScores, groups: Sequence[Group]) -> tuple[Tensor, dict[str, float]]:
        """Of all samples of the iteration, (M,), from the scores of all processes, 0 where failed; and what to log.

        Args:
            groups: of all processes, by their ids.
        """
        values: dict[str, float] = {}
        if self.tracker is not None:
            prompts = [groups[index].prompt for index in scores.group_ids.tolist()]
            advantages = self.tracker.advantages(prompts, scores.total, scores.valid)
            self.state.extra["prompt_rewards"] = self.tracker.state_dict()
            values["own_baseline_share"] = self.tracker.share_of_own(prompts)
        elif self.cfg.statistics == "batch":
            advantages = normalised(scores.total, scores.total[scores.valid])
        else:
            advantages = group_advantages(scores.total, scores.group_ids, valid=scores.valid)
        return clip_advantages(advantages, self.cfg.max_advantage).float() * scores.valid, values

    def steps_to_train(self, step: int, stored: list[int]) -> list[int]:
        """The recorded steps that get a gradient in this iteration."""
        count = max(1, int(self.cfg.timestep_fraction * len(stored)))
        if self.cfg.timestep_choice == "first":
            return stored[:count]
        generator = torch.Generator().manual_seed(derived_seed(self.cfg.seed, 5, step))
        return sorted(stored[i] for i in torch.randperm(len(stored), generator=generator)[:count])

    def backward(self, batch: Batch, steps: list[int], scale: float) -> dict[str, Tensor]:
        """Add the gradient of a micro-batch, step by step. Returns sums to log."""
        cfg, trajectory, advantages, weights = self.cfg, batch.trajectory, batch.advantages, None
        assert advantages is not None
        sums: dict[str, Tensor] = {}
        if cfg.objective == "rebel":
            weights = self.pair_weights(batch, steps, sums)
        elif not cfg.kl_weight and bool((advantages == 0).any()):  # no forward for samples without signal
            rows = rows_with_signal(trajectory, advantages, cfg.dtype == "fp32")
            if not rows:
                return {}
            trajectory, advantages = trajectory.take(rows), advantages[rows]

        def loss(i: int, prediction: Tensor, others: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            return self.loss(trajectory, i, prediction, advantages, weights, others.get("base"))

        references = {"base": self.state.policy.reference} if cfg.kl_weight else {}
        for states in self.calls(trajectory, steps):
            call = (self.generator, trajectory.prompts, trajectory.seeds, states)
            add_sums(sums, add_gradients(*call, loss, scale, references))
        return sums

    def calls(self, trajectory: Trajectory, steps: list[int]) -> list[dict[int, Tensor]]:
        """The recorded states to predict at, in one pipeline call, or, to train text encoders, in one a step.

        The embeddings are then part of each step's graph, which its backward frees: each step encodes anew.
        """
        visited = [[i] for i in steps] if self.state.policy.texts else [steps]
        return [{i: trajectory.latents[i] for i in call} for call in visited]

    def pair_weights(self, batch: Batch, steps: list[int], sums: dict[str, Tensor]) -> Tensor:
        """REBEL's weight (N,) of each sample's log-probability, from a pass without gradient; 0 for unscored pairs.

        A mean over samples and steps becomes by it the loss's own mean over pairs of sums over steps.
        """
        trajectory, advantages = batch.trajectory, batch.advantages
        assert advantages is not None and batch.valid is not None
        ratios = torch.zeros_like(advantages)

        def add(i: int, _latents: Tensor, prediction: Tensor) -> None:
            ratios.add_(step_log_prob(trajectory, i, prediction, self.transition) - trajectory.log_probs[i])

        with torch.no_grad():  # the weights that sampled have ratios of 1: no pass
            for states in () if trajectory.fresh else self.calls(trajectory, steps):
                self.generator.denoise(trajectory.prompts, trajectory.seeds, add, latents=states)
        scored = batch.valid.unflatten(0, (-1, 2)).all(1).to(ratios.device)
        given, scale = (ratios, advantages, self.cfg.rebel_scale or 1.0), 2 * len(steps)
        sums["rebel_loss"] = (rebel_loss(*given) * scored).sum() * scale
        return rebel_weights(*given) * scored.repeat_interleave(2) * scale

    def loss(
        self,
        trajectory: Trajectory,
        i: int,
        prediction: Tensor,
        advantages: Tensor,
        weights: Tensor | None,
        reference: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss (N,) of one step and its statistics."""
        gaussian = recompute(trajectory, i, prediction, self.transition)
        log_prob = gaussian.log_prob(trajectory.next_latents[i])
        log_ratio = log_prob - old_log_probs(trajectory, i, log_prob, gaussian.mean)
        if weights is None:
            loss, stats = clipped_loss(log_ratio, advantages, self.cfg.clip_range or 1e-4)
        else:  # of the gradient of `rebel_loss`
            loss, stats = weights * log_ratio, ppo_stats(log_ratio, advantages, math.inf)
        if reference is not None:
            kl = kl_penalty("gaussian", gaussian, recompute(trajectory, i, reference, self.transition))
            loss = loss + self.cfg.kl_weight * kl
            stats["kl"] = kl.detach().mean()
        return loss, stats

    def update(self, step: int, shares: list[list[Batch]]) -> dict[str, float]:
        """All optimiser updates of an iteration; returns what to log."""
        cfg, records = self.cfg, [batch.trajectory for share in shares for batch in share]
        updates = Updates(self.state, self.loop.accelerator, step, records)
        steps = self.steps_to_train(step, shares[0][0].trajectory.steps)  # all batches have recorded the same
        scale = 1 / (cfg.prompts_per_step // cfg.updates_per_step * cfg.group_size * len(steps))
        for share in shares * cfg.inner_epochs:
            with self.run.stage("train"):
                for batch in share:
                    updates.add(self.backward(batch, steps, scale))
                updates.apply()
        names = ("ratio_mean", "approx_kl", "rebel_loss") if cfg.objective == "rebel" else CLIPPED_STATS
        return updates.values([*names, *["kl"] * (cfg.kl_weight > 0)])


def main(cfg: Config) -> Path:
    """Train; returns the run folder."""
    return train(DDPO, cfg)


def cli(argv: list[str] | None = None) -> None:
    launch(DDPO, argv)


if __name__ == "__main__":
    cli()
