"""A random open_clip model of a few thousand weights, in the folder layout of a real one."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from visalign.worlds.shapes.text import MAX_TOKENS, make_tokenizer, save_tokenizer

EMBEDDING = 24
PREPROCESS = {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28], "interpolation": "bicubic"}


def save_tiny_clip(folder: Path, resize_mode: str = "shortest", seed: int = 0) -> Path:
    """Write open_clip_config.json, weights and tokenizer; 32-pixel images. Returns the folder."""
    import open_clip

    config = {
        "embed_dim": EMBEDDING,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {
            "context_length": MAX_TOKENS,
            "vocab_size": len(make_tokenizer()),
            "hf_tokenizer_name": "shapes",
            "width": 32,
            "heads": 2,
            "layers": 2,
        },
    }
    torch.manual_seed(seed)
    model = open_clip.model.CLIP(**config)
    folder.mkdir(parents=True, exist_ok=True)
    about = {"model_cfg": config, "preprocess_cfg": PREPROCESS | {"resize_mode": resize_mode}}
    (folder / "open_clip_config.json").write_text(json.dumps(about))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, str(folder / "open_clip_model.safetensors"))
    save_tokenizer(folder)
    return folder
