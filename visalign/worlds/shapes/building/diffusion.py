"""Train the world's diffusion model: a real `StableDiffusionPipeline`, only small, with epsilon prediction and DDIM.

It learns from the world's flow model rather than from single draws of noise: at each noised latent, the noise that the
guided flow model tells there is the target, as in progressive distillation (Salimans and Ho 2022, arXiv:2202.00512).
The target has no variance of its own, so that a training step tells far more.
"""

import copy
import logging
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from visalign.pipeline.generator import Generator
from visalign.worlds.shapes import WEIGHTS
from visalign.worlds.shapes.scenes import COLOURS, SHAPES
from visalign.worlds.shapes.text import MAX_TOKENS, make_tokenizer

from .flow import encode_captions, finish_folder, make_latents
from .muon import MuonAndAdamW, follow, warmup_cosine

log = logging.getLogger(__name__)
WIDTHS = (32, 128)  # channels at 16 x 16 and at 8 x 8
DEFAULTS = {"num_steps": 10, "guidance_scale": 1.0}
MOST_WEIGHT = 50.0
DDIM = {  # the noise levels of Stable Diffusion 1.5
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
}


def make_unet(cross_attention_dim: int = 128, **changes) -> UNet2DConditionModel:
    """An untrained UNet of the world's size, with attention at 8 x 8."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=WIDTHS,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=4,
        norm_num_groups=16,
        **changes,
    )


def teacher_noise(teacher: nn.Module, noisy: Tensor, alpha_bar: Tensor, embeds: Tensor, pooled: Tensor) -> Tensor:
    """The noise that a flow model finds in VP latents.

    With a = sqrt(alpha_bar), b = sqrt(1 - alpha_bar), a clean x and noise e, a x + b e = (a + b) ((1 - s) x + s e) for
    s = b / (a + b); the flow model's velocity v = e - x there gives e = x_s + (1 - s) v.

    Args:
        noisy: (N, 4, 16, 16).
        alpha_bar: (N,) in (0, 1).
        embeds, pooled: as `encode_captions` makes them.
    """
    a, b = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    sigma = b / (a + b)
    at = noisy / (a + b)[:, None, None, None]
    velocity = teacher(
        hidden_states=at, timestep=sigma * 1000, encoder_hidden_states=embeds, pooled_projections=pooled
    ).sample
    return at + (1 - sigma)[:, None, None, None] * velocity


def train_diffusion(
    folder: Path | str,
    *,
    teacher: Path | str = WEIGHTS / "flow",
    steps: int = 12_000,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    guidance: float = 2.0,
    scenes: int = 40_000,
    seed: int = 0,
    device: str = "cpu",
    seconds: float = math.inf,
    start: Path | str | None = None,
) -> StableDiffusionPipeline:
    """Train, from nothing or from the folder `start`, saving the average to `folder` every 1,000 steps.

    The text encoder starts as the flow model's first. Stops early after `seconds`; the learning rate falls along a
    cosine of progress, measured in steps or, where that is further, seconds.

    Args:
        teacher: folder of the flow model; its autoencoder becomes this model's.
        guidance: of the teacher; without captions it teaches without.
    """
    torch.manual_seed(seed)
    flow = Generator.from_pretrained(teacher, dtype=torch.float32, calibrate=False).pipeline.to(device)
    flow.vae.register_to_config(shift_factor=0.0)  # StableDiffusionPipeline knows no shift; it is 0.05
    pipe = _start(start, teacher, flow.vae).to(device)
    trained = nn.ModuleList([pipe.unet, pipe.text_encoder])
    averaged = copy.deepcopy(trained).requires_grad_(False)
    latents, ids, labels = make_latents(flow.vae, scenes, seed)
    head = nn.Conv2d(WIDTHS[-1], 1 + len(COLOURS) * len(SHAPES), 1).to(device)
    middle: list[Tensor] = []
    pipe.unet.mid_block.register_forward_hook(lambda _module, _args, out: middle.append(out))
    empty = make_tokenizer()("", padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids[0]
    optimizer = MuonAndAdamW(trained, head.parameters(), betas=(0.9, 0.98))
    alphas = pipe.scheduler.alphas_cumprod
    random = torch.Generator().manual_seed(seed)
    started, recent, planning = time.monotonic(), 0.0, 0.0
    for step in range(steps):
        progress = max(step / steps, (time.monotonic() - started) / seconds)
        if progress >= 1:
            break
        rate = learning_rate * warmup_cosine(step, 500, progress)
        rows = torch.randint(scenes, (batch_size,), generator=random)
        tokens = ids[rows, torch.randint(ids.shape[1], (batch_size,), generator=random)].clone()
        tokens[torch.rand(batch_size, generator=random) < 0.1] = empty  # for classifier-free guidance
        tokens = tokens.to(device)
        timesteps = torch.randint(len(alphas), (batch_size,), generator=random)
        alpha_bar = alphas[timesteps].to(device)
        noise = torch.randn((batch_size, *latents.shape[1:]), generator=random).to(device)
        at = alpha_bar[:, None, None, None]
        noisy = at.sqrt() * latents[rows].to(device) + (1 - at).sqrt() * noise
        with torch.no_grad():
            both = encode_captions(flow, torch.cat([tokens, empty.to(device).expand_as(tokens)]))
            guided = teacher_noise(flow.transformer, noisy.repeat(2, 1, 1, 1), alpha_bar.repeat(2), *both)
            target = torch.lerp(guided[batch_size:], guided[:batch_size], guidance)
        embeds = pipe.text_encoder(tokens).last_hidden_state
        prediction = pipe.unet(noisy, timesteps.to(device), encoder_hidden_states=embeds).sample
        weight = (1 / at).clamp(max=MOST_WEIGHT)  # an error of the clean latents counts 1 + SNR, as of a velocity
        loss = (weight * (prediction - target).square()).mean()
        plan = F.cross_entropy(head(middle.pop()).flatten(2), labels[rows].to(device))
        optimizer.zero_grad()
        (loss + 0.2 * (1 - progress) * plan).backward()  # its target varies, where the other does not
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step(rate)
        follow(averaged, trained, min(0.999, (1 + step) / (10 + step)))
        recent = 0.98 * recent + 0.02 * loss.item() if step else loss.item()
        planning = 0.98 * planning + 0.02 * plan.item() if step else plan.item()
        if step % 100 == 0:
            summary = (step, recent, planning, rate, time.monotonic() - started)
            log.info("diffusion step %d loss %.4f plan %.4f lr %.1e seconds %.0f", *summary)
        if step % 1000 == 999:
            save_diffusion(pipe, averaged, folder)
    return save_diffusion(pipe, averaged, folder)


def _start(start: Path | str | None, teacher: Path | str, vae: AutoencoderKL) -> StableDiffusionPipeline:
    if start is not None:
        return Generator.from_pretrained(start, dtype=torch.float32, calibrate=False).pipeline
    text_encoder = CLIPTextModel.from_pretrained(Path(teacher, "text_encoder"), dtype=torch.float32)
    scheduler = DDIMScheduler(**DDIM, timestep_spacing="trailing", steps_offset=1)
    return make_pipeline(StableDiffusionPipeline, make_unet(), text_encoder, vae, scheduler)


def make_pipeline(kind, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, vae: AutoencoderKL, scheduler):
    """The parts as one pipeline of the class `kind`."""
    return kind(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=make_tokenizer(),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_small(kind, unet, text_encoder, vae, scheduler, folder: Path | str, defaults: dict):
    """Write a pipeline of the class `kind` in fp16, to be loaded in fp32, and its generation defaults."""
    unet, text_encoder, vae = (copy.deepcopy(module).half().eval() for module in (unet, text_encoder, vae))
    shipped = make_pipeline(kind, unet, text_encoder, vae, scheduler)
    shipped.save_pretrained(folder)
    finish_folder(folder, ("text_encoder",), defaults)
    return shipped


def save_diffusion(pipe: StableDiffusionPipeline, averaged: nn.ModuleList, folder: Path | str):
    """Write the pipeline with the averaged weights."""
    unet, text_encoder = averaged
    return save_small(StableDiffusionPipeline, unet, text_encoder, pipe.vae, pipe.scheduler, folder, DEFAULTS)
