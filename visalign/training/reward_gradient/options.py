"""Options of `trainers/reward_backprop.py`, checked as soon as they are given; which belong to which method."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from visalign.objectives import reward_gradient as objectives
from visalign.objectives import single_step
from visalign.training.before.options import CommonConfig
from visalign.transitions import check_transition

Method = Literal["draft", "draft_lv", "alignprop", "refl", "srpo", "instructvideo", "controlnet", "ctrl_u", "rg_lcm"]
SAMPLERS = ("flow_sde", "dance_sde", "cps", "ddim", "consistency")
CHAINED = ("draft", "alignprop", "instructvideo")  # gradients through steps of the sampler
CYCLE = ("controlnet", "ctrl_u")
ON_DATA = ("instructvideo", *CYCLE, "rg_lcm")
OWN: dict[str, dict[str, Any]] = {  # options of some methods, with their defaults there
    "grad_steps": {"draft": 1, "instructvideo": 1},
    "cut": {"alignprop": "uniform"},
    "noises": {"draft_lv": 2},
    "jump_span": {"refl": None},
    "align_span": {"srpo": (0.9643, 0.75)},
    "strength": {"instructvideo": 0.6},
    "noise_offset": {"instructvideo": 0.1},
    "time_span": {"controlnet": (0, 200), "ctrl_u": (0, 400)},
    "doubt_weight": {"ctrl_u": 0.1},
    "ramp_steps": {"ctrl_u": 5000},
    "teacher": {"rg_lcm": None},
    "guidance_span": {"rg_lcm": (6.0, 16.0)},
    "huber": {"rg_lcm": 1e-3},
    "component": dict.fromkeys(CYCLE, "controlnet"),
}


@dataclass(frozen=True)
class Config(CommonConfig):
    """Options of the trainer; those of every trainer are in `visalign.training.before.options.CommonConfig`."""

    method: Method = "draft"
    # Sampling
    num_steps: int = 10  # denoising steps of a training image
    sampler: str = "auto"  # auto, ode, one of SAMPLERS, or a transition of your own: file.py:Class
    eta: float | None = None  # noise strength of the sampler; None: its own default (auto is without noise)
    train_guidance: float | None = None  # guidance_scale in training; None: as in sampling
    prompts_per_step: int = 16
    group_size: int = 1  # images a prompt
    # Of single methods; None: the default there, see OWN. Others refuse them.
    grad_steps: int | None = None  # last steps with gradient; draft with num_steps: all
    cut: Literal["uniform", "gaussian", "fixed"] | None = None  # distribution of the first step with gradient
    noises: int | None = None  # of one image, each noised to the last level
    jump_span: tuple[int, int] | None = None  # first and last + 1 step that is scored; None: the last quarter
    align_span: tuple[float, float] | None = None  # noise levels, high to low, over which updates are spread
    strength: float | None = None  # share of the steps that noised data goes through
    noise_offset: float | None = None  # std of a shift constant over space, added to the noise
    time_span: tuple[int, int] | None = None  # timesteps of 1000 whose estimates are scored
    doubt_weight: float | None = None  # of the disagreement of two predictions; 1 for segmentation
    ramp_steps: int | None = None  # iterations over which the reward's weight rises from 0
    teacher: str | None = None  # folder of the diffusion model; None: this model without its LoRA
    guidance_span: tuple[float, float] | None = None  # guidance_scale of the teacher, drawn evenly
    huber: float | None = None  # c of the pseudo-Huber loss
    component: str | None = None  # module that is trained
    # Data
    data: str | None = None  # shapes, or a folder with metadata.jsonl
    data_weight: float | None = None  # of the denoising (rg_lcm: consistency) loss; None: 1 for those on data, else 0
    min_snr: float | None = None  # gamma of its weighting by noise level; None: none
    levels_per_step: int = 4  # noise levels an iteration, for data and anchor
    # Reward
    objective: objectives.Objective = "reward"  # hinge: none above the threshold; target: towards it
    threshold: float | None = None
    reward_weight: float = 1.0
    reward_mix: Literal["plain", "normalised"] = "plain"  # normalised: each reward's image gradient by its norm
    worst_case: float = 0.0  # shift of an image against the reward before it is scored, in the 2-norm
    augment: int = 0  # augmented copies of an image over which the reward is averaged
    augment_crop: float = 0.9  # smallest share of a side that is kept
    augment_noise: float = 0.02  # std, in pixels of [0, 1]
    augment_flip: bool = False
    positive: str | None = None  # wanted and unwanted words before the prompt: the reward is the difference
    negative: str | None = None
    # Staying near the start
    anchor_weight: float = 0.0  # squared difference of predictions to the base model's
    kl_weight: float = 0.0  # KL per stochastic step with gradient, a sum over latent dimensions
    start_decay: float = 0.0  # squared size of the change of the weights
    lora_scale: float = 1.0  # of the change, LoRA or full, in evaluations and in what is exported
    early_stop: int = 0  # evaluations without a better one by the watched judge; 0: never
    # Memory
    checkpoint_calls: bool = False  # keep only the inputs of denoiser calls
    decode_checkpointing: bool = False
    decode_slicing: bool = False  # one image at a time
    decode_tiling: bool = False  # changes values near seams

    def __post_init__(self) -> None:
        super().__post_init__()
        check_transition("sampler", self.sampler, ("auto", "ode", *SAMPLERS))
        for name, methods in OWN.items():
            if getattr(self, name) is not None and self.method not in methods:
                raise ValueError(f"{name}: got {getattr(self, name)!r} with method {self.method!r}, expected None")
        for name in ("num_steps", "prompts_per_step", "group_size", "levels_per_step"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected >= 1")
        for name in ("reward_weight", "worst_case", "augment", "anchor_weight", "kl_weight", "start_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected >= 0")
        check_ranges(self)
        check_combinations(self)

    def own(self, name: str) -> Any:
        """An option of single methods, or its default for this method."""
        return OWN[name].get(self.method) if getattr(self, name) is None else getattr(self, name)

    @property
    def data_share(self) -> float:
        """The weight of the loss on data."""
        return float(self.method in (*CYCLE, "rg_lcm")) if self.data_weight is None else self.data_weight

    @property
    def words(self) -> tuple[str | None, str | None]:
        """Wanted and unwanted; SRPO cannot do without."""
        default = ("Realistic", "Painting") if self.method == "srpo" else (None, None)
        return (self.positive, self.negative) if self.positive is not None else default


def check_ranges(cfg: Config) -> None:
    """Raise ValueError for numbers that a method cannot use."""
    low_high: dict[str, tuple[float, float]] = {
        "grad_steps": (1, cfg.num_steps),
        "noises": (1, math.inf),
        "strength": (0.5 / cfg.num_steps + 1e-9, 1),
        "noise_offset": (0, math.inf),
        "doubt_weight": (0, math.inf),
        "ramp_steps": (0, math.inf),
        "huber": (1e-12, math.inf),
        "lora_scale": (0, 1),
        "early_stop": (0, math.inf),
        "augment_crop": (1e-3, 1),
        "augment_noise": (0, math.inf),
        "min_snr": (1e-12, math.inf),
        "data_weight": (0, math.inf),
    }
    for name, (low, high) in low_high.items():
        value = getattr(cfg, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"{name}: got {value}, expected within [{low:g}, {high:g}]")
    if cfg.grad_steps is not None and cfg.method == "instructvideo":
        taken = cfg.num_steps - single_step.edit_start(cfg.num_steps, cfg.own("strength"))
        if cfg.grad_steps > taken:
            raise ValueError(f"grad_steps: got {cfg.grad_steps}, expected at most {taken}, the steps that are taken")
    spans = {"jump_span": cfg.num_steps, "time_span": 1000}
    for name, most in spans.items():
        span = getattr(cfg, name)
        if span is not None and not 0 <= span[0] < span[1] <= most:
            raise ValueError(f"{name}: got {span}, expected 0 <= first < last <= {most}")
    if cfg.guidance_span is not None and not 1 <= cfg.guidance_span[0] <= cfg.guidance_span[1]:
        raise ValueError(f"guidance_span: got {cfg.guidance_span}, expected 1 <= low <= high")
    if cfg.align_span is not None:
        single_step.align_levels(*cfg.align_span, torch.Generator())
    objectives.reward_loss(torch.zeros(1), cfg.objective, cfg.threshold)


def check_combinations(cfg: Config) -> None:
    """Raise ValueError for options that do not go together, or would have no effect."""
    uses_data = cfg.method in ON_DATA or cfg.data_share > 0
    if uses_data and cfg.data is None:
        raise ValueError(f"data: got None for method {cfg.method!r}, expected 'shapes' or a folder of pictures")
    if cfg.data is not None and not uses_data and cfg.method != "srpo":
        raise ValueError(f"data: got {cfg.data!r} with method {cfg.method!r} and data_weight 0, expected None")
    if cfg.data not in (None, "shapes"):
        for name, default in (("prompts", "shapes"), ("eval_prompts", None)):
            if (given := getattr(cfg, name)) != default:
                raise ValueError(f"{name}: got {given!r} with data {cfg.data!r}, whose captions are the prompts")
    unused: dict[str, tuple[bool, str]] = {  # name: (given, needs)
        "min_snr": (cfg.min_snr is not None and not (cfg.data_share > 0 and cfg.method != "rg_lcm"), "data_weight"),
        "levels_per_step": (cfg.levels_per_step != 4 and not (uses_data or cfg.anchor_weight > 0), "data or an anchor"),
        "eta": (cfg.eta is not None and cfg.sampler in ("auto", "ode"), "a sampler with noise"),
        "sampler": (cfg.sampler != "auto" and cfg.method in (*CYCLE, "rg_lcm"), "a method that samples"),
        "kl_weight": (
            cfg.kl_weight > 0 and (cfg.method not in CHAINED or cfg.sampler in ("auto", "ode")),
            f"a method of {CHAINED} and a sampler with noise",
        ),
        "train_guidance": (cfg.train_guidance is not None and cfg.method == "rg_lcm", "another method"),
        "early_stop": (cfg.early_stop > 0 and not cfg.eval_every, "eval_every"),
        "positive": ((cfg.positive is None) != (cfg.negative is None), "negative, and the other way round"),
        "augment_crop": (cfg.augment_crop != 0.9 and not cfg.augment, "augment"),
        "augment_noise": (cfg.augment_noise != 0.02 and not cfg.augment, "augment"),
        "augment_flip": (cfg.augment_flip and not cfg.augment, "augment"),
        "score_threads": (bool(cfg.score_threads), "a trainer that scores without gradient"),
    }
    for name, (given, needs) in unused.items():
        if given:
            raise ValueError(f"{name}: got {getattr(cfg, name)!r} with method {cfg.method!r}, expected it with {needs}")
    if cfg.reward_mix == "normalised" and (cfg.objective != "reward" or cfg.words[0] is not None):
        raise ValueError("reward_mix: got 'normalised', expected objective 'reward' and no positive and negative words")
    if cfg.method == "ctrl_u":
        shaped = (cfg.objective != "reward", cfg.reward_mix != "plain", cfg.worst_case, cfg.augment, cfg.positive)
        if any(shaped) or cfg.reward != "controlnet_cycle" and not cfg.reward.endswith((".yaml", ".yml")):
            raise ValueError(f"reward: got {cfg.reward!r} for ctrl_u, expected a plain controlnet_cycle (or a .yaml)")
