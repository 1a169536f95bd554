"""Train the world's small CLIP (an `open_clip` model of its own config) from nothing, by contrast with near misses.

The text tower starts as the flow model's text encoder where that is at hand. Every image meets its caption, the other
captions of the batch and two near misses of its own (another colour, shape or count, swapped attributes, the opposite
relation). An auxiliary loss asks each image patch which object covers it; it is not part of the shipped model, but
lets so small a run learn shapes within minutes.
"""

import json
import logging
import math
import time
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from .captions import caption
from .drawing import PATCH, draw, patch_labels
from .scenes import COLOURS, RELATIONS, SHAPES, Spec, place, sample_spec
from .text import MAX_TOKENS, make_tokenizer, save_tokenizer

log = logging.getLogger(__name__)
CONFIG = {
    "embed_dim": 128,
    "quick_gelu": True,
    "vision_cfg": {
        "image_size": 64,
        "layers": 4,
        "width": 128,
        "head_width": 32,
        "patch_size": PATCH,
        "pool_type": "avg",
    },
    "text_cfg": {
        "context_length": MAX_TOKENS,
        "vocab_size": len(make_tokenizer()),
        "hf_tokenizer_name": "shapes",
        "width": 128,
        "heads": 4,
        "layers": 3,
    },
}
PREPROCESS = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic", "resize_mode": "shortest"}


def near_miss(spec: Spec, rng: np.random.Generator) -> Spec:
    """A meaning that differs from `spec` in one respect; most often in how many objects there are.

    (A model that minds a missing object more than one too many rewards crowded pictures.)
    """
    groups: list[list] = [list(g) for g in spec.groups]
    k, draw_colour, draw_shape = rng.integers(len(groups)), list(COLOURS)[rng.integers(6)], SHAPES[rng.integers(4)]
    relation = spec.relation
    kinds = (
        ["count", "extra", "colour", "shape"] + ["fewer", "swap"] * (len(groups) > 1) + ["relation"] * bool(relation)
    )
    kind = kinds[rng.integers(len(kinds))]
    if kind == "count":
        groups[k][2] = int(rng.choice([n for n in (1, 2, 3, 4) if n != groups[k][2]]))
        relation = None if rng.random() < 0.5 else relation
    elif kind == "extra" and len(groups) < 3:
        groups, relation = [*groups, [draw_colour, draw_shape, 1]], None
    elif kind == "fewer":
        groups, relation = [g for i, g in enumerate(groups) if i != k], None
    elif kind == "swap":
        part = 0 if groups[0][0] != groups[1][0] else 1  # colours, or shapes where the colours are equal
        groups[0][part], groups[1][part] = groups[1][part], groups[0][part]
    elif kind == "relation":
        relation = RELATIONS[rng.integers(4)]
    else:
        groups[k][kind == "shape"] = draw_shape if kind == "shape" else draw_colour
    return Spec(tuple((c, s, n) for c, s, n in groups), relation)


def take_text_tower(model: nn.Module, encoder: nn.Module) -> None:
    """Copy a transformers CLIP text encoder of the same size into an open_clip model."""
    given = {k.removeprefix("text_model."): v.detach() for k, v in encoder.state_dict().items()}
    state = {
        "token_embedding.weight": given["embeddings.token_embedding.weight"],
        "positional_embedding": given["embeddings.position_embedding.weight"],
        "ln_final.weight": given["final_layer_norm.weight"],
        "ln_final.bias": given["final_layer_norm.bias"],
        "text_projection": given["text_projection.weight"].T,
    }
    names = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    names["attn.out_proj"] = "self_attn.out_proj"
    for k in range(CONFIG["text_cfg"]["layers"]):  # type: ignore[index]
        ours, theirs = f"transformer.resblocks.{k}.", f"encoder.layers.{k}."
        for part in ("weight", "bias"):
            state |= {f"{ours}{a}.{part}": given[f"{theirs}{b}.{part}"] for a, b in names.items()}
            qkv = [given[f"{theirs}self_attn.{x}_proj.{part}"] for x in "qkv"]
            state[f"{ours}attn.in_proj_{part}"] = torch.cat(qkv)
    unknown = model.load_state_dict({k: v.float() for k, v in state.items()}, strict=False).unexpected_keys
    if unknown:
        raise ValueError(f"encoder: got weights for {unknown}, which the model lacks")


def train_clip(
    folder: Path | str,
    *,
    text_encoder: nn.Module | None = None,
    start: Path | str | None = None,
    steps: int = 3000,
    batch_size: int = 64,
    learning_rate: float = 1.5e-3,
    scenes: int = 30_000,
    seed: int = 0,
    device: str = "cpu",
    seconds: float = math.inf,
) -> nn.Module:
    """Train on drawn scenes of training captions, from the folder `start` or from nothing; writes an open_clip folder.

    Stops early after `seconds`.
    """
    torch.manual_seed(seed)
    rng, random = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    model = open_clip.model.CLIP(**CONFIG).to(device)
    if text_encoder is not None:
        take_text_tower(model, text_encoder)
    model.visual.output_tokens = True
    head = nn.Linear(128, 1 + len(COLOURS) * len(SHAPES)).to(device)
    tokenizer = make_tokenizer()
    specs = [sample_spec(rng) for _ in range(scenes)]
    placed = [place(s, rng) for s in specs]
    pictures = torch.cat([(draw(placed[i : i + 256]) * 255).byte() for i in range(0, scenes, 256)])
    labels = patch_labels(placed)
    if start is not None:
        model.load_state_dict({k: v.float() for k, v in load_file(Path(start) / "open_clip_model.safetensors").items()})
    optimizer = torch.optim.AdamW(
        [*model.parameters(), *head.parameters()], lr=learning_rate, weight_decay=0.02, fused=True
    )
    started = time.monotonic()
    for step in range(steps):
        progress = max(step / steps, (time.monotonic() - started) / seconds)
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min((step + 1) / 200, 0.5 * (1 + math.cos(math.pi * progress)) + 0.01)
        rows = torch.randint(scenes, (batch_size,), generator=random).tolist()
        chosen = [specs[r] for r in rows]
        meanings = chosen + [near_miss(s, rng) for s in chosen for _ in range(2)]
        texts = [caption(s, rng) for s in meanings]
        ids = tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids.to(device)
        images = pictures[rows].to(device).float() / 127.5 - 1
        images = images + 0.1 * torch.rand(batch_size, 1, 1, 1) * torch.randn(images.shape, generator=random).to(device)
        pooled, tokens = model.visual(images)
        similarity = F.normalize(pooled, dim=-1) @ F.normalize(model.encode_text(ids), dim=-1).T
        logits = similarity * model.logit_scale.exp().clamp(max=100)
        keys = [s.key() for s in meanings]
        same = torch.tensor([[a == b for b in keys] for a in keys[:batch_size]])
        same[:, :batch_size].fill_diagonal_(False)
        logits = logits.masked_fill(same.to(device), -1e4)  # another wording of one's own meaning is no negative
        target = torch.arange(batch_size, device=device)
        contrast = F.cross_entropy(logits, target) + F.cross_entropy(logits[:, :batch_size].T, target)
        patches = F.cross_entropy(head(tokens).flatten(0, 1), labels[rows].to(device).flatten())
        loss = contrast / 2 + patches
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            hit = (logits.argmax(-1) == target).float().mean().item()
            log.info(
                "clip step %d contrast %.3f patches %.3f top-1 %.2f seconds %.0f",
                *(step, contrast.item() / 2, patches.item(), hit, time.monotonic() - started),
            )
    model.visual.output_tokens = False
    save_clip(model.eval(), folder)
    return model


def save_clip(model: nn.Module, folder: Path | str) -> None:
    """Write config, fp16 weights and tokenizer in open_clip's "local-dir" layout."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": CONFIG, "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = {k: v.detach().half().contiguous().cpu() for k, v in model.state_dict().items()}
    save_file(weights, str(folder / "open_clip_model.safetensors"))
    save_tokenizer(folder)
