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
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from torch import Tensor

from visalign.advantages import clip_advantages, group_advantages
from visalign.objectives.policy_gradient import clipped_loss, kl_penalty, ppo_stats
from visalign.objectives.rebel import rebel_loss, rebel_weights
from visalign.prompt_statistics import PromptStatistics, normalised
from visalign.rollout import Trajectory, recompute, rollout, step_log_prob
from visalign.seeds import derived_seed
from visalign.training import options, outcome, preflight, setup
from visalign.training.config import parse_config, save_config
from visalign.training.data import Group, iteration_groups, share_of
from visalign.training.evaluate import Evaluation
from visalign.training.iteration import (
    Batch,
    Gathered,
    Scoring,
    evaluate_average,
    gather_scores,
    mean_over_processes,
    opened,
)
from visalign.training.run import WATCH, Run
from visalign.training.watching import roll_back, watch
from visalign.transitions import DDIM, Consistency, Transition, sampler_of

KINDS = ("diffusion", "consistency")


@dataclass(frozen=True)
class Config(options.CommonConfig):
    """Options of the trainer; those of every trainer are in `visalign.training.options.CommonConfig`."""

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


class DDPO:
    """One process's part in the training: sampling, scoring, updating. The loop itself is `train`."""

    def __init__(self, cfg: Config, accelerator: Accelerator, run: Run, parts: setup.Parts):
        self.cfg, self.accelerator, self.run, self.parts = cfg, accelerator, run, parts
        self.schedule = parts.generator.schedule
        preflight.check_kind(cfg.model, self.schedule.kind, KINDS)
        consistency = self.schedule.kind == "consistency"
        self.transition: Transition = Consistency(eta=cfg.eta) if consistency else DDIM(eta=cfg.eta)
        if parts.scorer.one_set or parts.scorer.gives != "scores":
            raise ValueError(
                f"reward: got {cfg.reward!r}, which scores sets or gives advantages, expected a score for each sample"
            )
        self.scoring = Scoring(run, parts.scorer)
        self.tracker: PromptStatistics | None = None
        if cfg.statistics == "prompt":
            self.tracker = PromptStatistics(cfg.buffer_size or 16, cfg.buffer_min)
            self.tracker.load_state_dict(parts.extra.get("prompt_rewards", {}))

    def sample(self, groups: Sequence[Group]) -> list[Batch]:
        """Images of some prompts, in micro-batches, with every step that has noise on record."""
        cfg = self.cfg
        samples = [(g, k) for g in groups for k in range(cfg.group_size)]
        batches: list[Batch] = []
        for start in range(0, len(samples), cfg.batch_size):
            chosen = samples[start : start + cfg.batch_size]
            prompts, seeds = [g.prompt for g, _ in chosen], [g.seeds[k] for g, k in chosen]
            with self.run.stage("rollout"):
                trajectory = rollout(self.parts.generator, prompts, seeds, self.transition, grad_mode=cfg.compile)
            batches.append(Batch(trajectory, torch.tensor([g.index for g, _ in chosen])))
            if not self.parts.scorer.whole:
                self.scoring.submit(batches[-1:])
        if self.parts.scorer.whole:
            self.scoring.submit(batches)
        return batches

    def assign_advantages(self, batches: list[Batch], groups: Sequence[Group]) -> tuple[Gathered, dict[str, float]]:
        """Advantages of all samples of the iteration, from the rewards of all processes; also returns what to log."""
        self.scoring.collect()
        scores = gather_scores(self.accelerator, self.parts.scorer, batches)
        extra = {}
        if self.tracker is not None:
            prompts = [groups[index].prompt for index in scores.ids.tolist()]
            advantages = self.tracker.advantages(prompts, scores.combined, scores.valid)
            self.parts.extra["prompt_rewards"] = self.tracker.state_dict()
            extra["own_baseline_share"] = self.tracker.share_of_own(prompts)
        elif self.cfg.statistics == "batch":
            advantages = normalised(scores.combined.double(), scores.combined[scores.valid].double())
        else:
            advantages = group_advantages(scores.combined, scores.ids)
        advantages = clip_advantages(advantages, self.cfg.max_advantage)
        scores.assign(batches, advantages)
        return scores, scores.values(advantages) | extra

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
        assert advantages is not None and batch.scores is not None
        sums: dict[str, Tensor] = {}
        if cfg.objective == "rebel":
            weights = self.pair_weights(batch, steps, sums)
        elif not cfg.kl_weight and bool((advantages == 0).any()):  # no forward for samples without signal
            rows = advantages.nonzero().flatten().tolist()
            if not rows:
                return {}
            trajectory, advantages = trajectory.take(rows), advantages[rows]
        references: dict[int, Tensor] = {}
        if cfg.kl_weight:
            with self.parts.policy.reference():
                self.forward(trajectory, steps, lambda i, _x, prediction: references.update({i: prediction}))

        def learn(i: int, _latents: Tensor, prediction: Tensor) -> None:
            loss, stats = self.loss(trajectory, i, prediction, advantages, weights, references.get(i))
            (loss.sum() * scale).backward()
            for name, value in stats.items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value * len(advantages)

        self.forward(trajectory, steps, learn)
        sums["count"] = torch.tensor(float(len(steps) * len(advantages)), device=advantages.device)
        return sums

    def forward(self, trajectory: Trajectory, steps: list[int], step_fn: Callable[[int, Tensor, Tensor], None]) -> None:
        """Predictions at recorded states: one pipeline call, or, to train text encoders, one a step.

        The embeddings are then part of each step's graph, which its backward frees: each step encodes anew.
        """
        calls = [[i] for i in steps] if self.parts.policy.texts else [steps]
        for visited in calls:
            states = {i: trajectory.latents[i] for i in visited}
            self.parts.generator.denoise(trajectory.prompts, trajectory.seeds, step_fn, latents=states)

    def pair_weights(self, batch: Batch, steps: list[int], sums: dict[str, Tensor]) -> Tensor:
        """REBEL's weight (N,) of each sample's log-probability, from a pass without gradient; 0 for unscored pairs.

        A mean over samples and steps becomes by it the loss's own mean over pairs of sums over steps.
        """
        trajectory, advantages = batch.trajectory, batch.advantages
        assert advantages is not None and batch.scores is not None
        ratios = torch.zeros_like(advantages)

        def add(i: int, _latents: Tensor, prediction: Tensor) -> None:
            ratios.add_(step_log_prob(trajectory, i, prediction, self.transition) - trajectory.log_probs[i])

        with torch.no_grad():
            self.forward(trajectory, steps, add)
        scored = batch.scores.valid.unflatten(0, (-1, 2)).all(1).to(ratios.device)
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
        log_ratio = gaussian.log_prob(trajectory.next_latents[i]) - trajectory.log_probs[i]
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
        cfg, sums, norms = self.cfg, dict[str, Tensor](), []
        total = cfg.prompts_per_step // cfg.updates_per_step * cfg.group_size  # samples an update, on all processes
        for share in shares * cfg.inner_epochs:
            with self.run.stage("train"):
                for batch in share:
                    steps = self.steps_to_train(step, batch.trajectory.steps)
                    for name, value in self.backward(batch, steps, 1 / (total * len(steps))).items():
                        sums[name] = sums.get(name, 0) + value
                norms.append(self.parts.apply_gradients(self.accelerator, step))
        names = ["ratio_mean", "approx_kl"] + ["kl"] * (cfg.kl_weight > 0)
        clips = ["clip_fraction", "clip_fraction_positive", "clip_fraction_negative"]
        names += ["rebel_loss"] if cfg.objective == "rebel" else clips
        values = mean_over_processes(self.accelerator, sums, names)
        norm = max((n for n in norms if math.isfinite(n)), default=math.nan)
        return {**values, "grad_norm": norm, "skipped_updates": self.parts.skipped}

    def evaluate(self, prompts: list[str]) -> Evaluation:
        """The averaged weights on held-out prompts, by deterministic DDIM or the usual consistency sampler."""
        sampler = sampler_of(self.schedule)
        return evaluate_average(self.cfg, self.accelerator, self.run, self.parts, sampler, prompts)


def main(cfg: Config) -> Path:
    """Train; returns the run folder."""
    plan = preflight.make_plan(cfg, "ddpo")
    preflight.check_kind(cfg.model, preflight.kind_of_folder(plan.model), KINDS)
    with opened(cfg, plan, cfg.prompts_per_step // cfg.updates_per_step) as (accelerator, parts, run):
        train(cfg, plan, accelerator, parts, run)
    return plan.folder


def train(cfg: Config, plan: preflight.Plan, accelerator: Accelerator, parts: setup.Parts, run: Run) -> None:
    """The loop, between the evaluation before and the one after."""
    trainer = DDPO(cfg, accelerator, run, parts)
    if accelerator.is_main_process:
        save_config(replace(cfg, resume=None), plan.folder / "config.yaml")
    outcome.announce(run, cfg, plan, parts)
    if parts.before is None:
        parts.before = trainer.evaluate(plan.eval_prompts)
        outcome.say_evaluation(run, parts.before, "before")
        run.log(0, outcome.evaluation_values(parts.before))
    share_size = cfg.prompts_per_step // cfg.updates_per_step
    with run.progress:
        for step in range(parts.step, cfg.steps):
            started = time.monotonic()
            # Sample and score: in the shares of the updates, all images of a prompt on one process.
            groups = iteration_groups(plan.prompts, step, cfg.prompts_per_step, cfg.group_size, cfg.seed)
            shares = []
            for k in range(0, len(groups), share_size):
                mine = share_of(groups[k : k + share_size], accelerator.process_index, accelerator.num_processes)
                shares.append(trainer.sample(mine))
            drawn = [batch for share in shares for batch in share]
            scores, values = trainer.assign_advantages(drawn, groups)
            # Learn, and look at what was drawn.
            values |= trainer.update(step, shares)
            shown = [(b.trajectory.images, b.trajectory.prompts) for b in drawn if b.trajectory.images is not None]
            values |= watch(run, parts, step + 1, shown, *scores.seen, values.get("kl"))
            parts.after_step(step + 1, time.monotonic() - started, len(groups) * cfg.group_size)
            stop = setup.stopping(run, accelerator)
            if cfg.eval_every and (step + 1) % cfg.eval_every == 0:  # also when stopping: as the unbroken run
                evaluation = trainer.evaluate(plan.eval_prompts[: cfg.eval_during])
                values |= outcome.evaluation_values(evaluation)
                setup.keep_best(parts, evaluation)
            run.log(step + 1, {**values, "learning_rate": parts.learning_rate(step)})
            if step % max(1, cfg.steps // 10) == 0:
                run.save_grid(f"step-{step + 1}.png", shown[0][0][:16])
            setup.checkpoint(run, cfg, parts, accelerator, last=stop or step + 1 == cfg.steps)  # after the log
            run.advance(step + 1, f"reward {values['reward_mean']:.3f}")
            if stop:
                run.say(f"stopped after step {step + 1} of {cfg.steps}; go on with --resume {plan.folder}")
                break
        if parts.step == cfg.steps or run.stopping == WATCH:
            if run.stopping == WATCH and cfg.monitor == "rollback":
                roll_back(run, parts)
            outcome.finish(run, cfg, plan, parts, trainer.evaluate(plan.eval_prompts))


def cli(argv: list[str] | None = None) -> None:
    cfg = parse_config(Config, argv, prog="ddpo", description=(__doc__ or "").split("\n\n")[0])
    outcome.run_or_say(lambda: main(cfg), "ddpo")


if __name__ == "__main__":
    cli()
