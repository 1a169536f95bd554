"""Train the world's few-step model: a real `LatentConsistencyModelPipeline`, distilled from the diffusion model.

Latent consistency distillation (Luo et al. 2023, arXiv:2310.04378): from noised latents the guided teacher takes one
DDIM step down, and the student must say the same clean latents from both ends of it. The guidance is an input of the
student. Here the step is from any timestep, and longer than published: the teacher's own sampling takes longer ones.
"""

import copy
import logging
import math
import time
from pathlib import Path

import torch
from diffusers import LatentConsistencyModelPipeline, LCMScheduler, UNet2DConditionModel
from torch import Tensor

from visalign.pipeline.generator import Generator
from visalign.worlds.shapes import WEIGHTS
from visalign.worlds.shapes.text import MAX_TOKENS, make_tokenizer

from .diffusion import DDIM, make_unet, save_small
from .flow import make_latents
from .muon import MuonAndAdamW, follow, warmup_cosine

log = logging.getLogger(__name__)
DEFAULTS = {"num_steps": 4, "guidance_scale": 1.5}
GUIDANCE = (1.0, 3.0)  # learnt
GUIDANCE_WIDTH = 32  # of its embedding
SIGMA_DATA, TIMESTEP_SCALE = 0.5, 10.0  # of the published boundary condition
HUBER = 1e-3


def make_student(teacher: UNet2DConditionModel) -> UNet2DConditionModel:
    """The teacher with an input for guidance, which does nothing yet."""
    student = make_unet(time_cond_proj_dim=GUIDANCE_WIDTH)
    result = student.load_state_dict(teacher.state_dict(), strict=False)
    assert result.missing_keys == ["time_embedding.cond_proj.weight"] and not result.unexpected_keys
    torch.nn.init.zeros_(student.time_embedding.cond_proj.weight)
    return student


def clean(noise: Tensor, noisy: Tensor, alpha_bar: Tensor) -> Tensor:
    """The clean latents that a prediction of the noise means; alpha_bar (N, 1, 1, 1)."""
    return (noisy - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()


def consistent(prediction: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
    """c_skip noisy + c_out found, whose boundary at timestep 0 is `noisy` itself (arXiv:2310.04378, section 4.1)."""
    scaled = (timesteps * TIMESTEP_SCALE).view(-1, 1, 1, 1)
    c_skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
    return c_skip * noisy + scaled / (scaled**2 + SIGMA_DATA**2).sqrt() * prediction


def train_consistency(
    folder: Path | str,
    *,
    teacher: Path | str = WEIGHTS / "diffusion",
    steps: int = 2_000,
    batch_size: int = 24,
    learning_rate: float = 4e-4,
    skip: int = 50,
    scenes: int = 20_000,
    seed: int = 0,
    device: str = "cpu",
    seconds: float = math.inf,
    start: Path | str | None = None,
) -> LatentConsistencyModelPipeline:
    """Distil into `folder`, from the teacher's weights or from the folder `start`; saves every 500 steps.

    Stops early after `seconds`; the learning rate falls along a cosine of progress in steps or, where that is further,
    seconds.

    Args:
        teacher: folder of the diffusion model; its text encoder and autoencoder become this model's.
        skip: timesteps of the teacher's step.
    """
    torch.manual_seed(seed)
    pipe = Generator.from_pretrained(teacher, dtype=torch.float32, calibrate=False).pipeline.to(device)
    if start is None:
        student = make_student(pipe.unet).to(device)
    else:
        student = Generator.from_pretrained(start, dtype=torch.float32, calibrate=False).pipeline.unet.to(device)
    student.train().requires_grad_(True)
    target = copy.deepcopy(student).requires_grad_(False)  # an average over few steps, to learn from
    averaged = copy.deepcopy(target)  # and one over many, to keep
    latents, ids, _ = make_latents(pipe.vae, scenes, seed)
    empty = make_tokenizer()("", padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids[:1]
    alphas = pipe.scheduler.alphas_cumprod.to(device)
    optimizer = MuonAndAdamW(student, betas=(0.9, 0.98))
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        nothing = pipe.text_encoder(empty.to(device)).last_hidden_state.expand(batch_size, -1, -1)
    started, recent = time.monotonic(), 0.0
    for step in range(steps):
        progress = max(step / steps, (time.monotonic() - started) / seconds)
        if progress >= 1:
            break
        rate = learning_rate * warmup_cosine(step, 100, progress)
        rows = torch.randint(scenes, (batch_size,), generator=random)
        tokens = ids[rows, torch.randint(ids.shape[1], (batch_size,), generator=random)].to(device)
        timesteps = torch.randint(1, len(alphas), (batch_size,), generator=random).to(device)
        guidance = torch.empty(batch_size).uniform_(*GUIDANCE, generator=random).to(device)
        noise = torch.randn((batch_size, *latents.shape[1:]), generator=random).to(device)
        alpha = alphas[timesteps].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * latents[rows].to(device) + (1 - alpha).sqrt() * noise
        condition = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, guidance - 1, GUIDANCE_WIDTH)
        with torch.no_grad():
            embeds = pipe.text_encoder(tokens).last_hidden_state
            both = pipe.unet(noisy.repeat(2, 1, 1, 1), timesteps.repeat(2), torch.cat([nothing, embeds])).sample
            without, conditional = both.chunk(2)
            conditional = without + guidance.view(-1, 1, 1, 1) * (conditional - without)
            later = (timesteps - skip).clamp(min=0)
            alpha_later = torch.where(timesteps > skip, alphas[later], 1.0).view(-1, 1, 1, 1)
            nearer = alpha_later.sqrt() * clean(conditional, noisy, alpha) + (1 - alpha_later).sqrt() * conditional
            there = target(nearer, later, embeds, timestep_cond=condition).sample
            wanted = consistent(clean(there, nearer, alpha_later), nearer, later)
        prediction = student(noisy, timesteps, embeds, timestep_cond=condition).sample
        difference = consistent(clean(prediction, noisy, alpha), noisy, timesteps) - wanted
        loss = ((difference.square() + HUBER**2).sqrt() - HUBER).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step(rate)
        follow(target, student, 0.95)
        follow(averaged, student, min(0.995, (1 + step) / (10 + step)))
        recent = 0.98 * recent + 0.02 * loss.item() if step else loss.item()
        if step % 50 == 0:
            log.info("consistency step %d loss %.4f seconds %.0f", step, recent, time.monotonic() - started)
        if step % 500 == 499:
            save_consistency(pipe, averaged, folder)
    return save_consistency(pipe, averaged, folder)


def save_consistency(pipe, unet: UNet2DConditionModel, folder: Path | str) -> LatentConsistencyModelPipeline:
    """Write the pipeline with this UNet, in fp16, and its generation defaults."""
    scheduler = LCMScheduler(**DDIM, original_inference_steps=50, timestep_scaling=TIMESTEP_SCALE)
    return save_small(LatentConsistencyModelPipeline, unet, pipe.text_encoder, pipe.vae, scheduler, folder, DEFAULTS)
