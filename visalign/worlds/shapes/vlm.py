"""The world's vision-language model: a real Qwen2.5-VL, only small, with its tokenizer, pictures and chat template."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from .questions import question_words
from .scenes import SIZE

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


def save_vlm(model: Qwen2_5_VLForConditionalGeneration, processor: Any, folder: Path | str) -> None:
    """Write weights in fp16, processor and chat template."""
    state = {k: v.half() for k, v in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=state)
    processor.save_pretrained(folder)
