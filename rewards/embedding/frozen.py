"""What rewards built on published checkpoints share: finding files without a network, frozen models, one embedding
per picture."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visalign.images import check_images, check_pixels, check_references
from visalign.names import unknown_name
from visalign.rewards.base import Context

from .encoder import DTYPES


def is_path(model: str) -> bool:
    """Whether `model` means a place on this disk rather than a hub id or a name."""
    return model.startswith((".", "/", "~")) or Path(model).is_dir()


def check_checkpoint(argument: str, model: str, download: bool = False, file: str = "config.json") -> None:
    """Raise ValueError, loading nothing, unless `model` is a folder with `file`, or an id that is (to be) there."""
    if is_path(model):
        if not (Path(model).expanduser() / file).is_file():
            raise ValueError(f"{argument}: got {model!r}, expected a folder with {file}")
    elif not download:
        _cached(argument, model, file)


def hub_file(argument: str, path: str | Path | None, repo: str, name: str, download: bool = False) -> Path:
    """`path` if given, else the file `name` of a hub repository, from the cache or, if allowed, by downloading it."""
    if path is not None:
        file = Path(path).expanduser()
        if not file.is_file():
            raise ValueError(f"{argument}: got no file at {str(file)!r}, expected {name} of {repo}")
        return file
    if download:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(repo, name))
    return _cached(argument, repo, name)


def _cached(argument: str, repo: str, name: str) -> Path:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.utils import HFValidationError

    try:
        hit = try_to_load_from_cache(repo, name)
    except HFValidationError as error:
        raise ValueError(f"{argument}: got {repo!r}, expected a folder or a hub id such as 'org/name'") from error
    if not isinstance(hit, str):
        advice = "pass download=True to fetch it, or the path of a local copy"
        raise ValueError(f"{argument}: {name} of {repo!r} is not in the local cache; {advice}")
    return Path(hit)


def load_pretrained(argument: str, factory: Any, model: str, download: bool, **options: Any) -> Any:
    """`factory.from_pretrained(model)`, with errors in one line."""
    place = str(Path(model).expanduser()) if is_path(model) else model
    try:
        return factory.from_pretrained(place, local_files_only=not download, **options)
    except Exception as error:  # files can be missing or broken in many ways, each with an error type of its own
        summary = " ".join(str(error).split())[:300]
        raise ValueError(f"{argument}: could not load {model!r}: {summary}") from error


def load_model(factory: Any, model: str, download: bool, **options: Any) -> Any:
    """A transformers model with all its weights, float32; transformers itself would make up those that are missing.

    Raises:
        ValueError: no such checkpoint, or one without some weight; names it.
    """
    options = {"output_loading_info": True, "dtype": torch.float32, **options}
    loaded, info = load_pretrained("model", factory, model, download, **options)
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"model: got {model!r} without {missing[:3]} ({len(missing)} missing weights)")
    return loaded


class FrozenModel:
    """A model in evaluation mode whose weights stay as they are, on the device asked for or that of the images."""

    def __init__(self, model: torch.nn.Module, device: str | None = None, dtype: str = "float32") -> None:
        self.model: Any = model.to(DTYPES[dtype]).eval().requires_grad_(False)
        self.dtype = DTYPES[dtype]
        self._device = None if device is None else torch.device(device)
        self.at = torch.device("cpu")

    def follow(self, images: Tensor) -> Tensor:
        """The images on the model's device, to which the model moves if it is not there."""
        device = self._device or images.device
        if device != self.at:
            self.model.to(device)
            self.at = device
        return images.to(device)


def check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise unknown_name("dtype", dtype, DTYPES)


class ReferenceEmbeddings:
    """Embeddings of pictures, remembered by content: the same reference is never embedded twice.

    Args:
        embed: (N, 3, H, W) to (N, D).
        limit: embeddings to keep; the ones asked for longest ago go first.
    """

    def __init__(self, embed: Callable[[Tensor], Tensor], limit: int = 20_000) -> None:
        self._embed, self._limit = embed, limit
        self._known: dict[str, Tensor] = {}

    def __call__(self, pictures: Sequence[Tensor], device: torch.device) -> Tensor:
        """pictures: at least one (3, H, W), of any sizes. Returns (len, D) on `device`, no gradient."""
        keys = [content_key(picture) for picture in pictures]
        new = {key: picture for key, picture in zip(keys, pictures) if key not in self._known}
        by_shape: dict[tuple, list[str]] = {}
        for key, picture in new.items():
            by_shape.setdefault(tuple(picture.shape), []).append(key)
        for same in by_shape.values():
            batch = torch.stack([new[key].detach().to(device) for key in same])
            check_images(batch)
            check_pixels(batch)
            # Not under inference_mode: these embeddings may later take part in a backward pass.
            with torch.inference_mode(False), torch.no_grad():
                self._known.update(zip(same, self._embed(batch)))
        rows = [self._known.pop(key) for key in dict.fromkeys(keys)]
        self._known.update(zip(dict.fromkeys(keys), rows))  # to the end of the line
        embeddings = torch.stack([self._known[key].to(device) for key in keys])
        for key in list(self._known)[: max(0, len(self._known) - self._limit)]:
            del self._known[key]
        return embeddings


def content_key(picture: Tensor) -> str:
    """The same for pictures (3, H, W) of the same shape, type and pixels."""
    raw = picture.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return f"{tuple(picture.shape)} {picture.dtype} {hashlib.blake2b(raw, digest_size=16).hexdigest()}"


def read_references(context: Context | None, count: int) -> list[list[Tensor]]:
    """context["references"], checked: `count` lists of (3, H, W) tensors, each of which may be empty."""
    references = (context or {}).get("references")
    if references is None:
        raise ValueError("references: got none, expected context['references'], a list of pictures for each image")
    check_references(references, count)
    return [list(pictures) for pictures in references]


def mean_cosines(
    features: Tensor, references: Sequence[Sequence[Tensor]], embed: ReferenceEmbeddings
) -> tuple[Tensor, Tensor]:
    """Mean cosine of each image's features (N, D), L2-normalised, with its references'.

    Returns:
        scores (N,) and valid (N,) bool; an image without references has neither gradient nor score.
    """
    pictures = [picture for own in references for picture in own]
    valid = torch.tensor([bool(own) for own in references], device=features.device)
    owner = torch.tensor([n for n, own in enumerate(references) for _ in own], dtype=torch.long, device=features.device)
    if not pictures:
        return features.sum(dim=1) * 0, valid
    cosines = (features[owner] * embed(pictures, features.device)).sum(dim=-1)
    counts = torch.tensor([max(1, len(own)) for own in references], device=features.device)
    return features.new_zeros(len(features)).index_add(0, owner, cosines) / counts, valid
