"""A memo in front of a pipeline's `encode_prompt`: each distinct prompt is encoded once and stored once."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_PLAIN = (str, int, float, bool, type(None), torch.dtype, torch.device)


class PromptMemo:
    """Wraps `encode` (a bound `encode_prompt`); `memo.encode` takes and returns what it does.

    Prompts of a batch are encoded one by one, so that an embedding does not depend on its neighbours, and assembled
    from the memo; a negative prompt is encoded once for all prompts. Where the outputs of single prompts differ in
    length they are padded with zeros as the pipeline pads them, if that was seen to give the pipeline's own batch;
    else a batch is encoded, and remembered, as a whole. Calls with tensors or images are passed on.
    Entries keep the encoder's dtype and device.

    Attributes:
        trained: the encoders are under training: nothing is remembered from one `encode_prompt` to the next, and the
            embeddings carry gradient wherever it is recorded.
        grad: gradient is recorded in the pipeline call under way, although the pipeline's own `no_grad` hides it.
    """

    def __init__(self, encode: Callable) -> None:
        self._encode = encode
        self._signature = inspect.signature(encode)
        self._memo: dict[Any, Any] = {}
        self._negatives: dict[Any, tuple] = {}
        self._ragged: dict[int, torch.dtype] | None = None  # slots that are length masks, once learned
        self._assembles = True
        self.frozen = False  # raise for what is not remembered
        self.trained = self.grad = False

        @functools.wraps(encode)
        def encode_prompt(*args: Any, **kwargs: Any) -> Any:
            grad = self.trained and (self.grad or torch.is_grad_enabled())
            if self.trained:
                self.clear()
            with torch.set_grad_enabled(grad):
                out = self._lookup(self._signature.bind(*args, **kwargs))
            if grad:
                torch.set_grad_enabled(True)  # pipelines join the embeddings before their loop; it ends with their call
            return out

        self.encode = encode_prompt

    def clear(self) -> None:
        """Forget everything; needed when a text encoder's weights have changed."""
        self._memo.clear()
        self._negatives.clear()

    def __len__(self) -> int:
        return len(self._memo)

    def _lookup(self, bound: inspect.BoundArguments) -> Any:
        bound.apply_defaults()
        arguments = bound.arguments
        try:
            _freeze(arguments)
        except TypeError:
            return self._encode(*bound.args, **bound.kwargs)
        prompts = arguments.get("prompt")
        if self._assembles and isinstance(prompts, list) and prompts and not _repeats(arguments):
            rows = [self._row(_single(arguments, index, len(prompts))) for index in range(len(prompts))]
            out = rows[0] if len(rows) == 1 else self._assemble(rows, arguments)
            if out is not None:
                return _fresh(out)
            self._assembles = False
        return _fresh(self._remember(arguments))

    def _remember(self, arguments: dict[str, Any]) -> Any:
        key = _freeze(arguments)
        if key not in self._memo:
            if self.frozen:
                raise ValueError(
                    f"prompts: got {arguments.get('prompt')!r}, not encoded before the text encoders were released"
                )
            # Lists are copied: Z-Image writes its chat template into the prompts it is given.
            self._memo[key] = self._encode(**{k: list(v) if isinstance(v, list) else v for k, v in arguments.items()})
        return self._memo[key]

    def _row(self, arguments: dict[str, Any]) -> Any:
        """One prompt's outputs; its negative half is taken from the first prompt encoded beside the same negative."""
        if not arguments.get("do_classifier_free_guidance"):
            return self._remember(arguments)
        key = _freeze({k: v for k, v in arguments.items() if "prompt" not in k or "negative" in k})
        if _freeze(arguments) in self._memo or key not in self._negatives:
            out = self._remember(arguments)
            if isinstance(out, tuple):
                self._negatives.setdefault(key, out)
            return out
        # Guided encoders encode the negative prompt anew beside each prompt: twice the work for the same half.
        negative = self._negatives[key]
        positive = self._remember({**arguments, "do_classifier_free_guidance": False})
        if not isinstance(positive, tuple) or len(positive) != len(negative):
            return self._remember(arguments)
        return tuple(n if _empty(p) else p for p, n in zip(positive, negative))

    def _assemble(self, rows: list[Any], arguments: dict[str, Any]) -> Any:
        """One batch from its rows, or None where this pipeline's outputs cannot be put together."""
        if isinstance(rows[0], Tensor):
            return _join(rows)
        if not all(isinstance(row, tuple) and len(row) == len(rows[0]) for row in rows):
            return None
        slots = list(zip(*rows))
        joined = [_join(list(values)) for values in slots]
        if any(out is None and values[0] is not None for out, values in zip(joined, slots)):
            return None
        # Rows of different lengths are padded as the encoder itself pads a batch, which no signature tells: the first
        # such batch is also encoded as it stands, and rows are put together from then on only if the two agree.
        if not any(_is_ragged(values) for values in slots):
            return tuple(joined)
        if self._ragged is None:
            own = self._remember(arguments)
            self._ragged = {
                slot: out.dtype for slot, out in enumerate(own) if joined[slot] is None and isinstance(out, Tensor)
            }
            padded = _with_masks(joined, slots, self._ragged)
            if not all(_same(a, b) for a, b in zip(padded, own)):
                return None
        return tuple(_with_masks(joined, slots, self._ragged))


def _freeze(value: Any) -> Any:
    """Hashable, by content. Raises TypeError for tensors, images and other objects."""
    if isinstance(value, dict):
        return tuple((k, _freeze(v)) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(_freeze(v) for v in value)
    if isinstance(value, _PLAIN):
        return (type(value).__name__, value)
    raise TypeError(type(value).__name__)


def _repeats(arguments: dict[str, Any]) -> bool:
    return any(k.startswith("num_") and k.endswith("_per_prompt") and v not in (None, 1) for k, v in arguments.items())


def _single(arguments: dict[str, Any], index: int, count: int) -> dict[str, Any]:
    return {
        k: [v[index]] if k.split("_")[-1] != "instruction" and "prompt" in k and _per_sample(v, count) else v
        for k, v in arguments.items()
    }


def _per_sample(value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count


def _empty(value: Any) -> bool:
    return value is None or (isinstance(value, list) and not value)


def _fresh(out: Any) -> Any:
    """New containers: some pipelines extend the lists they get."""
    if isinstance(out, tuple):
        return tuple(list(x) if isinstance(x, list) else x for x in out)
    return list(out) if isinstance(out, list) else out


def _is_ragged(values: tuple) -> bool:
    return isinstance(values[0], Tensor) and any(v.shape != values[0].shape for v in values)


def _join(values: list[Any]) -> Any:
    """One slot of the outputs for a batch; None where the rows say nothing of it or do not go together."""
    first = values[0]
    if all(isinstance(v, list) for v in values):
        return [x for v in values for x in v]
    if not all(isinstance(v, Tensor) and v.ndim == first.ndim for v in values):
        return None
    if all(v.shape[0] == 1 for v in values):
        longest = max(v.shape[1] for v in values) if first.ndim > 1 else 0
        return torch.cat([_pad(v, longest) for v in values])
    return first if all(torch.equal(v, first) for v in values) else None  # position ids, shared by the batch


def _pad(row: Tensor, length: int) -> Tensor:
    if row.ndim < 2 or row.shape[1] == length:
        return row
    return torch.cat([row, row.new_zeros(1, length - row.shape[1], *row.shape[2:])], dim=1)


def _with_masks(joined: list[Any], slots: list[tuple], masks: dict[int, torch.dtype]) -> list[Any]:
    """Fills mask slots, empty for single prompts (nothing is padded), from the lengths of the slot before them."""
    out = list(joined)
    for slot, dtype in masks.items():
        lengths = torch.tensor([v.shape[1] for v in slots[slot - 1]])
        positions = torch.arange(int(lengths.max()))
        out[slot] = (positions < lengths[:, None]).to(joined[slot - 1].device, dtype)
    return out


def _same(ours: Any, own: Any) -> bool:
    if not isinstance(ours, Tensor) or not isinstance(own, Tensor):
        return type(ours) is type(own)
    if ours.shape != own.shape:
        return False
    tolerance = 1e-4 if own.dtype == torch.float32 else 3e-2
    return torch.allclose(ours.float(), own.float(), rtol=tolerance, atol=tolerance * float(own.abs().max()))
