"""How the denoiser computes: attention by diffusers' own backends, and its blocks compiled."""

from typing import Any

import torch
from torch import nn

NAMES = {
    "sdpa": "native",
    "flash": "flash",
    "flash3": "_flash_3",
    "sage": "sage",
    "xformers": "xformers",
}
NO_BACKWARD = ("sage",)


def set_attention(module: nn.Module, name: str) -> str:
    """Use an attention backend in a denoiser; returns the name of the one in use.

    Args:
        name: "auto" takes the fastest that works here for training (flash3, flash, xformers, sdpa, in this order), or
            one of sdpa, flash, flash3, sage, xformers.

    Raises:
        ValueError: unknown, not installed, unfit for this machine, or without a backward pass.
    """
    if name not in ("auto", *NAMES):
        raise ValueError(f"attention: got {name!r}, expected one of {['auto', *NAMES]}")
    if name in NO_BACKWARD:
        raise ValueError(
            f"attention: got {name!r}, which has no backward pass, expected one that can train, e.g. 'sdpa'"
        )
    on_gpu = next(module.parameters()).device.type == "cuda"
    half = next(module.parameters()).dtype in (torch.float16, torch.bfloat16)
    if name != "auto":
        if name != "sdpa" and not on_gpu:
            raise ValueError(f"attention: got {name!r}, which needs a GPU, expected 'auto' or 'sdpa' on this machine")
        _set(module, name)
        return name
    for candidate in ("flash3", "flash", "xformers") if on_gpu and half else ():
        try:
            _set(module, candidate)
            return candidate
        except ValueError:
            continue
    return "sdpa"  # what diffusers uses unless told otherwise


def compile_blocks(module: nn.Module) -> int:
    """Compile a denoiser's repeated blocks in place, each the same code: one compilation serves all; returns how many.

    Blocks are those that diffusers names for its class or, where it names none (SD3), the children of its lists of
    modules; a module without such lists is compiled whole.
    """
    names = getattr(module, "_repeated_blocks", None) or ()
    blocks = [child for child in module.modules() if type(child).__name__ in names] or [
        block for child in module.children() if isinstance(child, nn.ModuleList) for block in child
    ]
    for block in blocks or [module]:
        block.compile()
    return len(blocks or [module])


def _set(module: nn.Module, name: str) -> None:
    choose: Any = getattr(module, "set_attention_backend", None)
    if choose is None:
        if name != "sdpa":
            raise ValueError(f"attention: got {name!r}, expected 'sdpa' ({type(module).__name__} has no other)")
        return
    try:
        choose(NAMES[name])
    except (RuntimeError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"attention: got {name!r}, which cannot be used here ({reason})") from None
