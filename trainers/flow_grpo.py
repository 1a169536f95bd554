"""GRPO for flow-matching models: Flow-GRPO and its relatives, as flags of one loop.

    accelerate launch trainers/flow_grpo.py                                       # the shipped shapes world
    accelerate launch trainers/flow_grpo.py --config trainers/recipes/flow_grpo.yaml --reward my_reward.py:score

Flow-GRPO (arXiv:2505.05470), Flow-GRPO-Fast and MixGRPO windows (2507.21802), DanceGRPO (2505.07818), CPS (2509.05952),
GRPO-Guard (2510.22319), TempFlow's step weights (2508.04324). Departures: advantages are divided by max(std, 1e-4)
rather than std + 1e-4; the KL is the true one unless `--kl_type flow_grpo`; the noise of a sample depends on its seed
and step alone, so results do not depend on the number of processes.
"""

import math
import time
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor

from visalign.advantages import clip_advantages, group_advantages, group_statistics
from visalign.objectives.policy_gradient import StepWeight, clipped_loss, kl_penalty, ratio_norm_log_ratio, step_weights
from visalign.rollout import Solver, Trajectory, recompute, rollout
from visalign.seeds import derived_seed
from visalign.training import options, outcome, preflight, setup
from visalign.training.config import parse_config, save_config
from visalign.training.data import Group, iteration_groups, share_of
from visalign.training.optimization import mean_over_processes
from visalign.training.run import WATCH, Run
from visalign.training.scoring import Scored
from visalign.training.watching import roll_back, watch, watch_evaluation
from visalign.transitions import make_transition
from visalign.windows import flash_post_steps, make_window, trained_steps


@dataclass(frozen=True)
class Config(options.CommonConfig):
    """Options of the trainer; those of every trainer are in `visalign.training.options.CommonConfig`."""

    # Sampling
    num_steps: int = 10  # denoising steps of a training image
    sampler: Literal["flow_sde", "dance_sde", "cps"] = "flow_sde"
    eta: float = 0.7  # noise strength: 0.7 for flow_sde, 0.3 for dance_sde, 0.8 for cps
    window: Literal["all", "early", "random", "mix_random", "progressive", "decay", "exp_decay"] = "early"
    window_size: int | None = None  # stochastic steps; None: 2 for early; all takes none, the others need it
    window_span: tuple[int, int] | None = None  # for random: first and last + 1 step it may hold
    window_iterations: int | None = None  # for progressive and decays: iterations at each position
    solver: Solver | None = None  # of the steps after the window; None: dpm2m for early, else ode
    post_ratio: float | None = None  # MixGRPO-Flash: share of the steps after it; None: 0.4 for early, else all
    timestep_fraction: float | None = None  # share of the stochastic steps trained; None: 0.99 for all, else 1
    timestep_choice: Literal["first", "random"] = "first"  # which ones
    prompts_per_step: int = 16  # groups an iteration
    group_size: int = 8  # images a prompt
    same_latents: bool = False  # one initial noise for a whole group
    # Objective
    advantage_std: Literal["group", "global"] = "global"
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
        """Share of the steps after the window that are taken; None: all."""
        return 0.4 if self.window == "early" and self.post_ratio is None else self.post_ratio

    def make_window(self):
        """The window of stochastic steps; options given for another kind of window are errors."""
        span = {} if self.window_span is None else {"span": self.window_span}
        dwell = {} if self.window_iterations is None else {"iterations": self.window_iterations}
        return make_window(self.window, self.num_steps, self.window_size, **span, **dwell)


@dataclass
class Batch:
    """A micro-batch: its samples' groups (N,), their scores when they are there, and then the advantages (N,)."""

    trajectory: Trajectory
    group_ids: Tensor
    scores: Scored | None = None
    advantages: Tensor | None = None


class FlowGRPO:
    """One process's part in the training: sampling, scoring, updating. The loop itself is `main`."""

    def __init__(self, cfg: Config, accelerator: Accelerator, run: Run, parts: setup.Parts):
        self.cfg, self.accelerator, self.run, self.parts = cfg, accelerator, run, parts
        self.transition = make_transition(cfg.sampler, eta=cfg.eta)
        self.window = cfg.make_window()
        self.schedule = parts.generator.schedule
        preflight.check_kind(cfg.model, self.schedule.kind, ["flow"])
        self.stds = [self.transition.std(self.schedule, i) for i in range(cfg.num_steps)]
        self.step_weights = step_weights(cfg.step_weight, self.stds, self.schedule.levels)
        if parts.scorer.one_set and accelerator.num_processes > 1:
            raise ValueError(
                f"reward: got {cfg.reward!r}, which scores all samples as one set, on {accelerator.num_processes} "
                "processes, expected 1"
            )
        self.waiting: list[tuple[list[Batch], Future[list[Scored]]]] = []  # for their scores

    def sample(self, step: int, groups: list[Group]) -> list[Batch]:
        """Images of some groups, in micro-batches, with the stochastic steps on record; handed on to the reward."""
        cfg = self.cfg
        steps = [i for i in self.window(step) if self.stds[i] > 0]
        post = None if cfg.ratio_after is None else flash_post_steps(cfg.num_steps, max(steps), cfg.ratio_after)
        samples = [(g, k) for g in groups for k in range(cfg.group_size)]
        batches: list[Batch] = []
        for start in range(0, len(samples), cfg.batch_size):
            chosen = samples[start : start + cfg.batch_size]
            with self.run.stage("rollout"):
                trajectory = rollout(
                    self.parts.generator,
                    [g.prompt for g, _ in chosen],
                    [g.seeds[k] for g, k in chosen],
                    self.transition,
                    sde_steps=steps,
                    noise_seeds=[g.noise_seeds[k] for g, k in chosen],
                    solver=cfg.solver_after,
                    post_steps=post,
                    store_means=cfg.ratio == "guard",
                    grad_mode=cfg.compile,
                )
            batches.append(Batch(trajectory, torch.tensor([g.index for g, _ in chosen])))
            if not self.parts.scorer.whole:
                self.score(batches[-1:])
        if self.parts.scorer.whole:
            self.score(batches)
        return batches

    def score(self, batches: list[Batch]) -> None:
        """Hand batches to the reward; with threads, it works while sampling goes on."""
        images = [b.trajectory.images for b in batches if b.trajectory.images is not None]
        prompts = [prompt for b in batches for prompt in b.trajectory.prompts]
        with self.run.stage("score"):
            ids = torch.cat([b.group_ids for b in batches])
            self.waiting.append((batches, self.parts.scorer.submit(images, prompts, ids)))

    def collect(self) -> None:
        """Wait for the scores of everything that was handed to the reward."""
        with self.run.stage("score"):
            for batches, future in self.waiting:
                for batch, scores in zip(batches, future.result()):
                    batch.scores = scores
        self.waiting = []

    def assign_advantages(self, batches: list[Batch]) -> dict[str, float]:
        """Advantages of all samples of the iteration, from the rewards of all processes; returns what to log."""
        cfg, scorer, device = self.cfg, self.parts.scorer, self.accelerator.device
        self.collect()
        ids = self.accelerator.gather(torch.cat([b.group_ids for b in batches]).to(device)).cpu()
        rows = torch.cat([b.scores.rows for b in batches if b.scores is not None])
        rows = self.accelerator.gather(rows.to(device)).cpu()
        order = torch.argsort(ids, stable=True)  # the same order of summation on any number of processes
        parts, shaped = rows[order, : len(scorer.labels)].T, rows[order, len(scorer.labels) : -1].T
        rewards, advantages = scorer.plain(shaped), torch.empty(len(ids))
        if scorer.gives == "scores":
            relative = group_advantages(rewards, ids[order], std=cfg.advantage_std)
        else:
            relative = scorer.combine(shaped, ids[order])
        advantages[order] = clip_advantages(relative.float(), cfg.max_advantage) * rows[order, -1].float()  # 0: failed
        count = len(ids) // self.accelerator.num_processes
        mine = advantages[self.accelerator.process_index * count :][:count]
        for batch, part in zip(batches, mine.split([len(b.group_ids) for b in batches])):
            batch.advantages = part.to(batch.trajectory.final.device)
        groups = group_statistics(rewards, ids[order])
        self.seen = ids, rewards[torch.argsort(order)]  # in the order of gathering: this process's, then the others'
        named = {f"reward_{k}": v for k, v in zip(scorer.labels, parts.mean(1).tolist())} if len(parts) > 1 else {}
        return {
            "reward_mean": rewards.mean().item(),
            "reward_std_in_group": groups.stds.mean().item(),
            "zero_std_groups": groups.zero_std_fraction,
            "advantage_abs_mean": advantages.abs().mean().item(),
            "failed_scores": int((rows[:, -1] == 0).sum()),
            **named,
        }

    def steps_to_train(self, step: int, stored: list[int]) -> list[int]:
        """The recorded steps that get a gradient in this iteration."""
        kept = trained_steps(stored, self.cfg.share_trained) if len(stored) > 1 else stored
        if self.cfg.timestep_choice == "first":
            return kept
        generator = torch.Generator().manual_seed(derived_seed(self.cfg.seed, 5, step))
        chosen = torch.randperm(len(stored), generator=generator)[: len(kept)]
        return sorted(stored[i] for i in chosen)

    def backward(self, batch: Batch, steps: list[int], scale: float) -> dict[str, Tensor]:
        """Add the gradient of a micro-batch: one pipeline call, backward in each trained step. Returns sums to log."""
        cfg, trajectory, advantages = self.cfg, batch.trajectory, batch.advantages
        assert advantages is not None
        if cfg.skip_zero_advantages and cfg.kl_weight == 0 and bool((advantages == 0).any()):
            rows = advantages.nonzero().flatten().tolist()
            if not rows:
                return {}
            trajectory, advantages = trajectory.take(rows), advantages[rows]
        states = {i: trajectory.latents[i] for i in steps}
        references: dict[int, Tensor] = {}
        if cfg.kl_weight:
            with self.parts.policy.reference():
                self._forward(trajectory, states, lambda i, _x, prediction: references.update({i: prediction}))
        sums: dict[str, Tensor] = {}

        def learn(i: int, _latents: Tensor, prediction: Tensor) -> None:
            loss, stats = self.loss(trajectory, i, prediction, advantages, references.get(i))
            (loss.sum() * scale).backward()
            for name, value in stats.items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value * len(advantages)

        self._forward(trajectory, states, learn)
        sums["count"] = torch.tensor(float(len(steps) * len(advantages)), device=advantages.device)
        return sums

    def _forward(self, trajectory: Trajectory, states: dict[int, Tensor], step_fn: Any) -> None:
        self.parts.generator.denoise(trajectory.prompts, trajectory.seeds, step_fn, latents=states)

    def loss(
        self, trajectory: Trajectory, i: int, prediction: Tensor, advantages: Tensor, reference: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss (N,) of one step and its statistics."""
        cfg, std = self.cfg, self.stds[i]
        gaussian = recompute(trajectory, i, prediction, self.transition)
        log_prob, old = gaussian.log_prob(trajectory.next_latents[i]), trajectory.log_probs[i]
        if cfg.ratio == "guard":
            log_ratio = ratio_norm_log_ratio(log_prob, old, gaussian.mean, trajectory.means[i], std)
        else:
            log_ratio = (log_prob - old) * (2 * std**2 if cfg.ratio == "unscaled" else 1.0)
        loss, stats = clipped_loss(log_ratio, advantages, cfg.clip_range)
        loss = loss * self.step_weights[i]
        if reference is not None:
            base = recompute(trajectory, i, reference, self.transition)
            sigma, sigma_next = self.schedule.step(i)
            kl = kl_penalty(
                cfg.kl_type,
                gaussian,
                base,
                dt=sigma_next - sigma if cfg.kl_type == "flow_grpo" else None,
                prediction=prediction if cfg.kl_type == "v" else None,
                ref_prediction=reference if cfg.kl_type == "v" else None,
            )
            loss = loss + cfg.kl_weight * kl
            stats["kl"] = kl.detach().mean()
        return loss, stats

    def update(self, step: int, shares: list[list[Batch]]) -> dict[str, float]:
        """All optimiser updates of an iteration; returns what to log."""
        sums: dict[str, Tensor] = {}
        norms = []
        for _ in range(self.cfg.inner_epochs):
            for share in shares:
                total = self.cfg.prompts_per_step // self.cfg.updates_per_step * self.cfg.group_size
                with self.run.stage("train"):
                    for batch in share:
                        steps = self.steps_to_train(step, batch.trajectory.steps)
                        for name, value in self.backward(batch, steps, 1 / (total * len(steps))).items():
                            sums[name] = sums.get(name, 0) + value
                    norms.append(self.parts.apply_gradients(self.accelerator, step))
        names = ["ratio_mean", "approx_kl", "clip_fraction", "clip_fraction_positive", "clip_fraction_negative"]
        names += ["kl"] if self.cfg.kl_weight else []
        norm = max((n for n in norms if math.isfinite(n)), default=math.nan)
        means = mean_over_processes(self.accelerator, sums, names)
        return {**means, "grad_norm": norm, "skipped_updates": self.parts.skipped}


def main(cfg: Config) -> Path:
    """Train; returns the run folder."""
    plan = preflight.make_plan(cfg, "flow_grpo")
    preflight.check_kind(cfg.model, preflight.kind_of_folder(plan.model), ["flow"])
    accelerator = Accelerator()
    preflight.check_shares(cfg.prompts_per_step // cfg.updates_per_step, accelerator)
    plan.folder = setup.same_on_all(plan.folder)
    parts = setup.build(cfg, plan, accelerator)
    run = Run(plan.folder, main=accelerator.is_main_process, total=cfg.steps, done=parts.step)
    try:
        train(cfg, plan, accelerator, parts, run)
    finally:
        parts.scorer.close()
        run.close()
    accelerator.end_training()
    return plan.folder


def train(cfg: Config, plan: preflight.Plan, accelerator: Accelerator, parts: setup.Parts, run: Run) -> None:
    """The loop, between the evaluation before and the one after."""
    trainer = FlowGRPO(cfg, accelerator, run, parts)
    if accelerator.is_main_process:
        save_config(replace(cfg, resume=None), plan.folder / "config.yaml")
    outcome.announce(run, cfg, plan, parts)
    if parts.before is None:
        parts.before = setup.evaluate_average(run, cfg, parts, accelerator, plan.eval_prompts)
        outcome.say_evaluation(run, parts.before, "before")
        run.log(0, outcome.evaluation_values(parts.before))
    share_size = cfg.prompts_per_step // cfg.updates_per_step
    with run.progress:
        for step in range(parts.step, cfg.steps):
            started = time.monotonic()
            groups = iteration_groups(
                plan.prompts, step, cfg.prompts_per_step, cfg.group_size, cfg.seed, cfg.same_latents
            )
            # Sample and score: in the shares of the updates, whole groups on this process.
            shares = []
            for k in range(0, len(groups), share_size):
                mine = share_of(groups[k : k + share_size], accelerator.process_index, accelerator.num_processes)
                shares.append(trainer.sample(step, mine))
            values = trainer.assign_advantages([batch for share in shares for batch in share])
            values |= trainer.update(step, shares)
            drawn = [b.trajectory for share in shares for b in share]
            shown = [(t.images, t.prompts) for t in drawn if t.images is not None]
            values |= watch(run, parts, step + 1, shown, *trainer.seen, values.get("kl"))
            parts.after_step(step + 1, time.monotonic() - started, cfg.prompts_per_step * cfg.group_size)
            if cfg.eval_every and (step + 1) % cfg.eval_every == 0:  # also when stopping: as the unbroken run
                evaluation = setup.evaluate_average(run, cfg, parts, accelerator, plan.eval_prompts[: cfg.eval_during])
                values |= outcome.evaluation_values(evaluation)
                watch_evaluation(run, parts, step + 1, evaluation, values)
                setup.keep_best(parts, evaluation)
            stop = setup.stopping(run, accelerator)
            run.log(step + 1, {**values, "learning_rate": parts.learning_rate(step)})
            if step % max(1, cfg.steps // 10) == 0:
                run.save_grid(f"step-{step + 1}.png", shown[0][0][:16])
            # After the log: what a kill in between leaves in it is dropped at resume, and written again.
            setup.checkpoint(run, cfg, parts, accelerator, last=stop or step + 1 == cfg.steps)
            run.advance(step + 1, f"reward {values['reward_mean']:.3f}")
            if stop:
                run.say(f"stopped after step {step + 1} of {cfg.steps}; go on with --resume {plan.folder}")
                break
        if parts.step == cfg.steps or run.stopping == WATCH:
            if run.stopping == WATCH and cfg.monitor == "rollback":
                roll_back(run, parts)
            after = setup.evaluate_average(run, cfg, parts, accelerator, plan.eval_prompts)
            outcome.finish(run, cfg, plan, parts, after)


def cli(argv: list[str] | None = None) -> None:
    cfg = parse_config(Config, argv, prog="flow_grpo", description=(__doc__ or "").split("\n\n")[0])
    outcome.run_or_say(lambda: main(cfg), "flow_grpo")


if __name__ == "__main__":
    cli()
