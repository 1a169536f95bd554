"""`visalign world build`: train one of the world's models from nothing, with a fixed seed."""

import logging
import sys
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL
from transformers import CLIPTextModelWithProjection

from . import WEIGHTS
from .build_clip import train_clip
from .build_flow import train_flow
from .build_taste import train_taste
from .build_vae import train_vae
from .build_vlm import train_vlm


def build(part: str, folder: Path, *, device: str = "cpu", steps: int | None = None) -> None:
    """Train "vae", "clip", "flow", "taste" or "vlm" into `folder`.

    "flow" uses the shipped autoencoder, or `folder`/vae if it is there; "taste" likewise the CLIP.

    Raises:
        ValueError: an unknown part.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    chosen: dict[str, Any] = {"device": device} | ({} if steps is None else {"steps": steps})
    if part == "vae":
        train_vae(**chosen).save_pretrained(folder / "vae")
    elif part == "clip":
        text = CLIPTextModelWithProjection.from_pretrained(WEIGHTS / "flow" / "text_encoder")
        train_clip(folder / "clip", text_encoder=text, **chosen)
    elif part == "flow":
        own = folder / "vae"
        vae = AutoencoderKL.from_pretrained(own if own.is_dir() else WEIGHTS / "flow" / "vae")
        train_flow(vae.float().eval().requires_grad_(False), folder / "flow", **chosen)
    elif part == "taste":
        own = folder / "clip"
        train_taste(folder / "taste", own if own.is_dir() else WEIGHTS / "clip", **chosen)
    elif part == "vlm":
        train_vlm(folder / "vlm", **chosen)
    else:
        raise ValueError(f"part: got {part!r}, expected 'vae', 'clip', 'flow', 'taste' or 'vlm'")
