"""Train the world's small image autoencoder from nothing: 64x64 pictures to 16x16 latents of 4 channels."""

import logging
import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from visalign.worlds.shapes.drawing import draw
from visalign.worlds.shapes.scenes import SPLITS, place, sample_spec

log = logging.getLogger(__name__)


def make_vae() -> AutoencoderKL:
    """An untrained autoencoder of the world's size."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 24, 48),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )


def training_pictures(count: int, seed: int) -> Tensor:
    """Scenes of training captions, (count, 3, 64, 64) uint8."""
    rng = np.random.default_rng(seed)
    chunks = []
    for start in range(0, count, 256):
        scenes = [place(sample_spec(rng, SPLITS[0]), rng) for _ in range(min(256, count - start))]
        chunks.append((draw(scenes) * 255).round().to(torch.uint8))
    return torch.cat(chunks)


def train_vae(
    steps: int = 2400, batch_size: int = 8, seed: int = 0, device: str = "cpu", vae: AutoencoderKL | None = None
) -> AutoencoderKL:
    """Train on drawn scenes (L1, fourfold on objects, + KL), from `vae` or from nothing.

    Sets `scaling_factor` and `shift_factor` so that latents have mean 0 and std 1.
    """
    torch.manual_seed(seed)
    vae = (vae or make_vae()).requires_grad_(True).train().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=1e-4)
    pictures = training_pictures(20_000, seed)
    picker = torch.Generator().manual_seed(seed)
    started = time.monotonic()
    for step in range(steps):
        rows = torch.randint(len(pictures), (batch_size,), generator=picker)
        images = (pictures[rows].to(device).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min((step + 1) / 100, 0.5 * (1 + math.cos(math.pi * step / steps)) + 0.01)
        posterior = vae.encode(images).latent_dist
        recon = vae.decode(posterior.sample()).sample
        error = (recon - images).abs()
        chroma = images.amax(1, keepdim=True) - images.amin(1, keepdim=True)
        weight = 1 + 3 * F.max_pool2d((chroma > 0.4).float(), 5, 1, 2)  # objects and their surroundings
        loss = (
            (weight * error).mean()
            + F.mse_loss(recon, images)
            + 5e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 200 == 0 or step == steps - 1:
            log.info("vae step %d l1 %.4f seconds %.0f", step, error.mean().item(), time.monotonic() - started)
    vae.eval().requires_grad_(False)
    with torch.no_grad():
        latents = torch.cat(
            [vae.encode(p.to(device).float() / 127.5 - 1).latent_dist.mean for p in pictures[:2048].split(64)]
        )
    vae.register_to_config(scaling_factor=1 / float(latents.std()), shift_factor=float(latents.mean()))
    return vae
