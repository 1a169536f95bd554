"""Train the world's small CLIP (an `open_clip` model of its own config) from nothing, by contrast with near misses.

The text tower starts as the flow model's text encoder where that is at hand. Scenes come in pairs whose meanings nearly
agree (another colour, shape or count, swapped attributes, the opposite relation), so that both captions and pictures
have hard negatives; pictures with an object cut in two are negatives for every caption. Auxiliary losses ask each image
patch which object covers it, and both embeddings which objects they hold; their heads are not part of the shipped
model, but let so small a run learn within minutes.
"""

import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from scipy import optimize
from torch import Tensor, nn

from visalign.worlds.shapes.captions import caption
from visalign.worlds.shapes.drawing import PATCH
from visalign.worlds.shapes.scenes import COLOURS, SHAPES, Spec
from visalign.worlds.shapes.text import MAX_TOKENS, make_tokenizer, save_tokenizer

from .muon import MuonAndAdamW, warmup_cosine
from .tasks import Task, content, make_task, roughen, train_miss

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
    batch_size: int = 24,
    learning_rate: float = 1.5e-3,
    pairs: int = 15_000,
    seed: int = 0,
    device: str = "cpu",
    seconds: float = math.inf,
) -> nn.Module:
    """Train on `batch_size` pairs a step, from the folder `start` or from nothing; writes an open_clip folder.

    Stops early after `seconds`.
    """
    torch.manual_seed(seed)
    rng, random = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    model = open_clip.model.CLIP(**CONFIG).to(device)
    if text_encoder is not None:
        take_text_tower(model, text_encoder)
    if start is not None:
        model.load_state_dict({k: v.float() for k, v in load_file(Path(start) / "open_clip_model.safetensors").items()})
    model.visual.output_tokens = True
    cells = len(COLOURS) * len(SHAPES)
    heads = nn.ModuleDict(
        {"patch": nn.Linear(128, 1 + cells), "count": nn.Linear(128, 5 * cells), "relation": nn.Linear(128, 4)}
    ).to(device)
    tokenizer = make_tokenizer()
    task = make_task(pairs, rng)
    optimizer = MuonAndAdamW(model, heads.parameters(), weight_decay=0.02)
    started = time.monotonic()
    for step in range(steps):
        progress = max(step / steps, (time.monotonic() - started) / seconds)
        if progress >= 1:
            break
        first = 2 * torch.randint(pairs, (batch_size,), generator=random)
        rows = torch.stack([first, first + 1], 1).flatten().tolist()
        specs = [task.specs[r] for r in rows]
        meanings = specs + [train_miss(s, rng) for s in specs[::2]]
        texts = [caption(s, rng) for s in meanings]
        ids = tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids.to(device)
        pictures = roughen(torch.cat([task.pictures[rows], task.spoilt[rows[::3]]]).to(device), random)
        losses, hit = task_loss(model, heads, pictures, ids, meanings, task.labels[rows].to(device))
        optimizer.zero_grad()
        sum(losses.values()).backward()  # type: ignore[union-attr]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(learning_rate * warmup_cosine(step, 200, progress))
        if step % 50 == 0:
            summary = " ".join(f"{name} {value.item():.3f}" for name, value in losses.items())
            log.info("clip step %d %s top-1 %.2f seconds %.0f", step, summary, hit, time.monotonic() - started)
    model.visual.output_tokens = False
    save_clip(model.eval(), folder, fit_match(model, task, rng))
    return model


def task_loss(
    model: Any, heads: nn.ModuleDict, pictures: Tensor, ids: Tensor, meanings: list[Spec], labels: Tensor
) -> tuple[dict[str, Tensor], float]:
    """The parts of the loss of N scenes, and how often a picture finds its own text.

    Args:
        pictures: the N scenes, then spoilt ones that are nobody's match.
        ids: (M, MAX_TOKENS) tokens of `meanings`, the first N of them those of the scenes.
        labels: (N, 64) of `patch_labels`.
    """
    count, device = len(labels), pictures.device
    pooled, tokens = model.visual(pictures)
    image, text = F.normalize(pooled, dim=-1), F.normalize(model.encode_text(ids), dim=-1)
    logits = image @ text.T * model.logit_scale.exp().clamp(max=100)
    keys = [s.key() for s in meanings]
    same = torch.zeros(logits.shape, dtype=torch.bool)
    same[:count] = torch.tensor([[a == b for b in keys] for a in keys[:count]])
    same[:count, :count].fill_diagonal_(False)
    logits = logits.masked_fill(same.to(device), -1e4)  # another wording of one's own meaning is no negative
    target = torch.arange(count, device=device)
    contrast = F.cross_entropy(logits[:count], target) + F.cross_entropy(logits[:, :count].T, target)
    patches = F.cross_entropy(heads["patch"](tokens[:count]).flatten(0, 1), labels.flatten())
    both = torch.cat([image[:count], text[:count]]) * image.shape[1] ** 0.5  # one head for both towers: one space
    counts, relations = (x.repeat(2, *[1] * (x.ndim - 1)).to(device) for x in content(meanings[:count]))
    held = F.cross_entropy(heads["count"](both).view(-1, 5), counts.flatten()) * 5
    if (relations >= 0).any():
        held = held + 0.3 * F.cross_entropy(heads["relation"](both), relations)
    hit = (logits[:count].argmax(-1) == target).float().mean().item()
    return {"contrast": contrast / 2, "patches": patches, "content": held}, hit


@torch.no_grad()
def fit_match(model: Any, task: Task, rng: np.random.Generator, count: int = 1000) -> dict[str, float]:
    """Platt's scale and midpoint for sigmoid(scale (cosine - midpoint)), on right, nearly right and spoilt pictures."""
    random, tokenizer = torch.Generator().manual_seed(0), make_tokenizer()
    rows = list(range(0, min(2 * count, len(task.specs)), 2))
    texts = [caption(task.specs[r], rng) for r in rows]
    ids = tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids
    device = next(model.parameters()).device
    text = F.normalize(model.encode_text(ids.to(device)), dim=-1)
    missed = [r + 1 for r in rows]
    cosines = []
    for pictures in (task.pictures[rows], task.pictures[missed], task.spoilt[rows]):
        image = [model.encode_image(roughen(part.to(device), random)) for part in pictures.split(256)]
        cosines.append((F.normalize(torch.cat(image), dim=-1) * text).sum(-1).double().cpu().numpy())
    x = np.concatenate(cosines)
    scale, midpoint = platt(x, np.arange(len(x)) < len(rows))
    return {"scale": round(scale, 2), "midpoint": round(midpoint, 4)}


def platt(scores: np.ndarray, right: np.ndarray) -> tuple[float, float]:
    """Scale and midpoint of the likeliest sigmoid(scale (score - midpoint)) for labels `right` (Platt 1999)."""

    def loss(w: np.ndarray) -> float:
        logit = w[0] * (scores - w[1])
        return float(np.logaddexp(0, np.where(right, -logit, logit)).mean())

    start = (4 / float(scores.std()), float(scores.mean()))
    scale, midpoint = optimize.minimize(loss, start, method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-10}).x
    return float(scale), float(midpoint)


def save_clip(model: nn.Module, folder: Path | str, match: dict[str, float]) -> None:
    """Write config, fp16 weights and tokenizer in open_clip's "local-dir" layout, and the calibration."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": CONFIG, "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = {k: v.detach().half().contiguous().cpu() for k, v in model.state_dict().items()}
    save_file(weights, str(folder / "open_clip_model.safetensors"))
    save_tokenizer(folder)
    (folder / "visalign.json").write_text(json.dumps({"match": match}, indent=2) + "\n")
