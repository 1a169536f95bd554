"""Everything that can be checked before a model loads: the model, the prompts, the rewards, the run folder."""

import hashlib
import json
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from visalign.advantages.own import load_advantages
from visalign.data.prompt_context import PromptContext
from visalign.data.prompts import overlap, read_prompts, share_of
from visalign.rewards import parse_spec
from visalign.rewards.spec import spec_files
from visalign.trainers import trainer_for
from visalign.training.policy import check_lora_fits
from visalign.training.run import checkpoint as ckpt
from visalign.training.run.folder import check_writable
from visalign.transitions import make_transition
from visalign.worlds import WORLDS, all_captions, resolve_model, world

from .options import FREE_ON_RESUME, CommonConfig, alpha_of


@dataclass
class Plan:
    """What the checks before loading found. A resumed run must have the same digests."""

    model: str
    folder: Path
    prompts: list[str]
    eval_prompts: list[str]
    judges: dict[str, str]  # column: spec
    resume: Path | None = None
    named: bool = True  # the folder's name was given; else another is found where it is taken
    warnings: list[str] = field(default_factory=list)
    digest: str = ""  # of the prompts
    reward_digest: str = ""  # of the files that the reward and the judges are made of; "": none
    context: PromptContext = field(default_factory=PromptContext)  # metadata and references of the prompts
    pictures: Any = None  # to train on, for trainers that do


def make_plan(
    cfg: CommonConfig,
    trainer: str = "flow_grpo",
    sets: tuple[list[str], list[str]] | None = None,
    kinds: Collection[str] | None = None,
) -> Plan:
    """Check everything that can be checked before a model loads.

    Args:
        trainer: its name, of the run folder.
        sets: the training and held-out prompts where they do not come from the options of that name.
        kinds: of model that the trainer takes; None: all.

    Raises:
        ValueError: one line that names the option, what was given and what is accepted.
    """
    model = resolve_model(cfg.model)
    if kinds is not None:
        check_kind(cfg.model, kind_of_folder(model), kinds)
    parse_spec(cfg.reward)
    load_own(cfg)
    resume = None if cfg.resume is None else ckpt.find_checkpoint(Path(cfg.resume))
    folder = Path(
        cfg.run_dir or (resume.parent.parent if resume else f"runs/{trainer}-{time.strftime('%Y%m%d-%H%M%S')}")
    )
    prompts, held_out = read_sets(cfg) if sets is None else (sets[0], sets[1][: cfg.eval_count])
    warnings = []
    if shared := overlap(prompts, held_out):
        warnings.append(f"{len(shared)} of {len(held_out)} evaluation prompts also stand in the training set")
    digest = _digest("\n".join([*prompts, "", *held_out]).encode())
    context = PromptContext.of_files(cfg.prompts, cfg.eval_prompts)
    if cfg.lora:
        check_lora_fits(Path(cfg.lora), Path(model), cfg.lora_rank, alpha_of(cfg))
    judges = judge_specs(cfg, held_out)
    files = list(dict.fromkeys(f for spec in (cfg.reward, *judges.values()) for f in spec_files(spec)))
    reward_digest = _digest(b"\0".join(file.read_bytes() for file in files)) if files else ""
    if resume is not None:
        state = ckpt.load_checkpoint(resume)[1]
        check_same_run(cfg, digest, resume, state)
        if state.get("reward_file", "") != reward_digest and not cfg.allow_changes:
            names = ", ".join(map(str, files)) or cfg.reward
            raise ValueError(
                f"reward: {cfg.reward!r} or a judge ({names}) has changed since the run that is resumed ({resume}); "
                "put it back, or add --allow_changes true"
            )
        if cfg.schedule != "constant" and cfg.steps != state["config"].get("steps", cfg.steps):
            warnings.append(
                f"steps {state['config']['steps']} -> {cfg.steps}: the {cfg.schedule} schedule is that of {cfg.steps} "
                f"steps from here on, so the learning rate jumps at step {state['step']}"
            )
    check_writable(folder, resume is not None)
    named = resume is not None or cfg.run_dir is not None
    return Plan(model, folder, prompts, held_out, judges, resume, named, warnings, digest, reward_digest, context)


def load_own(cfg: CommonConfig) -> None:
    """Import a user's own transition and advantages now, so that what is wrong with them is known before a model loads.

    Raises:
        ValueError: they cannot be imported, or are not what they should be.
    """
    sampler, eta = getattr(cfg, "sampler", ""), getattr(cfg, "eta", None)
    if ":" in sampler:
        make_transition(sampler, **({} if eta is None else {"eta": eta}))
    if ":" in getattr(cfg, "advantages", ""):
        load_advantages(cfg.advantages)  # type: ignore[attr-defined]


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def check_same_run(cfg: CommonConfig, digest: str, path: Path, state: dict[str, Any]) -> None:
    """Raise ValueError for other prompts than the resumed run's, or another option that changes what it learns."""
    for name, value in state["config"].items():
        if name in FREE_ON_RESUME or not hasattr(cfg, name):
            continue
        now = getattr(cfg, name)
        if (list(now) if isinstance(now, tuple) else now) != value:
            raise ValueError(f"{name}: got {now!r}, expected {value!r}, as in the run that is resumed ({path})")
    if state.get("prompts") != digest and not cfg.allow_changes:
        raise ValueError(
            f"prompts: {cfg.prompts!r} does not hold the prompts of the run that is resumed ({path}); put them back, "
            "or add --allow_changes true"
        )


def read_sets(cfg: CommonConfig) -> tuple[list[str], list[str]]:
    """Training and held-out prompts."""
    if cfg.prompts in WORLDS:
        prompts, held_out = (world(cfg.prompts).world_prompts(*s) for s in (("train", 2000), ("test", cfg.eval_count)))
    else:
        prompts = read_prompts(cfg.prompts)
        cut = max(1, len(prompts) // 10)
        if cfg.eval_prompts is None and len(prompts) < 2:
            raise ValueError(f"prompts: got 1 prompt in {cfg.prompts!r}, expected more, or eval_prompts beside it")
        prompts, held_out = (prompts, []) if cfg.eval_prompts else (prompts[:-cut], prompts[-cut:])
    if cfg.eval_prompts is not None:
        name = cfg.eval_prompts
        held_out = world(name).world_prompts("test", cfg.eval_count) if name in WORLDS else read_prompts(name)
    return prompts, held_out[: cfg.eval_count]


def judge_specs(cfg: CommonConfig, prompts: list[str]) -> dict[str, str]:
    """Columns of the evaluation beside the reward itself."""
    if cfg.judges != "auto":
        names = [name.strip() for name in cfg.judges.split(",") if name.strip()]
        for name in names:
            parse_spec(name)
        return {name.replace(":", "_"): name for name in names}
    return {"gold_strict": "gold"} if all_captions("shapes", prompts) else {}


def check_kind(model: str, kind: str | None, expected: Collection[str]) -> None:
    """Refuse a model of another kind than the trainer's, naming the trainer that takes it; None: not known yet."""
    if kind is not None and kind not in expected:
        raise ValueError(
            f"model: got {model!r}, a {kind} model, expected a {' or '.join(expected)} model; "
            f"the trainer for it is {trainer_for(kind)}"
        )


def kind_of_folder(model: str) -> str | None:
    """flow, diffusion or consistency, by the scheduler's file in a local model folder; None where there is none."""
    file = Path(model) / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        return None
    config = json.loads(file.read_text())
    name = str(config.get("_class_name"))
    if "FlowMatch" in name or config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction":
        return "flow"
    return "consistency" if name == "LCMScheduler" else "diffusion"


def check_shares(prompts: int, accelerator: Accelerator) -> None:
    """Refuse a number of prompts per update that the processes cannot share in whole groups."""
    share_of([None] * prompts, accelerator.process_index, accelerator.num_processes)
