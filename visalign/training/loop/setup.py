"""The state of a training run: built from the plan, evaluated, put back from a checkpoint, saved to one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from visalign.pipeline.generator import Generator
from visalign.rewards import RewardError, make_reward
from visalign.training.attention import compile_blocks, set_attention
from visalign.training.before.options import DTYPES, CommonConfig, alpha_of
from visalign.training.before.preflight import Plan
from visalign.training.policy import Average, Policy, check_same_names, load_lora
from visalign.training.run import checkpoint as ckpt
from visalign.training.run.folder import WATCH, Claim, Run, check_writable
from visalign.training.watch.hacking import MonitorOptions
from visalign.training.watch.monitor import Monitor
from visalign.transitions import sampler_of

from .evaluate import Evaluation, Extras, evaluate
from .optimization import apply_gradients, learning_rate
from .scoring import Scorer

OWN_TENSORS = ("trained", "ema", "optimizer", "before")  # files of a checkpoint; a trainer's groups have other names


@dataclass
class TrainState:
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
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # likewise: an old policy, multipliers, ...

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
) -> TrainState:
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
        compile_blocks(generator.denoiser)
    if cfg.release_text_encoders:
        texts = list(dict.fromkeys([*plan.prompts, *plan.eval_prompts]))
        for start in range(0, len(texts), cfg.batch_size):
            generator.noise(texts[start : start + cfg.batch_size], [0] * len(texts[start : start + cfg.batch_size]))
        generator.release_text_encoders()
    optimizer = torch.optim.AdamW(policy.trained.values(), lr=cfg.learning_rate, weight_decay=cfg.weight_decay)
    state = TrainState(
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
    state.judges = {"reward": state.scorer.evaluate}
    for column, spec in plan.judges.items():
        options = {"strict": True} if column == "gold_strict" else {}
        state.judges[column] = Scorer(make_reward(spec, **options), accelerator.device, 0, plan.context).evaluate
    if plan.resume is not None:
        restore(plan.resume, state)
    return state


def evaluate_with(
    values: dict[str, Tensor],
    run: Run,
    cfg: CommonConfig,
    state: TrainState,
    accelerator: Accelerator,
    prompts: list[str],
    extras: Extras | None = None,
) -> Evaluation:
    """The policy with these weights on held-out prompts, by their usual sampler; the same on any number of processes.

    `extras` as of `evaluate`.

    Raises:
        RewardError: a judge could score none of the pictures.
    """
    with run.stage("evaluate"), state.policy.swapped(values):
        evaluation = evaluate(
            state.generator,
            sampler_of(state.generator.schedule),
            prompts,
            state.judges,
            seed=cfg.eval_seed,
            batch_size=cfg.batch_size,
            process=accelerator.process_index,
            processes=accelerator.num_processes,
            gather=lambda t: accelerator.gather(t.to(accelerator.device)),
            extras=extras,
        )
    for name in evaluation.scores:
        if not len(evaluation.known(name)):
            raise RewardError(name, f"could score none of {len(prompts)} held-out pictures")
    return evaluation


def restore(path: Path, state: TrainState) -> None:
    """Put a checkpoint back: weights, average, optimiser, place in the run. All else follows from seed and step."""
    tensors, saved = ckpt.load_checkpoint(path)
    if saved.get("base") != state.policy.base_digest:
        raise ValueError(f"model: its weights are not those that the resumed run was training ({path})")
    device = next(iter(state.policy.trained.values())).device
    state.policy.load({k: v.to(device) for k, v in tensors["trained"].items()})
    check_same_names("resume", {k: tuple(v.shape) for k, v in tensors["ema"].items()}, state.policy.trained)
    state.average.values = {k: v.to(device) for k, v in tensors["ema"].items()}
    state.average.updates = saved["ema_updates"]
    ckpt.load_optimizer(state.optimizer, tensors["optimizer"])
    state.step, state.skipped = saved["step"], saved["skipped"]
    state.train_seconds, state.images_sampled = saved["train_seconds"], saved["images_sampled"]
    state.best = tuple(saved["best"]) if saved["best"] else None
    if state.monitor is not None and saved.get("monitor"):
        state.monitor.load_state_dict(saved["monitor"])
    state.extra = saved.get("extra", {})
    state.tensors = {
        name: {key: value.to(device) for key, value in group.items()}
        for name, group in tensors.items()
        if name not in OWN_TENSORS
    }
    before = {k: v.double() for k, v in tensors.get("before", {}).items()}
    state.before = Evaluation(saved["before_prompts"], before) if before else None


def checkpoint(run: Run, cfg: CommonConfig, state: TrainState, accelerator: Accelerator, last: bool) -> None:
    """Save where due: every `save_every` steps, at the best so far, and at the last; prune."""
    if taken := set(state.tensors) & set(OWN_TENSORS):
        raise ValueError(f"tensors: got a group {sorted(taken)[0]!r}, expected none of {OWN_TENSORS}")
    best = state.best is not None and state.best[1] == state.step
    if not (last or best or state.step % cfg.save_every == 0):
        return
    if accelerator.is_main_process:
        with run.stage("checkpoint"):
            before = state.before.scores if state.before else {}
            ckpt.save_checkpoint(
                run.folder / "checkpoints",
                state.step,
                {
                    "trained": state.policy.tensors(),
                    "ema": state.average.values,
                    "optimizer": ckpt.optimizer_tensors(state.optimizer),
                    "before": before,
                    **state.tensors,
                },
                {
                    "config": asdict(cfg),
                    "prompts": state.digest,
                    "reward_file": state.reward_digest,
                    "base": state.policy.base_digest,
                    "skipped": state.skipped,
                    "train_seconds": state.train_seconds,
                    "images_sampled": state.images_sampled,
                    "best": state.best,
                    "ema_updates": state.average.updates,
                    "monitor": state.monitor.state_dict() if state.monitor else None,
                    "extra": state.extra,
                    "before_prompts": state.before.prompts if state.before else [],
                },
            )
            always = {state.best[1]} if state.best else set()
            ckpt.prune(run.folder / "checkpoints", cfg.keep, always, newest=state.step)
    accelerator.wait_for_everyone()


def keep_best(state: TrainState, evaluation: Evaluation) -> None:
    """Remember the step that held-out prompts speak for, whose checkpoint is then kept.

    By the first judge that is only watched, for it is not what the policy may learn to deceive; else by the reward.
    """
    value = evaluation.mean(next((name for name in evaluation.scores if name != "reward"), "reward"))
    if state.best is None or value > state.best[0]:
        state.best = (value, state.step)


def stopping(run: Run, accelerator: Accelerator) -> bool:
    """Whether any process was asked to stop: the same answer, and if by the hacking watch, WATCH, on all."""
    status = 0 if run.stopping is None else 2 if run.stopping == WATCH else 1
    strongest = int(accelerator.gather(torch.tensor([status], device=accelerator.device)).max())
    if strongest == 2:
        run.stopping = WATCH
    return bool(strongest)


@contextmanager
def claimed(plan: Plan, accelerator: Accelerator) -> Iterator[None]:
    """Within, the run folder is this run's alone; `plan.folder` is the main process's, on every process.

    A folder whose name nobody gave is made anew: where it is taken by a run of the same second, with a number.

    Raises:
        ValueError: another process is at work there, or has left a run there meanwhile; on every process.
    """
    claim, said = None, ["", ""]
    if accelerator.is_main_process:
        try:
            claim = Claim(plan.folder, fresh=not plan.named)
            plan.folder = claim.folder
            check_writable(plan.folder, plan.resume is not None)
        except (ValueError, OSError) as error:
            said[1] = str(error)
        said[0] = str(plan.folder)
    try:
        broadcast_object_list(said)
        if said[1]:
            raise ValueError(said[1])
        plan.folder = Path(said[0])
        yield
    finally:
        if claim is not None:
            claim.release()
