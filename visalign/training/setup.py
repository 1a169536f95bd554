"""What every trainer does around its loop: options, checks before anything loads, building, checkpoints, finishing."""

import hashlib
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from visalign.generator import Generator
from visalign.rewards import make_reward, parse_spec, score
from visalign.worlds import resolve_model
from visalign.worlds.shapes import world_prompts
from visalign.worlds.shapes.captions import parse

from . import checkpoint as ckpt
from .attention import NAMES, set_attention
from .data import overlap, read_prompts, share_of
from .evaluate import Evaluation, paired_interval
from .optimization import apply_gradients, learning_rate
from .policy import Average, Policy, check_lora_fits, check_same_names, load_lora
from .report import write_report, write_summary
from .run import Run, check_writable, peak_memory

FREE_ON_RESUME = (
    *("steps", "resume", "run_dir", "save_every", "keep", "eval_every", "eval_during"),
    *("batch_size", "attention", "compile", "gradient_checkpointing", "release_text_encoders"),
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class CommonConfig:
    """Options of every trainer."""

    # Model
    model: str = "shapes-flow"  # a shipped model, a diffusers folder, or a hub id
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the frozen weights
    guidance_scale: float | None = None  # in sampling and training; None: the model folder's own; 1: off
    height: int | None = None  # pixels; None: the model's own
    width: int | None = None
    attention: str = "auto"  # auto, sdpa, flash, flash3 or xformers
    compile: bool = False  # torch.compile the denoiser's blocks
    gradient_checkpointing: bool = False
    release_text_encoders: bool = False  # encode all prompts first, then free the encoders' memory
    # What is trained
    lora_rank: int = 32  # 0: all weights of the denoiser
    lora_alpha: float | None = None  # None: 2 * lora_rank
    lora_targets: list[str] | None = None  # None: attention; ["all-linear"]: every linear layer
    lora: str | None = None  # start from this LoRA folder
    # Reward
    reward: str = "clip"  # name, module:attribute, file.py:attribute, or a sum such as clip:0.7+aesthetic:0.3
    judges: str = "auto"  # rewards that are only watched, joined by commas; auto: gold where the world has one
    # Prompts
    prompts: str = "shapes"  # a text file, one prompt a line, or shapes
    eval_prompts: str | None = None  # None: held-out captions of shapes, or the last tenth of the file
    eval_count: int = 200  # held-out prompts
    eval_during: int = 48  # of them, in evaluations under way
    eval_every: int = 0  # steps between evaluations under way; 0: only before and after
    eval_seed: int = 1234
    # Optimisation
    steps: int = 20  # iterations of sample, score, learn
    batch_size: int = 32  # images in one forward
    learning_rate: float = 1e-4
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    ema_decay: float = 0.9
    seed: int = 0
    # Run
    run_dir: str | None = None  # None: runs/<trainer>-<time>
    resume: str | None = None  # a run folder, or one of its step-N folders
    save_every: int = 1  # steps between checkpoints
    keep: int = 2  # newest checkpoints kept, beside the best and the last

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "learning_rate", "eval_count", "eval_during", "save_every", "keep"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected > 0")
        for name in ("lora_rank", "warmup_steps", "eval_every", "max_grad_norm", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected >= 0")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay: got {self.ema_decay}, expected within [0, 1)")
        if self.lora is not None and not self.lora_rank:
            raise ValueError(f"lora: got {self.lora!r} with lora_rank 0, expected the rank it was trained with")
        if self.attention not in ("auto", *NAMES):
            raise ValueError(f"attention: got {self.attention!r}, expected one of {['auto', *NAMES]}")


@dataclass
class Plan:
    """What the checks before loading found. `digest` is of the prompts: a resumed run must have the same."""

    model: str
    folder: Path
    prompts: list[str]
    eval_prompts: list[str]
    judges: dict[str, str]  # column: spec
    resume: Path | None = None
    warnings: list[str] = field(default_factory=list)
    digest: str = ""


@dataclass
class Parts:
    """What is built of the plan, and how far the run has come."""

    generator: Generator
    policy: Policy
    average: Average
    optimizer: torch.optim.Optimizer
    score: Callable[[Tensor, list[str]], Tensor]
    judges: dict[str, Callable[[Tensor, list[str]], Tensor]]
    learning_rate: Callable[[int], float]
    attention: str
    max_grad_norm: float
    digest: str
    step: int = 0
    skipped: int = 0
    train_seconds: float = 0.0
    images_sampled: int = 0
    best: tuple[float, int] | None = None
    before: Evaluation | None = None

    def apply_gradients(self, accelerator: Accelerator, step: int) -> float:
        """One optimiser update and one of the average, unless a gradient is not finite; returns the gradient norm."""
        norm, applied = apply_gradients(accelerator, self.optimizer, self.learning_rate(step), self.max_grad_norm)
        if applied:
            self.average.update()
        else:
            self.skipped += 1
        return norm

    def after_step(self, step: int, seconds: float, images: int) -> None:
        self.step, self.train_seconds = step, self.train_seconds + seconds
        self.images_sampled += images


def preflight(cfg: CommonConfig, trainer: str = "flow_grpo") -> Plan:
    """Check everything that can be checked before a model loads.

    Raises:
        ValueError: one line that names the option, what was given and what is accepted.
    """
    model = resolve_model(cfg.model)
    parse_spec(cfg.reward)
    resume = None if cfg.resume is None else ckpt.find_checkpoint(Path(cfg.resume))
    folder = Path(
        cfg.run_dir or (resume.parent.parent if resume else f"runs/{trainer}-{time.strftime('%Y%m%d-%H%M%S')}")
    )
    prompts, held_out = read_sets(cfg)
    warnings = []
    if shared := overlap(prompts, held_out):
        warnings.append(f"{len(shared)} of {len(held_out)} evaluation prompts also stand in the training set")
    digest = hashlib.blake2b("\n".join([*prompts, "", *held_out]).encode(), digest_size=8).hexdigest()
    if cfg.lora:
        check_lora_fits(Path(cfg.lora), Path(model), cfg.lora_rank, alpha_of(cfg))
    judges = judge_specs(cfg, held_out)
    if resume is not None:
        check_same_run(cfg, digest, resume, ckpt.load_checkpoint(resume)[1])
    check_writable(folder, resume is not None)
    return Plan(model, folder, prompts, held_out, judges, resume, warnings, digest)


def alpha_of(cfg: CommonConfig) -> float:
    """LoRA's alpha."""
    return 2.0 * cfg.lora_rank if cfg.lora_alpha is None else cfg.lora_alpha


def check_same_run(cfg: CommonConfig, digest: str, path: Path, state: dict[str, Any]) -> None:
    """Raise ValueError for other prompts than the resumed run's, or another option that changes what it learns."""
    for name, value in state["config"].items():
        if name in FREE_ON_RESUME or not hasattr(cfg, name):
            continue
        now = getattr(cfg, name)
        if (list(now) if isinstance(now, tuple) else now) != value:
            raise ValueError(f"{name}: got {now!r}, expected {value!r}, as in the run that is resumed ({path})")
    if state.get("prompts") != digest:
        raise ValueError(f"prompts: {cfg.prompts!r} does not hold the prompts of the run that is resumed ({path})")


def read_sets(cfg: CommonConfig) -> tuple[list[str], list[str]]:
    """Training and held-out prompts."""
    if cfg.prompts == "shapes":
        prompts, held_out = world_prompts("train", 2000), world_prompts("test", cfg.eval_count)
    else:
        prompts = read_prompts(cfg.prompts)
        cut = max(1, len(prompts) // 10)
        if cfg.eval_prompts is None and len(prompts) < 2:
            raise ValueError(f"prompts: got 1 prompt in {cfg.prompts!r}, expected more, or eval_prompts beside it")
        prompts, held_out = (prompts, []) if cfg.eval_prompts else (prompts[:-cut], prompts[-cut:])
    if cfg.eval_prompts is not None:
        held_out = (
            world_prompts("test", cfg.eval_count) if cfg.eval_prompts == "shapes" else read_prompts(cfg.eval_prompts)
        )
    return prompts, held_out[: cfg.eval_count]


def judge_specs(cfg: CommonConfig, prompts: list[str]) -> dict[str, str]:
    """Columns of the evaluation beside the reward itself."""
    if cfg.judges != "auto":
        names = [name.strip() for name in cfg.judges.split(",") if name.strip()]
        for name in names:
            parse_spec(name)
        return {name.replace(":", "_"): name for name in names}
    try:
        for prompt in prompts:
            parse(prompt)
    except ValueError:
        return {}
    return {"gold_strict": "gold"}


def build(cfg: CommonConfig, plan: Plan, accelerator: Accelerator) -> Parts:
    """Load the model and the rewards, add what is trained, and put a checkpoint back if the plan has one."""
    sizes = {name: getattr(cfg, name) for name in ("height", "width") if getattr(cfg, name) is not None}
    steps = getattr(cfg, "num_steps", None)
    generator = Generator.from_pretrained(
        plan.model,
        dtype=DTYPES[cfg.dtype],
        device=accelerator.device,
        num_steps=steps,
        guidance_scale=cfg.guidance_scale,
        **sizes,
    )
    generator.noise(plan.prompts[:1], [0])  # learns which modules denoise, and refuses a pipeline that does not fit
    attention = set_attention(generator.denoiser, cfg.attention)
    policy = Policy(
        generator,
        cfg.lora_rank,
        alpha_of(cfg),
        cfg.lora_targets,
        cfg.gradient_checkpointing,
        cfg.seed,
    )
    if cfg.lora:
        load_lora(policy, Path(cfg.lora))
    if cfg.compile:
        policy.module.compile_repeated_blocks(fullgraph=False)
    if cfg.release_text_encoders:
        texts = list(dict.fromkeys([*plan.prompts, *plan.eval_prompts]))
        for start in range(0, len(texts), cfg.batch_size):
            generator.noise(texts[start : start + cfg.batch_size], [0] * len(texts[start : start + cfg.batch_size]))
        generator.release_text_encoders()
    optimizer = torch.optim.AdamW(policy.trained.values(), lr=cfg.learning_rate, weight_decay=cfg.weight_decay)
    parts = Parts(
        generator,
        policy,
        Average(policy, cfg.ema_decay),
        optimizer,
        _scorer(cfg.reward, accelerator),
        {},
        lambda step: learning_rate(step, cfg.steps, cfg.learning_rate, cfg.warmup_steps, cfg.schedule),
        attention,
        cfg.max_grad_norm,
        plan.digest,
    )
    parts.judges = {"reward": parts.score}
    for column, spec in plan.judges.items():
        options = {"strict": True} if column == "gold_strict" else {}
        parts.judges[column] = _scorer(spec, accelerator, **options)
    if plan.resume is not None:
        restore(plan.resume, parts)
    return parts


def _scorer(spec: str, accelerator: Accelerator, **options: Any) -> Callable[[Tensor, list[str]], Tensor]:
    reward = make_reward(spec, **options)
    if hasattr(reward, "to"):
        reward.to(accelerator.device)

    def scores(images: Tensor, prompts: list[str]) -> Tensor:
        with torch.no_grad():
            return score(reward, images, prompts).total

    return scores


def restore(path: Path, parts: Parts) -> None:
    """Put a checkpoint back: weights, average, optimiser, place in the run. All else follows from seed and step."""
    tensors, state = ckpt.load_checkpoint(path)
    device = next(iter(parts.policy.trained.values())).device
    parts.policy.load({k: v.to(device) for k, v in tensors["trained"].items()})
    check_same_names("resume", {k: tuple(v.shape) for k, v in tensors["ema"].items()}, parts.policy.trained)
    parts.average.values = {k: v.to(device) for k, v in tensors["ema"].items()}
    parts.average.updates = state["ema_updates"]
    ckpt.load_optimizer(parts.optimizer, tensors["optimizer"])
    parts.step, parts.skipped = state["step"], state["skipped"]
    parts.train_seconds, parts.images_sampled = state["train_seconds"], state["images_sampled"]
    parts.best = tuple(state["best"]) if state["best"] else None
    before = {k: v.double() for k, v in tensors.get("before", {}).items()}
    parts.before = Evaluation(state["before_prompts"], before) if before else None


def checkpoint(run: Run, cfg: CommonConfig, parts: Parts, accelerator: Accelerator, last: bool) -> None:
    """Save where due: every `save_every` steps, at the best so far, and at the last; prune."""
    best = parts.best is not None and parts.best[1] == parts.step
    if not (last or best or parts.step % cfg.save_every == 0):
        return
    if accelerator.is_main_process:
        with run.stage("checkpoint"):
            before = parts.before.scores if parts.before else {}
            ckpt.save_checkpoint(
                run.folder / "checkpoints",
                parts.step,
                {
                    "trained": parts.policy.tensors(),
                    "ema": parts.average.values,
                    "optimizer": ckpt.optimizer_tensors(parts.optimizer),
                    "before": before,
                },
                {
                    "config": asdict(cfg),
                    "prompts": parts.digest,
                    "skipped": parts.skipped,
                    "train_seconds": parts.train_seconds,
                    "images_sampled": parts.images_sampled,
                    "best": parts.best,
                    "ema_updates": parts.average.updates,
                    "before_prompts": parts.before.prompts if parts.before else [],
                },
            )
            always = {parts.best[1]} if parts.best else set()
            ckpt.prune(run.folder / "checkpoints", cfg.keep, always, newest=parts.step)
    accelerator.wait_for_everyone()


def stopping(run: Run, accelerator: Accelerator) -> bool:
    """Whether any process was asked to stop; the same answer on all."""
    flags = accelerator.gather(torch.tensor([run.stopping is not None], device=accelerator.device))
    return bool(flags.any())


def keep_best(parts: Parts, evaluation: Evaluation) -> None:
    """Remember the step with the highest held-out reward, whose checkpoint is then kept."""
    value = evaluation.mean("reward")
    if parts.best is None or value > parts.best[0]:
        parts.best = (value, parts.step)


def check_shares(prompts: int, accelerator: Accelerator) -> None:
    """Refuse a number of prompts per update that the processes cannot share in whole groups."""
    share_of([None] * prompts, accelerator.process_index, accelerator.num_processes)


def run_or_say(train: Callable[[], Any], prog: str) -> None:
    """Run a trainer's main; a mistake, or a failed reward, ends with one line on stderr and exit status 2."""
    try:
        train()
    except (ValueError, OSError) as error:
        print(f"{prog}: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"{prog}: stopped at once; the last checkpoint is whole, go on with --resume", file=sys.stderr)
        raise SystemExit(130) from None


def same_on_all(folder: Path) -> Path:
    """The main process's run folder, on every process."""
    names = [str(folder)]
    broadcast_object_list(names)
    return Path(names[0])


def evaluation_values(evaluation: Evaluation) -> dict[str, float]:
    return {f"eval_{name}": evaluation.mean(name) for name in evaluation.scores}


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


def say_evaluation(run: Run, evaluation: Evaluation, title: str) -> None:
    """Print every judge's mean with its interval, and save the pictures."""
    parts = []
    for name in evaluation.scores:
        low, high = evaluation.interval(name)
        parts.append(f"{name} {evaluation.mean(name):.4f} [{low:.4f}, {high:.4f}]")
    run.say(f"{title}: {', '.join(parts)} on {len(evaluation.prompts)} held-out prompts")
    run.save_grid(f"{title}.png", evaluation.images)


def finish(run: Run, cfg: CommonConfig, plan: Plan, parts: Parts, after: Evaluation) -> None:
    """The LoRA, summary.json, report.html, and the last lines on the screen. Main process only."""
    assert parts.before is not None
    say_evaluation(run, after, "after")
    run.log(parts.step, evaluation_values(after))
    if not run.main:
        return
    parts.policy.export(run.folder / "lora" if cfg.lora_rank else run.folder / "weights", parts.average.values)
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
        "peak_memory_bytes": peak_memory(),
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
