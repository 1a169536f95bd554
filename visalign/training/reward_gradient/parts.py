"""What `trainers/reward_backprop.py` is built of: its samples, its sampler and teacher, its bookkeeping."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from visalign.data.pictures import Drawn, Pictures
from visalign.data.prompts import Group
from visalign.pipeline.calls import call_parameters
from visalign.pipeline.encoding import Encoder, picture_size
from visalign.pipeline.generator import Generator
from visalign.rewards import Reward
from visalign.rewards.verifiers.cycle import ControlnetCycle
from visalign.sampling.seeds import derived_seed
from visalign.training.loop.batches import Samples, cut
from visalign.training.loop.evaluate import Extras
from visalign.training.policy import Policy
from visalign.transitions import Schedule, Transition, make_transition, ode_of
from visalign.worlds import resolve_model

from .gradients import GradedReward, check_built
from .options import CYCLE, Config


class Batch(NamedTuple):
    """A micro-batch: N samples that share their random levels, with their pictures where training is on data."""

    ids: Tensor  # (N,) int64, of the groups
    prompts: list[str]
    seeds: list[int]
    noise_seeds: list[int]
    block: int  # whose levels they share
    inputs: dict[str, Any]  # of the pipeline's calls
    drawn: Drawn | None = None
    x0: Tensor | None = None  # the pictures' latents


def blocks_of(cfg: Config) -> list[int]:
    """The block of each group of an iteration: consecutive groups share their random levels, whatever the process."""
    count, on_levels = cfg.prompts_per_step, cfg.method in (*CYCLE, "rg_lcm") or cfg.data_share > 0 or cfg.anchor_weight
    return [g * min(cfg.levels_per_step, count) // count if on_levels else 0 for g in range(count)]


def batches(
    cfg: Config, generator: Generator, pictures: Pictures | None, encode: Encoder | None, groups: Sequence[Group]
) -> Iterator[Batch]:
    """The samples of some groups, block by block."""
    block_of = blocks_of(cfg)
    inputs = {} if cfg.train_guidance is None else {"guidance_scale": cfg.train_guidance}
    for block in sorted(set(block_of)):
        for samples in cut([g for g in groups if block_of[g.index] == block], cfg.batch_size):
            batch = Batch(samples.ids, samples.prompts, samples.seeds, samples.noise_seeds, block, inputs)
            if pictures is not None and encode is not None:
                drawn, condition = shown_to(cfg, generator, pictures, samples.prompts, samples.noise_seeds)
                x0 = encode(drawn.pictures, samples.prompts, **condition)
                batch = batch._replace(inputs=inputs | condition, drawn=drawn, x0=x0)
            yield batch


def shown_to(
    cfg: Config, generator: Generator, pictures: Pictures, prompts: Sequence[str], seeds: Sequence[int]
) -> tuple[Drawn, dict[str, Any]]:
    """Pictures of captions, of the model's size, and the condition as the pipeline takes it, if it does."""
    drawn = pictures.draw(prompts, seeds, picture_size(generator)).to(generator.device)
    takes = cfg.method in CYCLE and "image" in call_parameters(generator.pipeline)
    return drawn, {"image": drawn.conditions} if takes else {}


def evaluation_extras(cfg: Config, generator: Generator, pictures: Pictures | None) -> Extras | None:
    """For evaluations of methods with a condition: a picture for each held-out caption, the same every time."""
    if pictures is None or cfg.method not in CYCLE:
        return None

    def extras(rows: list[int], prompts: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
        seeds = [derived_seed(cfg.eval_seed, 19, row) for row in rows]
        drawn, inputs = shown_to(cfg, generator, pictures, prompts, seeds)
        return inputs, drawn.context

    return extras


def make_sampler(cfg: Config, schedule: Schedule) -> Transition:
    """The transition of training; `auto` is without noise, for consistency models the usual one with it.

    Raises:
        ValueError: a sampler of another kind of model.
    """
    if cfg.sampler == "auto" and schedule.kind == "consistency":
        return make_transition("consistency")
    if cfg.sampler in ("auto", "ode"):
        return ode_of(schedule)
    transition = make_transition(cfg.sampler, **({} if cfg.eta is None else {"eta": cfg.eta}))
    transition.std(schedule, 0)
    return transition


def make_graded(cfg: Config, reward: Reward, others: Sequence[str]) -> GradedReward:
    """The reward with its regularisers; `others` are trainers for rewards without gradient."""
    check_built(reward, others)
    if cfg.method == "ctrl_u" and not isinstance(reward, ControlnetCycle):
        raise ValueError(f"reward: got {cfg.reward!r} for ctrl_u, expected a plain controlnet_cycle")
    if cfg.words[0] is not None and "prompts" not in reward.needs:
        raise ValueError(f"positive: got {cfg.words[0]!r} for {reward.name!r}, which reads no prompts, expected None")
    return GradedReward(
        reward,
        objective=cfg.objective,
        threshold=cfg.threshold,
        mix=cfg.reward_mix,
        radius=cfg.worst_case,
        copies=cfg.augment,
        crop=cfg.augment_crop,
        noise=cfg.augment_noise,
        flip=cfg.augment_flip,
        positive=cfg.words[0],
        negative=cfg.words[1],
    )


def load_teacher(cfg: Config, schedule: Schedule, policy: Policy, device: torch.device) -> Generator | None:
    """The diffusion model that a consistency model is distilled from; None where it is the base of this one.

    Raises:
        ValueError: none given where one is needed, or one that is no diffusion at the same timesteps.
    """
    if cfg.method != "rg_lcm":
        return None
    if cfg.teacher is None:
        if embeds_guidance(policy):
            raise ValueError("teacher: got None for a model that embeds its guidance, expected the diffusion model")
        return None
    sizes = {name: getattr(cfg, name) for name in ("height", "width") if getattr(cfg, name) is not None}
    teacher = Generator.from_pretrained(resolve_model(cfg.teacher), device=device, num_steps=cfg.num_steps, **sizes)
    for module in teacher.denoisers.values():
        module.requires_grad_(False)
    if teacher.schedule.kind != "diffusion" or teacher.schedule.times != schedule.times:
        got = f"{teacher.schedule.kind} at timesteps {teacher.schedule.times[:3]}"
        raise ValueError(f"teacher: got a model of {got}, expected diffusion at {schedule.times[:3]}, as the student")
    return teacher


def embeds_guidance(policy: Policy) -> bool:
    """Whether the model is told its guidance scale, as distilled consistency models are."""
    return getattr(policy.module.config, "time_cond_proj_dim", None) is not None


def prepare_memory(cfg: Config, generator: Generator) -> list[tuple[Any, str]]:
    """Slice and tile the decoder where wanted; the methods whose activations are to be recomputed.

    Raises:
        ValueError: an option for a decoder that cannot.
    """
    vae: Any = getattr(generator.pipeline, "vae", None)
    needed = {"decode_slicing": "enable_slicing", "decode_tiling": "enable_tiling", "decode_checkpointing": "decode"}
    for option, method in needed.items():
        if getattr(cfg, option) and not hasattr(vae, method):
            raise ValueError(
                f"{option}: got True for {type(generator.pipeline).__name__}, whose vae cannot, expected False"
            )
    if cfg.decode_slicing:
        vae.enable_slicing()
    if cfg.decode_tiling:
        vae.enable_tiling()
    recomputed: list[tuple[Any, str]] = [(m, "forward") for m in generator.denoisers.values() if cfg.checkpoint_calls]
    return recomputed + [(vae, "_decode" if hasattr(vae, "_decode") else "decode")] * cfg.decode_checkpointing


def check_kind(cfg: Config, kind: str | None) -> None:
    """Raise ValueError for another kind of model than the method's; None: not known yet."""
    wanted = {"srpo": "flow", "rg_lcm": "consistency"}.get(cfg.method, kind)
    if kind not in (None, wanted):
        raise ValueError(f"model: got a {kind} model, expected a {wanted} one for {cfg.method}")


def check_model(cfg: Config, schedule: Schedule, transition: Transition, first_cut: int) -> None:
    """Raise ValueError for what only the loaded model tells."""
    check_kind(cfg, schedule.kind)
    last = range(first_cut, cfg.num_steps)
    if cfg.kl_weight and not any(transition.std(schedule, i) > 0 for i in last):
        raise ValueError(f"kl_weight: got {cfg.kl_weight}, but no step of {list(last)} has noise, expected 0")


@dataclass
class UpdateLog:
    """What an iteration showed: sums to log with their counts, pictures and rewards (N,), NaN where not scored."""

    sums: dict[str, tuple[float | Tensor, int]] = field(default_factory=dict)
    images: list[tuple[Tensor, list[str]]] = field(default_factory=list)
    rewards: list[Tensor] = field(default_factory=list)
    ids: list[Tensor] = field(default_factory=list)

    def add(self, name: str, values: Tensor) -> None:
        total, count = self.sums.get(name, (0.0, 0))
        self.sums[name] = total + values.detach().float().sum(), count + values.numel()

    def add_samples(self, batch: Batch | Samples, images: Tensor | None, rewards: Tensor | None) -> None:
        """One picture of each sample; those without a finite reward are left out of the watch."""
        rewards = torch.full((len(batch.ids),), math.nan) if rewards is None else rewards.detach().float().cpu()
        rewards = torch.where(rewards.isfinite(), rewards, math.nan)
        scored = (~rewards.isnan()).nonzero().flatten().tolist()
        if images is not None and scored:
            self.images.append((images.detach()[scored], [batch.prompts[n] for n in scored]))
        self.rewards.append(rewards)
        self.ids.append(batch.ids)

    def joined(self, accelerator: Accelerator) -> tuple[dict[str, float], Tensor, Tensor]:
        """Means over all processes, and ids and rewards (M,) of the scored samples, this process's first."""
        names = ["saturated", "data_loss", "consistency_loss", "doubt", "anchor", "kl", "adjoint_norm"]
        device = accelerator.device
        rows = [torch.tensor([float(x) for x in self.sums.get(name, (0, 0))], dtype=torch.float64) for name in names]
        sums = accelerator.reduce(torch.stack(rows).to(device), "sum").cpu()
        values = {name: (row[0] / row[1]).item() for name, row in zip(names, sums) if row[1] > 0}
        ids, rewards = (accelerator.gather(torch.cat(v).to(device)).cpu() for v in (self.ids, self.rewards))
        by_sample = rewards[torch.argsort(ids, stable=True)].double()  # the same order on any number of processes
        known = ~rewards.isnan()
        values |= {"reward_mean": by_sample.nanmean().item(), "scored": int(known.sum())}
        return values, ids[known], rewards[known]
