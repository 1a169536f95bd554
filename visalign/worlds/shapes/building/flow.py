"""Train the world's flow-matching text-to-image model from nothing: a real `StableDiffusion3Pipeline`, only small.

The transformer and the two text encoders learn together, on latents of drawn scenes, by rectified-flow matching with
logit-normal times (Esser et al. 2024, arXiv:2403.03206); the exponential moving average of the weights is what ships.
An auxiliary loss asks the tokens of a middle block which object will cover their patch, as representation alignment
does with a teacher's features (Yu et al. 2024, arXiv:2410.06940); here the drawing itself is the teacher.
"""

import copy
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from visalign.pipeline.generator import Generator
from visalign.worlds.shapes.captions import caption
from visalign.worlds.shapes.drawing import draw, patch_labels
from visalign.worlds.shapes.scenes import COLOURS, SHAPES, place, sample_spec
from visalign.worlds.shapes.text import MAX_TOKENS, make_tokenizer

from .muon import MuonAndAdamW, follow, warmup_cosine

log = logging.getLogger(__name__)
TASK_WEIGHTS = (0.05, 0.1, 0.12, 0.4, 0.18, 0.15)  # of KINDS: about as distinct held-out meanings fall
DEFAULTS = {"num_steps": 10, "guidance_scale": 1.0, "call_kwargs": {"max_sequence_length": 1}}


def _text_encoder(width: int, layers: int, tokenizer) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 32),
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config)


def make_flow_pipeline(vae: AutoencoderKL, heads: int = 4, layers: int = 5) -> StableDiffusion3Pipeline:
    """An untrained pipeline of the world's size around a trained autoencoder."""
    tokenizer = make_tokenizer()
    first, second = _text_encoder(128, 3, tokenizer), _text_encoder(32, 2, tokenizer)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=32,
        num_attention_heads=heads,
        joint_attention_dim=160,
        caption_projection_dim=32 * heads,
        pooled_projection_dim=160,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=first,
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=make_tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def encode_captions(pipe: StableDiffusion3Pipeline, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids (N, MAX_TOKENS) to the (N, MAX_TOKENS + 1, 160) and (N, 160) embeddings the pipeline itself makes."""
    outputs = [e(tokens, output_hidden_states=True) for e in (pipe.text_encoder, pipe.text_encoder_2)]
    clip = torch.cat([o.hidden_states[-2] for o in outputs], dim=-1)
    return torch.cat([clip, clip.new_zeros(len(clip), 1, clip.shape[-1])], dim=1), torch.cat(
        [o[0] for o in outputs], dim=-1
    )


@torch.no_grad()
def make_latents(
    vae: AutoencoderKL, count: int, seed: int, wordings: int = 4, wrong: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw and encode `count` scenes: latents (count, 4, 16, 16), ids (count, wordings, MAX_TOKENS), labels.

    The labels are those of `patch_labels`, (count, 64). A share `wrong` of the scenes has another scene's captions.
    """
    rng, tokenizer = np.random.default_rng(seed), make_tokenizer()
    latents, labels, texts = [], [], []
    for start in range(0, count, 128):
        specs = [sample_spec(rng, weights=TASK_WEIGHTS) for _ in range(min(128, count - start))]
        placed = [place(s, rng) for s in specs]
        labels.append(patch_labels(placed))
        pictures = draw(placed).to(vae.device)
        z = vae.encode(pictures * 2 - 1).latent_dist.mean
        latents.append(((z - vae.config.shift_factor) * vae.config.scaling_factor).cpu())
        texts += [caption(s, rng) for s in specs for _ in range(wordings)]
    ids = tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids
    ids = ids.view(count, wordings, MAX_TOKENS)
    rows = torch.from_numpy(np.flatnonzero(rng.random(count) < wrong))
    ids[rows] = ids[rows.roll(1)]
    return torch.cat(latents), ids, torch.cat(labels)


def train_flow(
    vae: AutoencoderKL,
    folder: Path | str,
    *,
    steps: int = 20_000,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    scenes: int = 60_000,
    seed: int = 0,
    device: str = "cpu",
    seconds: float = math.inf,
    start: Path | str | None = None,
    wrong: float = 0.15,
) -> StableDiffusion3Pipeline:
    """Train, from nothing or from the folder `start`, saving the average to `folder` every 1,000 steps.

    A share `wrong` of the pictures has another's captions, as on the web: the model learns to half mistrust its prompt,
    which is what alignment can mend.

    Stops early after `seconds`.

    The learning rate falls along a cosine of training progress, measured in steps or, where that is further, seconds.
    """
    torch.manual_seed(seed)
    pipe = make_flow_pipeline(vae.to(device)).to(device)
    if start is not None:
        old = Generator.from_pretrained(start, dtype=torch.float32, calibrate=False).pipeline
        for name in ("transformer", "text_encoder", "text_encoder_2"):
            getattr(pipe, name).load_state_dict(getattr(old, name).state_dict())
    trained = nn.ModuleList([pipe.transformer, pipe.text_encoder, pipe.text_encoder_2])
    averaged = copy.deepcopy(trained).requires_grad_(False)
    latents, ids, labels = make_latents(vae, scenes, seed, wrong=wrong)
    head = nn.Linear(pipe.transformer.inner_dim, 1 + len(COLOURS) * len(SHAPES)).to(device)
    middle: list[Tensor] = []
    pipe.transformer.transformer_blocks[2].register_forward_hook(lambda _m, _a, out: middle.append(out[1]))
    empty = make_tokenizer()("", padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids[0]
    optimizer = MuonAndAdamW(trained, head.parameters(), betas=(0.9, 0.98))
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
        clean = latents[rows].to(device)
        noise = torch.randn(clean.shape, generator=random).to(device)
        sigma = torch.randn(batch_size, generator=random).sigmoid().to(device)
        embeds, pooled = encode_captions(pipe, tokens.to(device))
        at = sigma[:, None, None, None]
        velocity = pipe.transformer(
            hidden_states=(1 - at) * clean + at * noise,
            timestep=sigma * 1000,
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
        ).sample
        loss = (velocity - (noise - clean)).square().mean()
        plan = F.cross_entropy(head(middle.pop()).flatten(0, 1), labels[rows].to(device).flatten())
        optimizer.zero_grad()
        (loss + 0.2 * plan).backward()
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step(rate)
        follow(averaged, trained, min(0.999, (1 + step) / (10 + step)))
        recent = 0.98 * recent + 0.02 * loss.item() if step else loss.item()
        planning = 0.98 * planning + 0.02 * plan.item() if step else plan.item()
        if step % 100 == 0:
            summary = (step, recent, planning, rate, time.monotonic() - started)
            log.info("flow step %d loss %.4f plan %.4f lr %.1e seconds %.0f", *summary)
        if step % 1000 == 999:
            save_flow(pipe, averaged, folder)
    return save_flow(pipe, averaged, folder)


def save_flow(pipe: StableDiffusion3Pipeline, averaged: nn.ModuleList, folder: Path | str) -> StableDiffusion3Pipeline:
    """Write the pipeline with the averaged weights, in fp16, and its generation defaults."""
    transformer, first, second = (copy.deepcopy(m).half().eval() for m in averaged)
    shipped = StableDiffusion3Pipeline(
        transformer=transformer,
        text_encoder=first,
        text_encoder_2=second,
        vae=copy.deepcopy(pipe.vae).half(),
        scheduler=pipe.scheduler,
        tokenizer=pipe.tokenizer,
        tokenizer_2=pipe.tokenizer_2,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    shipped.save_pretrained(folder)
    finish_folder(folder, ("text_encoder", "text_encoder_2"), DEFAULTS)
    return shipped


def finish_folder(folder: Path | str, text_encoders: Sequence[str], defaults: Mapping[str, Any]) -> None:
    """What a saved pipeline of the world still needs: generation defaults, and configs without this machine's paths.

    Text encoders are stored in fp16 and load in fp32, as the rest does by default.
    """
    for file in Path(folder).glob("*/config.json"):
        config = json.loads(file.read_text())
        config.pop("_name_or_path", None)
        if file.parent.name in text_encoders:
            config["dtype"] = "float32"
        file.write_text(json.dumps(config, indent=2) + "\n")
    Path(folder, "visalign.json").write_text(json.dumps(defaults, indent=2) + "\n")
