"""`visalign doctor`: everything that goes wrong silently in such trainings, looked for before one is paid for."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator

from visalign.objectives.policy_gradient import kl_penalty
from visalign.rewards import make_reward, score
from visalign.sampling.rollout import Trajectory, recompute, rollout
from visalign.training.loop import setup
from visalign.training.run.folder import peak_memory
from visalign.transitions import make_transition

from . import preflight


@dataclass(frozen=True)
class Finding:
    """One check: what was looked at, whether it is as it must be, and what was measured."""

    name: str
    good: bool
    measured: str


def examine(cfg: Any) -> Iterator[Finding]:
    """Run the checks on a small batch of the configured training. `cfg` is a trainer's Config with a flow sampler.

    Raises:
        ValueError: what `make_plan` refuses.
    """
    plan = preflight.make_plan(replace(cfg, run_dir=None, resume=None))
    yield _prompts(plan)
    state = setup.build(cfg, plan, Accelerator())
    generator = state.generator
    transition = make_transition(cfg.sampler, eta=cfg.eta)
    schedule = generator.schedule
    steps = [i for i in range(schedule.num_steps) if transition.std(schedule, i) > 0]
    count = min(4, cfg.batch_size, cfg.group_size)
    prompts, seeds = (plan.prompts * count)[:count], list(range(count))
    trajectory = rollout(generator, prompts, seeds, transition, sde_steps=steps, grad_mode=cfg.compile)
    assert trajectory.images is not None
    yield _ratio(state, trajectory, transition, cfg.clip_range)
    yield _kl_gradient(state, trajectory, transition)
    yield _batch_scores(cfg.reward, state, trajectory)
    images = bool(trajectory.images.isfinite().all())
    yield Finding(
        "images", images, "all pixels finite" if images else "NaN in the decoded images: decode in fp32 or bf16"
    )
    trained = sum(p.numel() for p in state.policy.trained.values())
    yield Finding("memory", True, f"{peak_memory() / 2**30:.2f} GiB at batch {count}, {state.attention} attention")
    yield Finding(
        "disk", True, f"{16 * trained * (cfg.keep + 2) / 2**30:.2f} GiB of checkpoints, {trained:,} parameters"
    )


def _prompts(plan: preflight.Plan) -> Finding:
    repeated = len(plan.prompts) - len(set(plan.prompts))
    counts = f"{len(plan.prompts)} for training ({repeated} repeated), {len(plan.eval_prompts)} held out"
    return Finding("prompts", not plan.warnings, "; ".join([counts, *plan.warnings]))


def _ratio(state: setup.TrainState, trajectory: Trajectory, transition: Any, clip_range: float) -> Finding:
    """The ratio of the policy to itself, at every stochastic step."""
    worst: list[torch.Tensor] = []

    def compare(i: int, _latents: torch.Tensor, prediction: torch.Tensor) -> None:
        log_prob = recompute(trajectory, i, prediction.detach(), transition).log_prob(trajectory.next_latents[i])
        worst.append((log_prob - trajectory.log_probs[i]).abs().max())

    state.generator.denoise(trajectory.prompts, trajectory.seeds, compare, latents=trajectory.latents)
    ratio = torch.stack(worst).max().exp().item() - 1
    good = ratio <= min(1e-6, 0.1 * clip_range)
    return Finding(
        "ratio", good, f"differs from 1 by at most {ratio:.1e} over {len(worst)} steps (clip {clip_range:g})"
    )


def _kl_gradient(state: setup.TrainState, trajectory: Trajectory, transition: Any) -> Finding:
    """The KL to the reference has a gradient once the policy has moved, and is zero before."""
    step = trajectory.steps[len(trajectory.steps) // 2]
    policy, latents = state.policy, trajectory.latents[step]
    with policy.reference():
        base = state.generator.predict(latents, step, trajectory.prompts, trajectory.seeds)
    generator = torch.Generator().manual_seed(0)
    moved = {
        name: p + 0.01 * torch.randn(p.shape, generator=generator).to(p.device) for name, p in policy.tensors().items()
    }
    with policy.swapped(moved):
        prediction = state.generator.predict(latents, step, trajectory.prompts, trajectory.seeds)
        now, then = (recompute(trajectory, step, v, transition) for v in (prediction, base))
        kl = kl_penalty("gaussian", now, then).mean()
        kl.backward()
    norm = sum(float(p.grad.norm()) ** 2 for p in policy.trained.values() if p.grad is not None) ** 0.5
    state.optimizer.zero_grad(set_to_none=True)
    return Finding("KL gradient", norm > 0 and kl.item() > 0, f"norm {norm:.2e} at KL {kl.item():.2e}")


def _batch_scores(spec: str, state: setup.TrainState, trajectory: Trajectory) -> Finding:
    """A batch scores as its pictures do one by one."""
    assert trajectory.images is not None
    reward = make_reward(spec)
    if hasattr(reward, "to"):
        reward.to(trajectory.images.device)
    with torch.no_grad():
        together = score(reward, trajectory.images, trajectory.prompts).total
        alone = torch.cat([score(reward, x[None], [p]).total for x, p in zip(trajectory.images, trajectory.prompts)])
    difference = (together - alone).abs().max().item()
    spread = max(1e-6, alone.abs().max().item())
    return Finding("reward", difference <= 1e-3 * spread, f"{spec}: batch and singles differ by {difference:.1e}")


def cli(argv: list[str]) -> None:
    """Print the findings; exit status 1 if one is bad."""
    from visalign.trainers.flow_grpo import Config

    from .config import parse_config

    if argv and argv[0] == "flow_grpo":
        argv = argv[1:]
    cfg = parse_config(Config, argv, prog="visalign doctor", description="Check a training before it is paid for.")
    bad = 0
    try:
        for finding in examine(cfg):
            bad += not finding.good
            print(f"{'ok ' if finding.good else 'BAD'}  {finding.name}: {finding.measured}", flush=True)
    except (ValueError, OSError) as error:
        print(f"visalign doctor: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    raise SystemExit(1 if bad else 0)
