"""Tiny published checkpoints with regression heads on vision-language models."""

import torch
from tiny_vlm import make_model, make_processor, make_tokenizer

from visalign.rewards.vlm.heads import REWARD_TOKEN


def make_head_state(prefix: str, features: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    widths = {0: (1024, features), 3: (16, 1024), 5: (2, 16)}
    state = {}
    for place, shape in widths.items():
        state[f"{prefix}.{place}.weight"] = torch.randn(shape, generator=generator) * (2 / shape[1]) ** 0.5
        state[f"{prefix}.{place}.bias"] = torch.randn(shape[0], generator=generator) * 0.1
    return state


def make_checkpoint(folder, family: str, heads: dict[str, torch.Tensor]):
    """A base without the reward token in `folder`; the model with it, and the state that a release holds."""
    tokenizer = make_tokenizer()
    make_processor(family, tokenizer).save_pretrained(folder)
    make_model(family, tokenizer).config.save_pretrained(folder)
    tokenizer.add_tokens([REWARD_TOKEN], special_tokens=True)
    model = make_model(family, tokenizer, seed=5)
    return model, make_processor(family, tokenizer), {**model.state_dict(), **heads}
