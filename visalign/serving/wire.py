"""What travels between the server of rewards and its client: JSON, with tensors beside it.

In JSON a tensor is {"$part": NAME}, a part of a multipart request, or {"$data": BASE64}. Either holds a .npy file
(exact) or, for one picture, a PNG or JPEG file, which gives (3, H, W) in [0, 1].
"""

import base64
import binascii
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visalign.images import pil_to_images, read_picture
from visalign.rewards.base import RewardOutput

DTYPES = ("float16", "float32", "float64", "uint8", "int32", "int64", "bool")
MAX_VALUES = 2**28  # of all tensors of a request: 1 GB of floats
MAX_PIXELS = 4096 * 4096  # of a compressed picture, which may be far larger than the file it comes in
NPY = b"\x93NUMPY"


def tensor_to_npy(tensor: Tensor) -> bytes:
    """A tensor as a .npy file; bfloat16, which numpy lacks, as float32."""
    tensor = tensor.detach().cpu().contiguous()
    buffer = io.BytesIO()
    np.save(buffer, (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy())
    return buffer.getvalue()


def npy_to_tensor(data: bytes) -> Tensor:
    """The tensor in a .npy file. Nothing in it is run, and no more memory taken than the file has bytes.

    Raises:
        ValueError: no such file, a type other than DTYPES, or another length than its header says.
    """
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
    except Exception as error:  # the header is Python's literal syntax: what its reader may raise is not told
        raise ValueError(f"npy: got no readable .npy file ({' '.join(str(error).split())[:200]})") from None
    if dtype.name not in DTYPES or fortran:
        raise ValueError(f"npy: got {dtype}{' in Fortran order' if fortran else ''}, expected one of {DTYPES}")
    expected, got = math.prod(shape) * dtype.itemsize, len(data) - file.tell()
    if expected != got:
        raise ValueError(f"npy: got {got} bytes of data, expected {expected} for {dtype} {shape}")
    array = np.frombuffer(data, dtype, offset=file.tell()).reshape(shape)
    return torch.from_numpy(array.astype(dtype.newbyteorder("=")))  # a copy, which may be written to


def file_to_tensor(data: bytes) -> Tensor:
    """A .npy file as it is; a PNG or JPEG in RGB as a picture (3, H, W), float32 in [0, 1]."""
    if data.startswith(NPY):
        return npy_to_tensor(data)
    try:
        return pil_to_images([read_picture(io.BytesIO(data), ("PNG", "JPEG"), MAX_PIXELS)])[0]
    except ValueError as error:
        raise ValueError(f"picture: got no readable .npy, PNG or JPEG file ({str(error)[:200]})") from None


def pack(value: Any, parts: dict[str, bytes], place: str = "value") -> Any:
    """`value` as JSON can hold it, its tensors and arrays put into `parts` by name.

    Raises:
        ValueError: something in it that cannot be sent.
    """
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if isinstance(value, Tensor):
        name = f"t{len(parts)}"
        parts[name] = tensor_to_npy(value)
        return {"$part": name}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or key in ("$part", "$data"):
                raise ValueError(f"{place}: got the key {key!r}, which cannot be sent, expected other strings")
        return {key: pack(entry, parts, f"{place}.{key}") for key, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [pack(entry, parts, f"{place}[{n}]") for n, entry in enumerate(value)]
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise ValueError(f"{place}: got {type(value).__name__}, which cannot be sent to a server")


def unpack(value: Any, parts: Mapping[str, bytes]) -> Any:
    """What `pack` was given, from its result.

    Raises:
        ValueError: a part that is missing, or does not hold what it should; or more numbers than MAX_VALUES in all.
    """
    return _Reader(parts)(value)


class _Reader:
    """Unpacks what belongs to one request, whose pictures may be far larger than the files they come in."""

    def __init__(self, parts: Mapping[str, bytes]) -> None:
        self.parts, self.left = parts, MAX_VALUES

    def __call__(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self(entry) for entry in value]
        if not isinstance(value, dict):
            return value
        if value.keys() == {"$part"}:
            if not isinstance(value["$part"], str) or value["$part"] not in self.parts:
                raise ValueError(f"part: got {value['$part']!r}, expected one of {sorted(self.parts)}")
            return self.counted(self.parts[value["$part"]])
        if value.keys() == {"$data"}:
            try:
                return self.counted(base64.b64decode(value["$data"], validate=True))
            except (TypeError, binascii.Error):
                raise ValueError("$data: got no base64 text, expected that of a .npy, PNG or JPEG file") from None
        return {key: self(entry) for key, entry in value.items()}

    def counted(self, data: bytes) -> Tensor:
        tensor = file_to_tensor(data)
        self.left -= tensor.numel()
        if self.left < 0:
            raise ValueError(f"request: got pictures of more than {MAX_VALUES:,} values in all, expected fewer")
        return tensor


def read_request(document: bytes, parts: Mapping[str, bytes]) -> tuple[Tensor, list[str], dict[str, Any] | None]:
    """Images, prompts and context of a request. uint8 images become floats in [0, 1].

    Raises:
        ValueError: a request that is not {"images": ..., "prompts": [...], "context": {...} or nothing}.
    """
    try:
        request = json.loads(document)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"request: got no JSON ({str(error)[:100]})") from None
    keys = sorted(request) if isinstance(request, dict) else type(request).__name__
    if keys not in (["images", "prompts"], ["context", "images", "prompts"]):
        raise ValueError(f"request: got {keys}, expected 'images', 'prompts' and perhaps 'context'")
    read = _Reader(parts)
    try:
        images, context = read(request["images"]), read(request.get("context"))
    except RecursionError:
        raise ValueError("request: got JSON that is nested too deep") from None
    if isinstance(images, list) and images and all(isinstance(image, Tensor) for image in images):
        sizes = sorted({tuple(image.shape) for image in images})
        if len(sizes) > 1:
            raise ValueError(f"images: got pictures of shapes {sizes[:4]} in one request, expected one")
        images = torch.stack(images)
    if isinstance(images, Tensor) and images.ndim == 0:
        raise ValueError("images: got a single number, expected a tensor (N, 3, H, W)")
    if not isinstance(images, Tensor):
        raise ValueError(f"images: got {type(images).__name__}, expected a tensor or a list of pictures")
    if not isinstance(request["prompts"], list):
        raise ValueError(f"prompts: got {type(request['prompts']).__name__}, expected a list of strings")
    if context is not None and not isinstance(context, dict):
        raise ValueError(f"context: got {type(context).__name__}, expected an object")
    if images.dtype == torch.uint8:
        images = images.float() / 255
    return images.float() if images.is_floating_point() else images, request["prompts"], context


def write_output(output: RewardOutput) -> dict[str, Any]:
    """An output as JSON, but for its `extra`; null for NaN. Numbers are written out in full, so nothing is rounded."""
    return {
        "scores": _numbers(output.scores),
        "valid": None if output.valid is None else output.valid.tolist(),
        "criteria": {name: _numbers(values) for name, values in output.criteria.items()},
        "rationale": None if output.rationale is None else list(output.rationale),
        "uncertainty": None if output.uncertainty is None else _numbers(output.uncertainty),
    }


def read_output(answer: Mapping[str, Any]) -> RewardOutput:
    """The output in a server's answer.

    Raises:
        KeyError, TypeError, ValueError, RuntimeError: it is not what `write_output` gives; names the field.
    """
    reasons, criteria = answer["rationale"], answer["criteria"]
    if not (reasons is None or isinstance(reasons, list) and all(r is None or isinstance(r, str) for r in reasons)):
        raise ValueError(f"rationale: got {str(reasons)[:60]!r}, expected null or a list of texts")
    if not isinstance(criteria, dict):
        raise ValueError(f"criteria: got {type(criteria).__name__}, expected an object")
    for name, values in {"scores": answer["scores"], "valid": answer["valid"], **criteria}.items():
        if not isinstance(values, list) and not (name == "valid" and values is None):
            raise ValueError(f"{name}: got {type(values).__name__}, expected a list")
    return RewardOutput(
        scores=_tensor(answer["scores"]),
        valid=None if answer["valid"] is None else torch.tensor(answer["valid"], dtype=torch.bool),
        criteria={name: _tensor(values) for name, values in answer["criteria"].items()},
        rationale=answer["rationale"],
        uncertainty=None if answer["uncertainty"] is None else _tensor(answer["uncertainty"]),
    )


def _numbers(values: Tensor) -> list[float | str | None]:
    return [x if math.isfinite(x) else None if math.isnan(x) else str(x) for x in values.float().tolist()]


def _tensor(values: Sequence[float | str | None]) -> Tensor:
    return torch.tensor([math.nan if x is None else float(x) for x in values], dtype=torch.float32)
