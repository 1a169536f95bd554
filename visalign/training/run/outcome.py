"""What a training run tells its user: at the start, at evaluations and at the end."""

import math
from typing import Any

from torch import Tensor

from visalign.statistics.bootstrap import Interval, paired_interval
from visalign.training.before.options import CommonConfig
from visalign.training.before.preflight import Plan
from visalign.training.loop.evaluate import Evaluation
from visalign.training.loop.setup import TrainState

from .folder import Run, peak_memory
from .report import write_report, write_summary


def announce(run: Run, cfg: CommonConfig, plan: Plan, state: TrainState) -> None:
    trained = sum(p.numel() for p in state.policy.trained.values())
    run.say(
        f"{cfg.model}: {trained:,} trained parameters ({'LoRA' if cfg.lora_rank else 'all'}), "
        f"attention {state.attention}, "
        f"reward {cfg.reward}, {len(plan.prompts)} prompts, {len(plan.eval_prompts)} held out; run folder {plan.folder}"
    )
    for warning in plan.warnings:
        run.say(f"warning: {warning}")
    if state.step:
        run.say(f"resumed at step {state.step} of {cfg.steps}")


def evaluation_values(evaluation: Evaluation) -> dict[str, float]:
    return {f"eval_{name}": evaluation.mean(name) for name in evaluation.scores}


def say_rounding(run: Run, cfg: CommonConfig, values: dict[str, Any]) -> None:
    """Say, once, where rounding alone moves the ratios of later updates by more than a tenth of the clip range."""
    rounding, clip_range = values.get("log_prob_rounding", 0.0), getattr(cfg, "clip_range", None) or math.inf
    if rounding > 0.1 * clip_range and not run.said_rounding:
        run.said_rounding = True
        run.say(
            f"warning: with the same weights log-probabilities differ by up to {rounding:.1e} between sampling and "
            f"training (clip_range {clip_range:g}): rounding, by {cfg.dtype} or another batch. The first update is not "
            "touched by it; for more updates an iteration take inner_epochs rather than updates_per_step"
        )


def say_evaluation(run: Run, evaluation: Evaluation, title: str) -> None:
    """Print every judge's mean with its interval, and save the pictures."""
    means = []
    for name in evaluation.scores:
        low, high = evaluation.interval(name)
        failed = len(evaluation.prompts) - len(evaluation.known(name))
        means.append(
            f"{name} {evaluation.mean(name):.4f} [{low:.4f}, {high:.4f}]" + f" ({failed} failed)" * bool(failed)
        )
    run.say(f"{title}: {', '.join(means)} on {len(evaluation.prompts)} held-out prompts")
    run.save_grid(f"{title}.png", evaluation.images)


def finish(
    run: Run,
    cfg: CommonConfig,
    plan: Plan,
    state: TrainState,
    after: Evaluation,
    values: dict[str, Tensor],
) -> None:
    """The weights `values`, summary.json, report.html, and the last lines on the screen. Main process only."""
    assert state.before is not None
    say_evaluation(run, after, "after")
    run.log(state.step, evaluation_values(after))
    if not run.main:
        return
    state.policy.export(run.folder / "lora" if cfg.lora_rank else run.folder / "weights", values)
    summary: dict[str, Any] = {}
    for name, before in state.before.scores.items():
        gains = after.scores[name] - before
        gains = gains[gains.isfinite()]  # of pictures that could be scored both times
        gain = paired_interval(gains.numpy()) if len(gains) else Interval(math.nan, math.nan, math.nan)
        summary |= {
            f"{name}_before": state.before.mean(name),
            f"{name}_before_interval": state.before.interval(name),
            f"{name}_after": after.mean(name),
            f"{name}_after_interval": after.interval(name),
            f"{name}_gain": gain.mean,
            f"{name}_gain_interval": (gain.low, gain.high),
        }
    summary |= {
        "num_prompts": len(after.prompts),
        "train_seconds": state.train_seconds,
        "images_sampled": state.images_sampled,
        "skipped_updates": state.skipped,
        "findings": sorted(state.monitor.raised) if state.monitor else [],
        "peak_memory_bytes": peak_memory(),
        **{name: value for name, value in state.extra.items() if isinstance(value, int | float)},
    }
    write_summary(run.folder, summary)
    report = write_report(run.folder, summary)
    for name in state.before.scores:
        low, high = summary[f"{name}_gain_interval"]
        run.say(
            f"{name}: {summary[f'{name}_before']:.4f} -> {summary[f'{name}_after']:.4f} "
            f"(gain {summary[f'{name}_gain']:+.4f}, 95 % interval {low:+.4f} to {high:+.4f})"
        )
    run.say(f"trained {state.train_seconds:.0f} s on {state.images_sampled} images; look at {report}")
