"""Options that every trainer has, checked as soon as they are given."""

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch

from visalign.training.attention import NAMES

FREE_ON_RESUME = (
    *("steps", "resume", "run_dir", "allow_changes", "save_every", "keep", "eval_every", "eval_during"),
    *("score_threads", "monitor"),
    *("batch_size", "attention", "compile", "gradient_checkpointing", "release_text_encoders"),
)
MOST_PIXELS, MOST, SEEDS = 16384, 10**9, ("seed", "eval_seed")
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
    lora_targets: list[str] | None = None  # all-linear (None), attention, conditioning, or names of linear layers
    lora: str | None = None  # start from this LoRA folder
    # Reward
    reward: str = "clip_match"  # name, module:attribute, file.py:attribute, or a sum such as clip:0.7+aesthetic:0.3
    score_threads: int | None = None  # batches scored while others are sampled; None: 4 remote, 1 on a GPU, else 0
    monitor: Literal["off", "warn", "stop", "rollback"] = "warn"  # upon signs of reward hacking
    judges: str = "auto"  # rewards that are only watched, joined by commas; auto: gold where the world has one
    # Prompts
    prompts: str = "shapes"  # a text file, one prompt a line; a .jsonl file, with what rewards need besides; or shapes
    eval_prompts: str | None = None  # None: held-out captions of shapes, or the last tenth of the file
    eval_count: int = 200  # held-out prompts
    eval_during: int = 48  # of them, in evaluations under way
    eval_every: int = 0  # steps between evaluations under way; 0: only before and after
    eval_seed: int = 1234
    # Optimisation
    steps: int = 100  # iterations of sample, score, learn
    batch_size: int = 32  # images in one forward
    learning_rate: float = 4e-4
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    ema_decay: float = 0.9
    seed: int = 0
    # Run
    run_dir: str | None = None  # None: runs/<trainer>-<time>
    resume: str | None = None  # a run folder, or one of its step-N folders
    allow_changes: bool = False  # resume although the prompts, or files of the reward or a judge, have changed
    save_every: int = 1  # steps between checkpoints
    keep: int = 2  # newest checkpoints kept, beside the best and the last

    def __post_init__(self) -> None:
        check_numbers(self)
        for name in ("height", "width"):
            if getattr(self, name) is not None and not 8 <= getattr(self, name) <= MOST_PIXELS:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected within 8 .. {MOST_PIXELS} pixels")
        if self.guidance_scale is not None and self.guidance_scale < 0:
            raise ValueError(f"guidance_scale: got {self.guidance_scale}, expected >= 0")
        if self.lora_alpha is not None and not self.lora_alpha > 0:
            raise ValueError(f"lora_alpha: got {self.lora_alpha}, expected > 0")
        if self.lora_rank > 8192:
            raise ValueError(f"lora_rank: got {self.lora_rank}, expected 0 .. 8192")
        for name in ("steps", "batch_size", "learning_rate", "eval_count", "eval_during", "save_every", "keep"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected > 0")
        for name in ("lora_rank", "warmup_steps", "eval_every", "max_grad_norm", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected >= 0")
        if self.score_threads is not None and self.score_threads < 0:
            raise ValueError(f"score_threads: got {self.score_threads}, expected >= 0")
        if self.monitor == "rollback" and not self.eval_every:
            raise ValueError("monitor: got 'rollback' with eval_every 0, expected evaluations to find the best step by")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay: got {self.ema_decay}, expected within [0, 1)")
        if self.lora is not None and not self.lora_rank:
            raise ValueError(f"lora: got {self.lora!r} with lora_rank 0, expected the rank it was trained with")
        if self.attention not in ("auto", *NAMES):
            raise ValueError(f"attention: got {self.attention!r}, expected one of {['auto', *NAMES]}")


def check_numbers(cfg: Any) -> None:
    """Refuse numbers among the fields of a dataclass that are not finite, or so large that they can only be slips.

    Raises:
        ValueError: names the field.
    """
    for field in fields(cfg):
        given = getattr(cfg, field.name)
        for value in given if isinstance(given, (list, tuple)) else (given,):
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{field.name}: got {value}, expected a finite number")
            if isinstance(value, int) and abs(value) > MOST and field.name not in SEEDS:
                raise ValueError(f"{field.name}: got {value}, expected at most {MOST:,}")
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise ValueError(f"{field.name}: got {value}, expected a number of 64 bits")


def alpha_of(cfg: CommonConfig) -> float:
    """LoRA's alpha."""
    return 2.0 * cfg.lora_rank if cfg.lora_alpha is None else cfg.lora_alpha
