"""What a training run tells its user: at the start, at evaluations, at the end, and when it fails."""

import sys
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from visalign.training.before.config import parse_config
from visalign.training.before.options import CommonConfig
from visalign.training.before.preflight import Plan
from visalign.training.loop.evaluate import Evaluation, paired_interval
from visalign.training.loop.setup import Parts

from .folder import Run, peak_memory
from .report import write_report, write_summary

C = TypeVar("C")


def announce(run: Run, cfg: CommonConfig, plan: Plan, parts: Parts) -> None:
    trained = sum(p.numel() for p in parts.policy.trained.values())
    run.say(
        f"{cfg.model}: {trained:,} trained parameters ({'LoRA' if cfg.lora_rank else 'all'}), "
        f"attention {parts.attention}, "
        f"reward {cfg.reward}, {len(plan.prompts)} prompts, {len(plan.eval_prompts)} held out; run folder {plan.folder}"
    )
    for warning in plan.warnings:
        run.say(f"warning: {warning}")
    if parts.step:
        run.say(f"resumed at step {parts.step} of {cfg.steps}")


def evaluation_values(evaluation: Evaluation) -> dict[str, float]:
    return {f"eval_{name}": evaluation.mean(name) for name in evaluation.scores}


def say_evaluation(run: Run, evaluation: Evaluation, title: str) -> None:
    """Print every judge's mean with its interval, and save the pictures."""
    parts = []
    for name in evaluation.scores:
        low, high = evaluation.interval(name)
        parts.append(f"{name} {evaluation.mean(name):.4f} [{low:.4f}, {high:.4f}]")
    run.say(f"{title}: {', '.join(parts)} on {len(evaluation.prompts)} held-out prompts")
    run.save_grid(f"{title}.png", evaluation.images)


def finish(
    run: Run,
    cfg: CommonConfig,
    plan: Plan,
    parts: Parts,
    after: Evaluation,
    values: dict[str, Tensor],
) -> None:
    """The weights `values`, summary.json, report.html, and the last lines on the screen. Main process only."""
    assert parts.before is not None
    say_evaluation(run, after, "after")
    run.log(parts.step, evaluation_values(after))
    if not run.main:
        return
    parts.policy.export(run.folder / "lora" if cfg.lora_rank else run.folder / "weights", values)
    summary: dict[str, Any] = {}
    for name, before in parts.before.scores.items():
        summary |= {
            f"{name}_before": parts.before.mean(name),
            f"{name}_before_interval": parts.before.interval(name),
            f"{name}_after": after.mean(name),
            f"{name}_after_interval": after.interval(name),
            f"{name}_gain_interval": paired_interval(before, after.scores[name]),
        }
    summary |= {
        "num_prompts": len(after.prompts),
        "train_seconds": parts.train_seconds,
        "images_sampled": parts.images_sampled,
        "skipped_updates": parts.skipped,
        "findings": sorted(parts.monitor.raised) if parts.monitor else [],
        "peak_memory_bytes": peak_memory(),
        **{name: value for name, value in parts.extra.items() if isinstance(value, int | float)},
    }
    write_summary(run.folder, summary)
    report = write_report(run.folder, summary)
    for name, before in parts.before.scores.items():
        low, high = summary[f"{name}_gain_interval"]
        run.say(
            f"{name}: {summary[f'{name}_before']:.4f} -> {summary[f'{name}_after']:.4f} "
            f"(gain {float((after.scores[name] - before).mean()):+.4f}, 95 % interval {low:+.4f} to {high:+.4f})"
        )
    run.say(f"trained {parts.train_seconds:.0f} s on {parts.images_sampled} images; look at {report}")


def launch(train: Callable[[C], Any], config: type[C], argv: list[str] | None, prog: str, text: str | None) -> None:
    """A trainer's command line: its options, then the training. The first paragraph of `text` describes it.

    A mistake, or a failed reward, ends with one line on stderr and exit status 2.
    """
    cfg = parse_config(config, argv, prog=prog, description=(text or "").split("\n\n")[0])
    try:
        train(cfg)
    except (ValueError, OSError) as error:
        print(f"{prog}: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"{prog}: stopped at once; the last checkpoint is whole, go on with --resume", file=sys.stderr)
        raise SystemExit(130) from None
