"""Tiny random vision-language models of the families people use, saved as their published checkpoints are."""

from pathlib import Path

import torch

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
SPECIAL += ["<|video_pad|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = ["Yes", "No", "yes", "no", "YES", "NO"] * 4
CORPUS += ["Yes No yes no YES NO Yes No Yes No yes no yes no", " Yes No yes no YES NO", "user assistant system"]
CORPUS += ["Does this figure show a red circle? Answer Yes or No. Describe this image in detail"]


def make_tokenizer(vocabulary: int = 400):
    """A byte-level BPE tokenizer with the Qwen special tokens; Yes, No, yes, no and YES, NO are tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, special_tokens=SPECIAL)
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.add_special_tokens({"additional_special_tokens": SPECIAL[1:2] + SPECIAL[3:]})
    return fast


def make_processor(family: str, tokenizer):
    """The family's real processor around the tiny tokenizer."""
    from transformers import (
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    patch = 16 if family == "qwen3_vl" else 14
    options = {"patch_size": patch, "min_pixels": (2 * patch) ** 2, "max_pixels": (8 * patch) ** 2}
    if family == "qwen3_vl":
        options |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    image_processor = Qwen2VLImageProcessor(**options)
    if family == "qwen3_vl":
        return Qwen3VLProcessor(image_processor, tokenizer, Qwen3VLVideoProcessor(), chat_template=TEMPLATE)
    kind = Qwen2VLProcessor if family == "qwen2_vl" else Qwen2_5_VLProcessor
    return kind(image_processor, tokenizer, Qwen2VLVideoProcessor(**options), chat_template=TEMPLATE)


def make_model(family: str, tokenizer, seed: int = 0, hidden: int = 32, layers: int = 2):
    """A random model of the family, float32; the head is not tied, and weights are large enough to matter."""
    import transformers

    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in _TOKENS.items()}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 16,
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
    }
    vision = {"depth": 2, "num_heads": 2, "patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2}
    if family == "qwen2_vl":
        vision |= {"embed_dim": 32, "hidden_size": hidden, "mlp_ratio": 2}
        config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, **ids)
        kind = transformers.Qwen2VLForConditionalGeneration
    elif family == "qwen2_5_vl":
        vision |= {"hidden_size": 32, "out_hidden_size": hidden, "intermediate_size": 48, "window_size": 56}
        vision |= {"fullatt_block_indexes": [1]}
        config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
        kind = transformers.Qwen2_5_VLForConditionalGeneration
    else:
        text |= {"head_dim": 16, "rope_parameters": {**text["rope_parameters"], "mrope_interleaved": True}}
        vision |= {"hidden_size": 32, "out_hidden_size": hidden, "intermediate_size": 48, "patch_size": 16}
        vision |= {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}
        config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **ids)
        kind = transformers.Qwen3VLForConditionalGeneration
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config)
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=1.5 / weight[0].numel() ** 0.5 if "embed" not in name else 1.0)
    return model.eval()


_TOKENS = {"image_token_id": "image_pad", "video_token_id": "video_pad"}
_TOKENS |= {"vision_start_token_id": "vision_start", "vision_end_token_id": "vision_end"}


def save_tiny_vlm(folder: Path, family: str = "qwen2_5_vl", seed: int = 0) -> Path:
    """Model and processor in `folder`, as a hub checkpoint has them."""
    tokenizer = make_tokenizer()
    make_model(family, tokenizer, seed).save_pretrained(folder)
    make_processor(family, tokenizer).save_pretrained(folder)
    return folder
