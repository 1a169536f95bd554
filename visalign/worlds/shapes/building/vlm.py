"""Train the world's vision-language model: a real Qwen2.5-VL, only small, that answers questions about pictures.

A sequence holds one picture (or two, to compare) and several questions in turn, so that one reading of the picture
teaches several answers. Auxiliary losses ask the vision tower which object covers each patch, its output for the
embeddings of the words for what it shows, and the language model, half-way, where a question names an object, how many
of it there are and on which side of the other object it stands. Their heads are not part of the shipped model.
"""

import logging
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Qwen2_5_VLForConditionalGeneration

from visalign.worlds.shapes.vlm import make_processor, make_vlm, patches, save_vlm

from .muon import MuonAndAdamW, warmup_cosine
from .tasks import Task, make_task, roughen
from .vlm_tasks import AsideLosses, batch_of, turns

log = logging.getLogger(__name__)


def train_vlm(
    folder: Path | str,
    *,
    start: Path | str | None = None,
    steps: int = 4000,
    batch_size: int = 32,
    learning_rate: float = 5e-3,
    pairs: int = 15_000,
    seed: int = 0,
    device: str = "cpu",
    seconds: float = math.inf,
) -> Qwen2_5_VLForConditionalGeneration:
    """Train, from nothing or from the folder `start`; writes a folder that `from_pretrained` loads.

    Stops early after `seconds`.
    """
    torch.manual_seed(seed)
    rng, random = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    processor = make_processor()
    model = make_vlm(processor).to(device)
    if start is not None:
        old = Qwen2_5_VLForConditionalGeneration.from_pretrained(start, dtype=torch.float32)
        model.load_state_dict(old.state_dict())
    aside = AsideLosses(model, processor).to(device)
    task = make_task(pairs, rng)
    optimizer = MuonAndAdamW(model, aside.parameters(), betas=(0.9, 0.98))
    started = time.monotonic()
    recent: dict[str, float] = {}
    for step in range(steps):
        progress = max(step / steps, (time.monotonic() - started) / seconds)
        if progress >= 1:
            break
        rows = torch.randint(len(task.specs), (batch_size,), generator=random).tolist()
        rounds, places, counts = turns(task, rows, rng)
        pictures = torch.stack([task.pictures[k] if k >= 0 else task.spoilt[-1 - k] for k in places])
        inputs, labels = batch_of(processor, rounds, counts, device)
        logits = model(
            **inputs,
            pixel_values=patches(roughen(pictures.to(device), random)),
            image_grid_thw=torch.tensor([[1, 8, 8]] * len(places), device=device),
        ).logits
        answers = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        losses = {"answers": answers} | aside(task, places, counts, inputs["input_ids"])
        optimizer.zero_grad()
        torch.stack([*losses.values()]).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(learning_rate * warmup_cosine(step, 100, progress))
        for name, value in losses.items():
            recent[name] = 0.95 * recent.get(name, value.item()) + 0.05 * value.item()
        if step % 50 == 0:
            answer = " ".join(f"{name} {value:.3f}" for name, value in recent.items())
            log.info("vlm step %d %s seconds %.0f", step, answer, time.monotonic() - started)
        if step % 1000 == 999:
            save_vlm(model, processor, folder)
    save_vlm(model, processor, folder)
    return model


@torch.no_grad()
def accuracy(model: Any, processor: Any, task: Task, count: int = 2000, seed: int = 0) -> dict[str, float]:
    """Share of right answers to `count` held-out yes/no questions about a task's pictures, by kind and over "all"."""
    rng, random = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    yes, no = (processor.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("Yes", "No"))
    right: dict[str, list[bool]] = {}
    while sum(map(len, right.values())) < count:
        rows = rng.integers(len(task.specs), size=64).tolist()
        rounds, places, counts = turns(task, rows, rng)
        rounds = [[next((q for q in questions if q.kind != "describe"), questions[0])] for questions in rounds]
        pictures = torch.stack([task.pictures[k] if k >= 0 else task.spoilt[-1 - k] for k in places])
        inputs, labels = batch_of(processor, rounds, counts)
        grids = torch.tensor([[1, 8, 8]] * len(places))
        logits = model(**inputs, pixel_values=patches(roughen(pictures, random)), image_grid_thw=grids).logits
        for n, ([question], taught) in enumerate(zip(rounds, labels)):
            if question.answer in ("Yes", "No"):
                place = int((taught != -100).nonzero()[0]) - 1
                answer = "Yes" if logits[n, place, yes] > logits[n, place, no] else "No"
                right.setdefault(question.kind, []).append(answer == question.answer)
    every = [r for kind in right.values() for r in kind]
    return {kind: float(np.mean(r)) for kind, r in sorted(right.items())} | {"all": float(np.mean(every))}


def held_out_task(pairs: int, seed: int = 0, split: str = "test") -> Task:
    """Scenes of a split that no model was trained on, each with a near miss, whose meaning is a training one."""
    return make_task(pairs, np.random.default_rng(seed), split)
