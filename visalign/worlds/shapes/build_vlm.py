"""Train the world's vision-language model: a real Qwen2.5-VL, only small, that answers questions about pictures.

A sequence holds one picture (or two, to compare) and several questions in turn, so that one reading of the picture
teaches several answers. An auxiliary loss asks the vision tower which object covers each patch; its head is not part of
the shipped model.
"""

import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from .captions import caption
from .lessons import Lesson, make_lesson, roughen
from .muon import MuonAndAdamW, warmup_cosine
from .questions import BETTER, SAME, WHOLE, Question, ask, question_words
from .scenes import COLOURS, SHAPES, SIZE

log = logging.getLogger(__name__)
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
PIXEL: dict[str, Any] = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2}
PIXEL |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_processor() -> Qwen2_5_VLProcessor:
    """Tokenizer (the world's words whole, anything else in pieces), picture rules and chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([*question_words() * 3, "user", "assistant", "system"], trainer)
    stored = json.loads(bpe.to_str())["model"]
    vocab = dict(stored["vocab"])
    for token in SPECIAL:
        vocab[token] = len(vocab)
    merges = [tuple(pair) for pair in stored["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL[1:])})
    pixels = {"min_pixels": SIZE**2, "max_pixels": 4 * SIZE**2}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**PIXEL, **pixels),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**PIXEL, **pixels),
        chat_template=CHAT,
    )


def make_vlm(processor: Qwen2_5_VLProcessor, width: int = 128, layers: int = 4) -> Qwen2_5_VLForConditionalGeneration:
    """An untrained model of the world's size."""
    token = processor.tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(processor.tokenizer),
            "hidden_size": width,
            "intermediate_size": 3 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": width // 32,
            "num_key_value_heads": width // 32,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]},
            "bos_token_id": None,
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
        },
        vision_config={
            "depth": 4,
            "hidden_size": width,
            "intermediate_size": 3 * width,
            "num_heads": width // 32,
            "patch_size": PIXEL["patch_size"],
            "spatial_merge_size": PIXEL["merge_size"],
            "temporal_patch_size": PIXEL["temporal_patch_size"],
            "window_size": 2 * SIZE,
            "out_hidden_size": width,
            "fullatt_block_indexes": [0, 1, 2, 3],
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def patches(images: Tensor) -> Tensor:
    """Pictures (N, 3, 64, 64) in [-1, 1] as the model's processor cuts them: rows (N * 64, C * 2 * 8 * 8)."""
    n, size, merge = len(images), PIXEL["patch_size"], PIXEL["merge_size"]
    side = images.shape[-1] // (size * merge)
    cut = images.view(n, 3, side, merge, size, side, merge, size).permute(0, 2, 5, 3, 6, 1, 4, 7)
    return cut.unsqueeze(6).expand(*cut.shape[:6], 2, *cut.shape[6:]).reshape(n * (side * merge) ** 2, -1)


def merge_order(labels: Tensor) -> Tensor:
    """Patch labels (N, 64) of rows from left to right, in the order of `patches`: blocks of two by two."""
    return labels.view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(len(labels), 64)


def turns(
    lesson: Lesson, rows: list[int], rng: np.random.Generator
) -> tuple[list[list[Question]], list[int], list[int]]:
    """Questions for each row of a batch, the pictures they are about, and how many pictures each row has.

    Pictures are numbers into lesson.pictures, or -1 - k for spoilt picture k.
    """
    asked: list[list[Question]] = []
    pictures: list[int] = []
    counts: list[int] = []
    number = int(rng.choice([1, 4, 7]))  # questions in turn; one number a batch, so that little is padded
    for row in rows:
        spec, miss, chance = lesson.specs[row], lesson.specs[row ^ 1], rng.random()
        if chance < 0.1:  # two pictures: the same meaning or not, or which one shows a caption
            second = row if rng.random() < 0.5 else row ^ 1
            if rng.random() < 0.5:
                asked.append([Question("same", SAME, "Yes" if second == row else "No")])
            else:
                second = row ^ 1
                better = rng.random() < 0.5
                said = lesson.specs[second if better else row]
                asked.append([Question("better", BETTER.format(caption(said, rng)), "Yes" if better else "No")])
            pictures += [row, second]
            counts.append(2)
        elif chance < 0.2:
            spoilt = rng.random() < 0.5
            pictures.append(-1 - row if spoilt else row)
            asked.append([Question("whole", WHOLE, "No" if spoilt else "Yes")])
            counts.append(1)
        else:
            pictures.append(row)
            distinct = {q.text: q for q in (ask(spec, miss, rng) for _ in range(number))}.values()
            asked.append(sorted(distinct, key=lambda q: q.kind == "describe"))  # last: it gives the others away
            counts.append(1)
    return asked, pictures, counts


def conversation(processor: Any, questions: list[Question], pictures: int) -> tuple[list[int], list[int]]:
    """Token ids of the pictures and the questions with their answers, and labels: -100 but where an answer stands."""
    tokenizer, visual = processor.tokenizer, "<|vision_start|>" + "<|image_pad|>" * 16 + "<|vision_end|>"
    ids: list[int] = []
    labels: list[int] = []
    for k, question in enumerate(questions):
        before = f"<|im_start|>user\n{visual * pictures if k == 0 else ''}{question.text}<|im_end|>\n"
        before += "<|im_start|>assistant\n"
        for text, taught in ((before, False), (question.answer + "<|im_end|>", True), ("\n", False)):
            piece = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += piece
            labels += piece if taught else [-100] * len(piece)
    return ids, labels


def train_vlm(
    folder: Path | str,
    *,
    start: Path | str | None = None,
    steps: int = 4000,
    batch_size: int = 32,
    learning_rate: float = 1.5e-3,
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
    head = nn.Linear(model.config.vision_config.hidden_size, 1 + len(COLOURS) * len(SHAPES)).to(device)
    seen: list[Tensor] = []
    model.model.visual.blocks[-1].register_forward_hook(lambda _m, _a, out: seen.append(out))
    lesson = make_lesson(pairs, rng)
    optimizer = MuonAndAdamW(model, head.parameters(), betas=(0.9, 0.98))
    started, recent = time.monotonic(), {"answers": 0.0, "patches": 0.0}
    for step in range(steps):
        progress = max(step / steps, (time.monotonic() - started) / seconds)
        if progress >= 1:
            break
        rows = torch.randint(len(lesson.specs), (batch_size,), generator=random).tolist()
        asked, shown, counts = turns(lesson, rows, rng)
        drawn = torch.stack([lesson.pictures[k] if k >= 0 else lesson.spoilt[-1 - k] for k in shown])
        inputs, labels = batch_of(processor, asked, counts, device)
        logits = model(
            **inputs,
            pixel_values=patches(roughen(drawn.to(device), random)),
            image_grid_thw=torch.tensor([[1, 8, 8]] * len(shown), device=device),
        ).logits
        answers = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        clean = torch.tensor([k >= 0 for k in shown], device=device)
        known = merge_order(lesson.labels[[max(k, 0) for k in shown]]).to(device)
        plan = F.cross_entropy(head(seen.pop()).view(len(shown), 64, -1)[clean].flatten(0, 1), known[clean].flatten())
        optimizer.zero_grad()
        (answers + plan).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(learning_rate * warmup_cosine(step, 200, progress))
        for name, value in (("answers", answers), ("patches", plan)):
            recent[name] = 0.95 * recent[name] + 0.05 * value.item() if step else value.item()
        if step % 50 == 0:
            said = " ".join(f"{name} {value:.3f}" for name, value in recent.items())
            log.info("vlm step %d %s seconds %.0f", step, said, time.monotonic() - started)
        if step % 1000 == 999:
            save_vlm(model, processor, folder)
    save_vlm(model, processor, folder)
    return model


def batch_of(
    processor: Any, asked: list[list[Question]], counts: list[int], device: str = "cpu"
) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs without pixels and labels (N, T) of a batch, padded on the right."""
    rows = [conversation(processor, questions, count) for questions, count in zip(asked, counts)]
    longest = max(len(ids) for ids, _ in rows)
    pad = processor.tokenizer.pad_token_id
    ids = torch.tensor([i + [pad] * (longest - len(i)) for i, _ in rows], device=device)
    labels = torch.tensor([x + [-100] * (longest - len(x)) for _, x in rows], device=device)
    mask = torch.tensor([[1] * len(i) + [0] * (longest - len(i)) for i, _ in rows], device=device)
    visual = (ids == processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
    return {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": visual}, labels


def save_vlm(model: Qwen2_5_VLForConditionalGeneration, processor: Any, folder: Path | str) -> None:
    """Write weights in fp16, processor and chat template."""
    state = {k: v.half() for k, v in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=state)
    processor.save_pretrained(folder)


@torch.no_grad()
def accuracy(model: Any, processor: Any, lesson: Lesson, count: int = 2000, seed: int = 0) -> dict[str, float]:
    """Share of right answers to `count` held-out yes/no questions about a lesson's pictures, by kind and over "all"."""
    rng, random = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    yes, no = (processor.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("Yes", "No"))
    right: dict[str, list[bool]] = {}
    while sum(map(len, right.values())) < count:
        rows = rng.integers(len(lesson.specs), size=64).tolist()
        asked, shown, counts = turns(lesson, rows, rng)
        asked = [[next((q for q in questions if q.kind != "describe"), questions[0])] for questions in asked]
        drawn = torch.stack([lesson.pictures[k] if k >= 0 else lesson.spoilt[-1 - k] for k in shown])
        inputs, labels = batch_of(processor, asked, counts)
        grids = torch.tensor([[1, 8, 8]] * len(shown))
        logits = model(**inputs, pixel_values=patches(roughen(drawn, random)), image_grid_thw=grids).logits
        for n, ([question], taught) in enumerate(zip(asked, labels)):
            if question.answer in ("Yes", "No"):
                place = int((taught != -100).nonzero()[0]) - 1
                said = "Yes" if logits[n, place, yes] > logits[n, place, no] else "No"
                right.setdefault(question.kind, []).append(said == question.answer)
    every = [r for kind in right.values() for r in kind]
    return {kind: float(np.mean(r)) for kind, r in sorted(right.items())} | {"all": float(np.mean(every))}


def held_out_lesson(pairs: int, seed: int = 0, split: str = "test") -> Lesson:
    """Scenes of a split that no model was trained on, each with a near miss, whose meaning is a training one."""
    return make_lesson(pairs, np.random.default_rng(seed), split)
