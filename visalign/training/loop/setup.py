"""The parts of a training run: built from the plan, evaluated, put back from a checkpoint, saved to one."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from visalign.pipeline.generator import Generator
from visalign.rewards import make_reward
from visalign.training.attention import set_attention
from visalign.training.before.options import DTYPES, CommonConfig, alpha_of
from visalign.training.before.preflight import Plan
from visalign.training.policy import Average, Policy, check_same_names, load_lora
from visalign.training.run import checkpoint as ckpt
from visalign.training.run.folder import WATCH, Run
from visalign.training.watch.hacking import MonitorOptions
from visalign.training.watch.monitor import Monitor
from visalign.transitions import sampler_of

from .evaluate import Evaluation, Extras, evaluate
from .optimization import apply_gradients, learning_rate
from .scoring import Scorer


@dataclass
class Parts:
    """What is built of the plan, and how far the run has come."""

    generator: Generator
    policy: Policy
    average: Average
    optimizer: torch.optim.Optimizer
    scorer: Scorer
    judges: dict[str, Callable[..., Tensor]]
    learning_rate: Callable[[int], float]
    attention: str
    max_grad_norm: float
    digest: str
    reward_digest: str
    monitor: Monitor | None = None
    step: int = 0
    skipped: int = 0
    train_seconds: float = 0.0
    images_sampled: int = 0
    best: tuple[float, int] | None = None
    before: Evaluation | None = None
    extra: dict[str, Any] = field(default_factory=dict)  # what a trainer itself carries from step to step, as JSON

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


def build(
    cfg: CommonConfig,
    plan: Plan,
    accelerator: Accelerator,
    inputs: Callable[[Generator], dict[str, Any]] | None = None,
    component: str | None = None,
) -> Parts:
    """Load the model and the rewards, add what is trained, and put a checkpoint back if the plan has one.

    `inputs` gives further arguments of the pipeline's calls, for one prompt, where it cannot do without; `component` is
    the module that is trained, as of `Policy`.
    """
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
    if getattr(generator.pipeline, "safety_checker", None) is not None:
        generator.pipeline.safety_checker = None  # it paints pictures black, and a reward must see what was drawn
    further = inputs(generator) if inputs else {}
    generator.noise(plan.prompts[:1], [0], **further)  # learns which modules denoise; refuses a pipeline that cannot
    attention = set_attention(generator.denoiser, cfg.attention)
    policy = Policy(
        generator,
        cfg.lora_rank,
        alpha_of(cfg),
        cfg.lora_targets,
        cfg.gradient_checkpointing,
        cfg.seed,
        getattr(cfg, "policy", "denoiser"),
        component,
    )
    if cfg.lora:
        load_lora(policy, Path(cfg.lora))
    if cfg.compile:
        cast(Any, generator.denoiser).compile_repeated_blocks(fullgraph=False)
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
        Scorer(make_reward(cfg.reward), accelerator.device, cfg.score_threads, plan.context),
        {},
        lambda step: learning_rate(step, cfg.steps, cfg.learning_rate, cfg.warmup_steps, cfg.schedule),
        attention,
        cfg.max_grad_norm,
        plan.digest,
        plan.reward_digest,
        None if cfg.monitor == "off" else Monitor(MonitorOptions(action=cfg.monitor)),
    )
    parts.judges = {"reward": parts.scorer.evaluate}
    for column, spec in plan.judges.items():
        options = {"strict": True} if column == "gold_strict" else {}
        parts.judges[column] = Scorer(make_reward(spec, **options), accelerator.device, 0, plan.context).evaluate
    if plan.resume is not None:
        restore(plan.resume, parts)
    return parts


def evaluate_with(
    values: dict[str, Tensor],
    run: Run,
    cfg: CommonConfig,
    parts: Parts,
    accelerator: Accelerator,
    prompts: list[str],
    extras: Extras | None = None,
) -> Evaluation:
    """The policy with these weights on held-out prompts, by their usual sampler; the same on any number of processes.

    `extras` as of `evaluate`.
    """
    with run.stage("evaluate"), parts.policy.swapped(values):
        return evaluate(
            parts.generator,
            sampler_of(parts.generator.schedule),
            prompts,
            parts.judges,
            seed=cfg.eval_seed,
            batch_size=cfg.batch_size,
            process=accelerator.process_index,
            processes=accelerator.num_processes,
            gather=lambda t: accelerator.gather(t.to(accelerator.device)),
            extras=extras,
        )


def restore(path: Path, parts: Parts) -> None:
    """Put a checkpoint back: weights, average, optimiser, place in the run. All else follows from seed and step."""
    tensors, state = ckpt.load_checkpoint(path)
    if state.get("base") != parts.policy.base_digest:
        raise ValueError(f"model: its weights are not those that the resumed run was training ({path})")
    device = next(iter(parts.policy.trained.values())).device
    parts.policy.load({k: v.to(device) for k, v in tensors["trained"].items()})
    check_same_names("resume", {k: tuple(v.shape) for k, v in tensors["ema"].items()}, parts.policy.trained)
    parts.average.values = {k: v.to(device) for k, v in tensors["ema"].items()}
    parts.average.updates = state["ema_updates"]
    ckpt.load_optimizer(parts.optimizer, tensors["optimizer"])
    parts.step, parts.skipped = state["step"], state["skipped"]
    parts.train_seconds, parts.images_sampled = state["train_seconds"], state["images_sampled"]
    parts.best = tuple(state["best"]) if state["best"] else None
    if parts.monitor is not None and state.get("monitor"):
        parts.monitor.load_state_dict(state["monitor"])
    parts.extra = state.get("extra", {})
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
                    "reward_file": parts.reward_digest,
                    "base": parts.policy.base_digest,
                    "skipped": parts.skipped,
                    "train_seconds": parts.train_seconds,
                    "images_sampled": parts.images_sampled,
                    "best": parts.best,
                    "ema_updates": parts.average.updates,
                    "monitor": parts.monitor.state_dict() if parts.monitor else None,
                    "extra": parts.extra,
                    "before_prompts": parts.before.prompts if parts.before else [],
                },
            )
            always = {parts.best[1]} if parts.best else set()
            ckpt.prune(run.folder / "checkpoints", cfg.keep, always, newest=parts.step)
    accelerator.wait_for_everyone()


def keep_best(parts: Parts, evaluation: Evaluation) -> None:
    """Remember the step that held-out prompts speak for, whose checkpoint is then kept.

    By the first judge that is only watched, for it is not what the policy may learn to deceive; else by the reward.
    """
    value = evaluation.mean(next((name for name in evaluation.scores if name != "reward"), "reward"))
    if parts.best is None or value > parts.best[0]:
        parts.best = (value, parts.step)


def stopping(run: Run, accelerator: Accelerator) -> bool:
    """Whether any process was asked to stop: the same answer, and if by the hacking watch, WATCH, on all."""
    mine = 0 if run.stopping is None else 2 if run.stopping == WATCH else 1
    said = int(accelerator.gather(torch.tensor([mine], device=accelerator.device)).max())
    if said == 2:
        run.stopping = WATCH
    return bool(said)


def same_on_all(folder: Path) -> Path:
    """The main process's run folder, on every process."""
    names = [str(folder)]
    broadcast_object_list(names)
    return Path(names[0])
