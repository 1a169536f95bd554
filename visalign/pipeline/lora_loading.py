"""LoRA files into a pipeline, so that what was loaded is what the file holds."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

SIDES = ("lora_A", "lora_B", "lora_down", "lora_up", "lora.down", "lora.up")


def load_lora(pipeline: Any, lora: str | Path, adapter: str = "default_0") -> int:
    """Load a LoRA folder or file as an adapter of a pipeline; returns how many of its matrices are in use.

    Files in other tools' layouts are taken where diffusers converts them. One of which nothing, or not all, arrives in
    the model would draw the base's pictures, or others than the file's, without a word.

    Raises:
        ValueError: no LoRA there, or not all of it could be loaded.
    """
    path = Path(lora)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path] if path.is_file() else []
    if not files:
        raise ValueError(f"lora: got {str(lora)!r}, which holds no .safetensors file, expected a LoRA folder")
    wanted = lora_matrices(files[0])
    if not wanted:
        raise ValueError(f"lora: got {str(files[0])!r}, which holds no LoRA layers, expected a LoRA file")
    try:
        pipeline.load_lora_weights(str(lora), adapter_name=adapter)
    except Exception as error:  # converters of foreign layouts fail in many ways
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(
            f"lora: {str(files[0])!r} could not be loaded into {type(pipeline).__name__} ({reason})"
        ) from None
    loaded = adapter_matrices(pipeline, adapter)
    if loaded < len(wanted):
        raise ValueError(
            f"lora: of {len(wanted)} matrices in {str(files[0])!r} {loaded} came into {type(pipeline).__name__}, "
            f"expected all; its layers are called like {wanted[0]!r}: is it another model's, or another tool's?"
        )
    return loaded


def lora_matrices(file: Path) -> list[str]:
    """Names of the matrices in a LoRA file.

    Raises:
        ValueError: it is no safetensors file.
    """
    try:
        with safe_open(str(file), "pt") as tensors:
            return sorted(key for key in tensors.keys() if any(side in key for side in SIDES))  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"lora: got {str(file)!r}, which cannot be read ({' '.join(str(error).split())})") from None


def adapter_matrices(pipeline: Any, adapter: str) -> int:
    """How many matrices of an adapter a pipeline's modules hold."""
    modules = [module for module in pipeline.components.values() if isinstance(module, nn.Module)]
    names = [name for module in modules for name, _ in module.named_parameters()]
    return sum(f".{adapter}." in name and any(f"{side}." in name for side in ("lora_A", "lora_B")) for name in names)
