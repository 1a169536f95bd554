"""Options that all vision-language models run here share, and loading one from a folder or the hub's cache."""

import math
from typing import Any

import torch

from visalign.worlds import JUDGES

DTYPES = ("float32", "bfloat16", "float16")


def check_vlm_options(dtype: str = "float32", batch_size: int = 16, fps: float = 2.0) -> None:
    """Raise ValueError for options that no model accepts."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, expected one of {DTYPES}")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size!r}, expected a whole number >= 1")
    if isinstance(fps, bool) or not isinstance(fps, (int, float)) or not 0 < fps < math.inf:
        raise ValueError(f"fps: got {fps!r}, expected a number above 0")


def load_vlm(model: str, dtype: str, download: bool) -> tuple[Any, Any]:
    """The model and its processor; ValueError if nothing of that name is on this machine, or it is no such model."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, options = str(JUDGES.get(model, model)), {"local_files_only": not download}
    try:
        processor = AutoProcessor.from_pretrained(model, **options)
        loaded = AutoModelForImageTextToText.from_pretrained(model, dtype=getattr(torch, dtype), **options)
    except Exception as error:  # a missing or broken checkpoint shows in many types of error
        advice = "" if download else " (looked on this machine only; pass download=True to fetch it)"
        raise ValueError(f"model: could not load {model!r}{advice}: {' '.join(str(error).split())[:300]}") from error
    return loaded, processor
