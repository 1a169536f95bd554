"""Train the head that reads the world's taste from a picture, on patch tokens of the world's own frozen CLIP."""

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from scipy import stats
from torch import Tensor

from visalign.worlds.shapes import WEIGHTS
from visalign.worlds.shapes.drawing import draw
from visalign.worlds.shapes.scenes import Scene, place, sample_spec
from visalign.worlds.shapes.taste import FILE, TasteHead, taste

from .muon import warmup_cosine
from .tasks import roughen

log = logging.getLogger(__name__)
EMPTY = 1 / 16  # share of training scenes whose objects are taken away


def tasted_scenes(count: int, rng: np.random.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
    """Pictures (N, 3, 64, 64) uint8 of scenes of a split, and their taste (N,), from 1 to 10."""
    scenes = [place(sample_spec(rng, split), rng) for _ in range(count)]
    if split == "train":
        scenes = [Scene((), s.background, s.gradient) if rng.random() < EMPTY else s for s in scenes]
    return (draw(scenes) * 255).byte(), torch.tensor([taste(s) for s in scenes])


def train_taste(
    folder: Path | str,
    clip: Path | str = WEIGHTS / "clip",
    *,
    steps: int = 4000,
    batch_size: int = 64,
    scenes: int = 12_000,
    learning_rate: float = 3e-3,
    seed: int = 0,
    device: str = "cpu",
    checked: int = 500,
) -> TasteHead:
    """Train on the tokens of `scenes` training scenes by the squared error; writes `taste.safetensors` into `folder`.

    How well the head does on `checked` scenes of each held-out split is logged; nothing is chosen by it.
    """
    torch.manual_seed(seed)
    rng, random = np.random.default_rng([seed, 17]), torch.Generator().manual_seed(seed)
    model: Any = open_clip.create_model(f"local-dir:{clip}", require_pretrained=True).to(device).eval()
    model.visual.output_tokens = True
    started = time.monotonic()
    parts = []
    for start in range(0, scenes, 256):
        pictures, known = tasted_scenes(min(256, scenes - start), rng)
        with torch.no_grad():
            parts.append((model.visual(roughen(pictures.to(device), random))[1].half(), known))
    tokens, scores = (torch.cat(column).to(device) for column in zip(*parts))
    log.info("taste: tokens of %d scenes, seconds %.0f", scenes, time.monotonic() - started)
    head = TasteHead().to(device)
    optimizer = torch.optim.AdamW(head.parameters(), weight_decay=0.02)
    for step in range(steps):
        rows = torch.randint(scenes, (batch_size,), generator=random).to(device)
        loss = F.mse_loss(head(tokens[rows].float()), scores[rows])
        optimizer.param_groups[0]["lr"] = learning_rate * warmup_cosine(step, 30, step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 500 == 0:
            log.info("taste step %d error %.3f seconds %.0f", step, loss.item() ** 0.5, time.monotonic() - started)
    head = head.eval().requires_grad_(False)
    for split in ("test", "compositional"):
        rank, explained = held_out(model, head, split, checked)
        log.info("taste of %d %s scenes: Spearman %.3f R2 %.3f", checked, split, rank, explained)
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file({name: w.half().contiguous().cpu() for name, w in head.state_dict().items()}, str(Path(folder) / FILE))
    return head


@torch.no_grad()
def held_out(model: Any, head: TasteHead, split: str, count: int) -> tuple[float, float]:
    """Spearman's correlation and R^2 of the head on drawn scenes of a split; `model` gives tokens."""
    pictures, scores = tasted_scenes(count, np.random.default_rng(1), split)
    device = next(head.parameters()).device
    predicted = head(model.visual((pictures.float() / 127.5 - 1).to(device))[1]).cpu()
    explained = 1 - float((predicted - scores).square().mean() / scores.var(correction=0))
    return float(stats.spearmanr(predicted, scores).statistic), explained
