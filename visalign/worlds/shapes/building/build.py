"""`visalign world build`: train one of the world's models from nothing, with a fixed seed."""

import logging
import sys
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL
from transformers import CLIPTextModelWithProjection

from visalign.worlds import PARTS
from visalign.worlds.shapes import WEIGHTS

from .clip import train_clip
from .consistency import train_consistency
from .diffusion import train_diffusion
from .flow import train_flow
from .taste import train_taste
from .vae import train_vae
from .vlm import train_vlm


def build(part: str, folder: Path, *, device: str = "cpu", steps: int | None = None) -> None:
    """Train one of PARTS into a folder of its name in `folder`.

    What a part learns from is the shipped model, or that in `folder` if it is there: the autoencoder for "flow", the
    flow model for "diffusion", that for "consistency", the CLIP for "taste".

    Raises:
        ValueError: an unknown part.
    """
    if part not in PARTS:
        raise ValueError(f"part: got {part!r}, expected one of {PARTS}")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    chosen: dict[str, Any] = {"device": device} | ({} if steps is None else {"steps": steps})

    def known(name: str, shipped: Path) -> Path:
        return folder / name if (folder / name).is_dir() else shipped

    if part == "vae":
        train_vae(**chosen).save_pretrained(folder / "vae")
    elif part == "clip":
        text = CLIPTextModelWithProjection.from_pretrained(WEIGHTS / "flow" / "text_encoder")
        train_clip(folder / "clip", text_encoder=text, **chosen)
    elif part == "flow":
        vae = AutoencoderKL.from_pretrained(known("vae", WEIGHTS / "flow" / "vae"))
        train_flow(vae.float().eval().requires_grad_(False), folder / "flow", **chosen)
    elif part == "diffusion":
        train_diffusion(folder / "diffusion", teacher=known("flow", WEIGHTS / "flow"), **chosen)
    elif part == "consistency":
        train_consistency(folder / "consistency", teacher=known("diffusion", WEIGHTS / "diffusion"), **chosen)
    elif part == "taste":
        train_taste(folder / "taste", known("clip", WEIGHTS / "clip"), **chosen)
    else:
        train_vlm(folder / "vlm", **chosen)
