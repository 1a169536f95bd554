"""Training with the gradient of the reward, through the last steps of the sampler or one prediction: one loop, by mode.

    accelerate launch trainers/reward_backprop.py                                 # DRaFT-1, the shipped shapes world
    accelerate launch trainers/reward_backprop.py --config trainers/recipes/draft_sd15.yaml --reward hpsv21

`--method` draft: DRaFT-K (arXiv:2309.17400); draft_lv: its variant of low variance; alignprop (2310.03739); refl
(2304.05977); srpo: Direct-Align with relative rewards, flows only (2509.06942); instructvideo: editing noised data
(2312.12490); controlnet: ControlNet++ (2404.07987); ctrl_u (2410.11236); rg_lcm: consistency distillation (2403.11027).
Departures: random cuts and levels are functions of seed and iteration, the same on all processes; data latents are the
autoencoder's mean; masked means are over the whole iteration, not a process; per-step KL is taken at the visited states
held fixed. docs/methods/reward_backprop.md says what is reconstructed.
"""

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visalign.data.pictures import open_pictures
from visalign.data.prompts import Group
from visalign.objectives import reward_gradient as objectives
from visalign.objectives import single_step
from visalign.pipeline.encoding import Encoder
from visalign.pipeline.generator import Generator
from visalign.rewards.verifiers.cycle import ControlnetCycle, per_item
from visalign.sampling.backprop import checkpointed, truncated_rollout
from visalign.sampling.noising import add_noise, one_step_estimate, training_target
from visalign.sampling.rollout import rollout
from visalign.sampling.seeds import derived_seed, step_noise
from visalign.training.before import preflight
from visalign.training.loop import setup
from visalign.training.loop.trainer import Trainer, launch, train
from visalign.training.loop.training_loop import Iteration, TrainingLoop
from visalign.training.reward_gradient.gradients import OTHERS, check_differentiable
from visalign.training.reward_gradient.options import CYCLE, Config
from visalign.training.reward_gradient.parts import (
    Batch,
    UpdateLog,
    batches,
    blocks_of,
    check_kind,
    check_model,
    embeds_guidance,
    evaluation_extras,
    load_teacher,
    make_graded,
    make_sampler,
    prepare_memory,
    shown_to,
)
from visalign.transitions import ddim
from visalign.worlds import resolve_model


class Estimate(NamedTuple):
    """Clean latents (N, ...) with gradient, to be decoded and scored; x0, and the visited states, to stay close at."""

    latents: Tensor
    weight: float = 1.0
    excess: float = 0.0
    swap: bool = False
    states: dict[int, Tensor] | None = None


class RewardBackprop(Trainer):
    """A batch's estimates, their gradient, the update."""

    name, config = "reward_backprop", Config

    def __init__(self, loop: TrainingLoop) -> None:
        super().__init__(loop)
        cfg, state, self.pictures = self.cfg, self.state, loop.plan.pictures
        self.transition = make_sampler(cfg, self.schedule)
        self.first_cut = cfg.num_steps - (cfg.own("grad_steps") or cfg.num_steps)  # no step before has a gradient
        check_model(cfg, self.schedule, self.transition, self.first_cut)
        self.reward = make_graded(cfg, state.scorer.reward, OTHERS)
        self.encode = Encoder(self.generator) if self.pictures else None
        self.teacher = load_teacher(cfg, self.schedule, state.policy, self.loop.accelerator.device)
        self.recomputed = prepare_memory(cfg, self.generator)
        loop.scale, loop.patience = cfg.lora_scale, cfg.early_stop
        loop.extras = evaluation_extras(cfg, self.generator, self.pictures)

    @classmethod
    def plan(cls, cfg: Config) -> preflight.Plan:
        check_differentiable(cfg.reward, OTHERS)
        pictures = open_pictures(cfg.data) if cfg.data else None
        if pictures and cfg.method in CYCLE and not pictures.conditioned:
            raise ValueError(f"data: got {cfg.data!r}, where pictures lack their condition, expected one for each")
        if cfg.own("teacher"):
            resolve_model(cfg.own("teacher"))
        sets = pictures.captions() if pictures else None
        plan = preflight.make_plan(cfg, cls.name, sets)
        check_kind(cfg, preflight.kind_of_folder(plan.model))
        if pictures:
            pictures.check([*plan.prompts, *plan.eval_prompts])
        plan.pictures = pictures
        return plan

    @classmethod
    def inputs(cls, cfg: Config, plan: preflight.Plan, generator: Generator) -> dict[str, Any]:
        return shown_to(cfg, generator, plan.pictures, plan.prompts[:1], [0])[1] if plan.pictures else {}

    @classmethod
    def component(cls, cfg: Config) -> str | None:
        return cfg.own("component")

    def iteration(self, step: int) -> Iteration:
        """Sample, differentiate the reward, update."""
        groups, (local,) = self.loop.groups(step, self.cfg.group_size)
        values, log, seen = self.update(step, local)
        return Iteration(values, log.images, *seen, len(groups) * self.cfg.group_size)

    # Samples ---------------------------------------------------------------------------------------------------------

    def draw(self, key: int, step: int, block: int = 0) -> torch.Generator:
        """For the random cuts and levels of an iteration: the same on all processes."""
        return torch.Generator().manual_seed(derived_seed(self.cfg.seed, 20 + key, step, block))

    def noise(self, batch: Batch, key: int, like: Tensor) -> Tensor:
        """Standard normal, of each sample's own seed."""
        return step_noise(batch.noise_seeds, 10_000 + key, like)

    # Estimates -------------------------------------------------------------------------------------------------------

    def estimates(self, step: int, batch: Batch) -> Iterator[Estimate]:
        """What the reward is asked about, one at a time; backward is called in between."""
        cfg, count, schedule, method = self.cfg, self.cfg.num_steps, self.schedule, self.cfg.method
        call = dict(prompts=batch.prompts, seeds=batch.seeds, noise_seeds=batch.noise_seeds, **batch.inputs)
        sample = functools.partial(rollout, self.generator, transition=self.transition, decode=False, **call)
        differentiable = functools.partial(truncated_rollout, self.generator, transition=self.transition, **call)
        if method == "draft":
            path = differentiable(cut=self.first_cut)
            yield Estimate(path.result, states=path.states)
        elif method == "alignprop":
            path = differentiable(cut=objectives.draw_cut(cfg.own("cut"), count, self.draw(0, step)))
            yield Estimate(path.result, states=path.states)
        elif method == "refl":
            low, high = cfg.own("jump_span") or (math.ceil(0.75 * count), count)
            jump = int(torch.randint(min(low, high - 1), high, (), generator=self.draw(0, step)))
            yield Estimate(differentiable(cut=jump, jump=True).result)
        elif method == "instructvideo":
            assert batch.x0 is not None
            start = single_step.edit_start(count, cfg.own("strength"))
            noise = self.noise(batch, 0, batch.x0)
            offsets = self.noise(batch, 1, batch.x0[..., :1, :1])
            noise = single_step.offset_noise(noise, offsets, cfg.own("noise_offset"))
            state = add_noise(batch.x0, noise, schedule.levels[start], schedule.prediction_type)
            path = differentiable(cut=max(start, self.first_cut), latents=state, start=start)
            yield Estimate(path.result, states=path.states)
        elif method == "draft_lv":
            x0 = sample().final
            for j in range(cfg.own("noises")):
                state = add_noise(x0, self.noise(batch, j, x0), schedule.levels[count - 1], schedule.prediction_type)
                prediction = self.generator.predict(state, count - 1, batch.prompts, **batch.inputs)
                denoised = self.transition(schedule, count - 1, state, prediction)[1]
                yield Estimate(denoised, 1 / cfg.own("noises"))
        elif method == "srpo":
            x0, (high, low) = sample().final if batch.x0 is None else batch.x0, cfg.own("align_span")
            noise, at = self.noise(batch, 0, x0), single_step.align_levels(high, low, self.draw(0, step))
            branches = ((at.denoise_from, at.denoise_excess, False), (at.inversion_from, at.inversion_excess, True))
            for sigma, excess, swap in branches:
                state, timestep = add_noise(x0, noise, sigma, "velocity"), sigma / self.generator.level_at(1.0)
                velocity = self.predict_at(batch, state, timestep)
                yield Estimate(single_step.direct_align(x0, noise, sigma, at.landing, velocity), 0.5, excess, swap)

    def predict_at(self, batch: Batch, state: Tensor, timestep: float) -> Tensor:
        """The prediction at any timestep."""
        return self.generator.predict(state, 0, batch.prompts, timestep=timestep, **batch.inputs)

    def images(self, batch: Batch, latents: Tensor, log: UpdateLog) -> Tensor:
        inputs = {name: value for name, value in batch.inputs.items() if name == "image"}
        images = self.generator.decode(latents, batch.prompts, **inputs)
        log.add("saturated", objectives.saturated_fraction(images))
        return images

    def context(self, step: int, batch: Batch) -> dict[str, Any]:
        """For rewards: what is known of prompts and pictures, and a seed for those that choose frames."""
        known = self.state.scorer.context(batch.prompts) | {"segment_seed": derived_seed(self.cfg.seed, 30, step)}
        return known | (batch.drawn.context if batch.drawn is not None and self.cfg.method in CYCLE else {})

    # Gradients -------------------------------------------------------------------------------------------------------

    def learn_by_reward(self, step: int, batch: Batch, log: UpdateLog, scale: float) -> None:
        """Gradient of the reward of what `estimates` gives."""
        first: tuple[Tensor, Tensor] | None = None
        for estimate in self.estimates(step, batch):
            images = self.images(batch, estimate.latents, log)
            context = self.context(step, batch)
            graded = self.reward(images, batch.prompts, batch.noise_seeds, context, estimate.excess, estimate.swap)
            (graded.loss.sum() * (self.cfg.reward_weight * estimate.weight * scale)).backward()
            first = first or (images.detach(), graded.rewards)
            self.stay_close(step, batch, log, estimate.latents.detach(), estimate.states, scale * estimate.weight)
        assert first is not None
        log.add_samples(batch, *first)
        if self.cfg.data_share:
            self.data_loss(step, batch, log, scale, self.time_at(step, batch.block))[0].backward()

    def learn_by_cycle(self, step: int, batch: Batch, log: UpdateLog, scale: float) -> None:
        """ControlNet++ and Ctrl-U: the denoising loss on data, and the reward of one-step estimates near it."""
        cfg, timestep = self.cfg, self.time_at(step, batch.block)
        low, high = cfg.own("time_span")
        within = low <= timestep <= high
        share = self.scored_share(step, low, high)  # of the iteration's samples
        loss, latents = self.data_loss(step, batch, log, scale, timestep)
        if not within and cfg.method == "controlnet":
            loss.backward()
            log.add_samples(batch, None, None)
        elif cfg.method == "controlnet":
            images = self.images(batch, latents, log)
            graded = self.reward(images, batch.prompts, batch.noise_seeds, self.context(step, batch))
            (loss + graded.loss.sum() * (cfg.reward_weight * scale / share)).backward()
            log.add_samples(batch, images, graded.rewards)
        else:
            further = min(timestep + 1, 999)
            auxiliary, other = self.data_loss(step, batch, log, scale, further)
            loss, images, rewards = (loss + auxiliary) / 2, None, None
            if within:
                reward, context = self.state.scorer.reward, self.context(step, batch)
                assert isinstance(reward, ControlnetCycle)
                images = self.images(batch, latents, log)
                maps, losses, counted = reward.pixel_losses(images, context)
                doubt = reward.doubt(reward.pixel_losses(self.images(batch, other, log), context)[0], maps)
                weighted, doubted = (per_item(v, counted) for v in (single_step.doubt_weighted(losses, doubt), doubt))
                rate = cfg.reward_weight * single_step.ramp(step, cfg.own("ramp_steps"))
                total = rate * weighted + cfg.own("doubt_weight") * doubted
                loss, rewards = loss + total.sum() * (scale / share), -per_item(losses, counted)
                log.add("doubt", doubted)
            loss.backward()
            log.add_samples(batch, images, rewards)
        assert batch.x0 is not None
        self.stay_close(step, batch, log, batch.x0, None, scale)

    def learn_by_distilling(self, step: int, batch: Batch, log: UpdateLog, scale: float) -> None:
        """RG-LCM: one call of the student serves the consistency loss and the reward."""
        cfg, schedule, draw = self.cfg, self.schedule, self.draw(1, step, batch.block)
        i, x0 = int(torch.randint(cfg.num_steps, (), generator=draw)), batch.x0
        low, high = cfg.own("guidance_span")
        guidance = low + (high - low) * torch.rand((), generator=draw).item()
        inputs: dict[str, Any] = {"guidance_scale": guidance if embeds_guidance(self.state.policy) else 1.0}
        assert x0 is not None

        def student(state: Tensor, k: int) -> Tensor:
            prediction = self.generator.predict(state, k, batch.prompts, **inputs)
            return self.transition(schedule, k, state, prediction)[1]

        state = add_noise(x0, self.noise(batch, 0, x0), schedule.levels[i], schedule.prediction_type)
        with torch.no_grad():
            target = self.teacher_step(batch, state, i, guidance)
            if i + 1 < cfg.num_steps:  # the last level is the boundary, where the student is the identity
                target = student(target, i + 1)
        estimate = student(state, i)
        distance = single_step.consistency_loss(estimate, target, cfg.own("huber"))
        images = self.images(batch, estimate, log)
        graded = self.reward(images, batch.prompts, batch.noise_seeds, self.context(step, batch))
        ((cfg.data_share * distance + cfg.reward_weight * graded.loss.to(distance)).sum() * scale).backward()
        log.add("consistency_loss", distance)
        log.add_samples(batch, images, graded.rewards)
        self.stay_close(step, batch, log, x0, None, scale)

    def teacher_step(self, batch: Batch, state: Tensor, i: int, guidance: float) -> Tensor:
        """One DDIM step of the guided diffusion model."""
        (level, following), kind = self.schedule.step(i), self.schedule.prediction_type
        if self.teacher is not None:
            kind = self.teacher.schedule.prediction_type
            prediction = self.teacher.predict(state, i, batch.prompts, guidance_scale=guidance)
        else:
            with self.state.policy.reference():
                prediction = self.generator.predict(state, i, batch.prompts, guidance_scale=guidance)
        return ddim(state, prediction, level, following, 0.0, kind)[0].mean

    def time_at(self, step: int, block: int) -> float:
        """The timestep of a block's noised data, 1 .. 999; drawn evenly."""
        return float(torch.randint(1, 1000, (), generator=self.draw(2, step, block)))

    def scored_share(self, step: int, low: float, high: float) -> float:
        """Of the iteration's samples, on all processes, those whose timestep is within the span; not below 1e-10."""
        block_of = blocks_of(self.cfg)
        times = torch.tensor([self.time_at(step, block) for block in block_of])
        return max(single_step.masked_mean(torch.ones(len(times)), times, low, high, len(times)).item(), 1e-10)

    def data_loss(
        self, step: int, batch: Batch, log: UpdateLog, scale: float, timestep: float
    ) -> tuple[Tensor, Tensor]:
        """The denoising loss on the pictures, (), weighted; and the one-step estimate of their latents."""
        level, kind, x0 = self.generator.level_at(timestep), self.schedule.prediction_type, batch.x0
        assert x0 is not None
        noise = self.noise(batch, 100, x0)
        state = add_noise(x0, noise, level, kind)
        prediction = self.predict_at(batch, state, timestep)
        loss = objectives.output_anchor(prediction, training_target(x0, noise, level, kind))
        log.add("data_loss", loss)
        weight = 1.0 if self.cfg.min_snr is None else single_step.min_snr_weight(level, kind, self.cfg.min_snr)
        return loss.sum() * (self.cfg.data_share * weight * scale), one_step_estimate(state, prediction, level, kind)

    def stay_close(
        self, step: int, batch: Batch, log: UpdateLog, x0: Tensor, states: dict[int, Tensor] | None, scale: float
    ) -> None:
        """Gradient of what holds the policy near the base model: on a noised sample, and at the visited states."""
        cfg, schedule = self.cfg, self.schedule
        if cfg.anchor_weight:
            i = int(torch.randint(cfg.num_steps, (), generator=self.draw(3, step, batch.block)))
            state = add_noise(x0, self.noise(batch, 200, x0), schedule.levels[i], schedule.prediction_type)
            self.compare(batch, {i: state}, log, "anchor", cfg.anchor_weight * scale)
        noisy = {i: x for i, x in (states or {}).items() if self.transition.std(schedule, i) > 0}
        if cfg.kl_weight and noisy:
            self.compare(batch, noisy, log, "kl", cfg.kl_weight * scale)

    def compare(self, batch: Batch, states: dict[int, Tensor], log: UpdateLog, name: str, scale: float) -> None:
        """Gradient of the distance to the base model, step by step, each on its own state held fixed."""
        references: dict[int, Tensor] = {}

        def keep(i: int, _x: Tensor, prediction: Tensor) -> None:
            references[i] = prediction

        with self.state.policy.reference():
            self.generator.denoise(batch.prompts, batch.seeds, keep, latents=states, **batch.inputs)

        def pull(i: int, x: Tensor, prediction: Tensor) -> None:
            if name == "anchor":
                distance = objectives.output_anchor(prediction, references[i])
            else:
                ours, base = (self.transition(self.schedule, i, x, p)[0] for p in (prediction, references[i]))
                distance = objectives.step_kl(ours, base)
            (distance.sum() * scale).backward()
            log.add(name, distance)

        self.generator.denoise(batch.prompts, batch.seeds, pull, latents=states, **batch.inputs)

    def decay_to_start(self) -> None:
        """Gradient of the change's size; once for all processes, whose gradients are summed."""
        policy, weight = self.state.policy, self.cfg.start_decay
        if not weight or not self.loop.accelerator.is_main_process:
            return
        if policy.lora_rank:
            downs = {name: p for name, p in policy.trained.items() if ".lora_A." in name}
            pairs = [(a, policy.trained[name.replace(".lora_A.", ".lora_B.")]) for name, a in downs.items()]
            penalty = objectives.lora_penalty(pairs, setup.alpha_of(self.cfg) / policy.lora_rank)
        else:
            penalty = objectives.start_penalty(list(policy.trained.values()), list(policy.frozen.values()))
        (weight * penalty).backward()

    def update(self, step: int, groups: list[Group]) -> tuple[dict[str, Any], UpdateLog, tuple[Tensor, Tensor]]:
        """The iteration's optimiser update; what to log, the images, and the groups and rewards to watch."""
        cfg, log = self.cfg, UpdateLog()
        learn = {"rg_lcm": self.learn_by_distilling, **dict.fromkeys(CYCLE, self.learn_by_cycle)}
        scale = 1 / (cfg.prompts_per_step * cfg.group_size)
        with self.run.stage("train"), checkpointed(*self.recomputed):
            for batch in batches(cfg, self.generator, self.pictures, self.encode, groups):
                learn.get(cfg.method, self.learn_by_reward)(step, batch, log, scale)
            self.decay_to_start()
            norm = self.state.apply_gradients(self.loop.accelerator, step)
        values, ids, rewards = log.joined(self.loop.accelerator)
        seen = torch.zeros_like(ids) if cfg.group_size == 1 else ids, rewards  # one image a prompt: one group
        return {**values, "grad_norm": norm, "skipped_updates": self.state.skipped}, log, seen


def main(cfg: Config) -> Path:
    """Train; returns the run folder."""
    return train(RewardBackprop, cfg)


def cli(argv: list[str] | None = None) -> None:
    launch(RewardBackprop, argv)


if __name__ == "__main__":
    cli()
