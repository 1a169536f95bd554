"""Frozen `open_clip` models for rewards: found without a network, fed by tensors, differentiable in the images."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visalign.images import check_images
from visalign.names import unknown_name
from visalign.worlds import CLIP as SHIPPED

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_ASPECT = 200  # of what is cropped: beyond it gigabytes would be filled to look at half a per cent of a picture


def preprocess(
    images: Tensor,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    mode: str,
    resize: str,
    crop: int | None = None,
    round_down: bool = False,
) -> Tensor:
    """open_clip's evaluation transform on tensors, with gradient: torchvision's size and crop rules, no uint8 rounding.

    Args:
        images: (N, 3, H, W) in [0, 1].
        size: side of the square result; with `crop`, of what it is cropped from.
        mean, std: per channel, subtracted and divided by at the end.
        mode: "bicubic" or "bilinear", antialiased.
        resize: "shortest" scales the shorter side to `size` and crops the centre, "squash" changes the aspect ratio.
        crop: side of the result, where it is smaller than `size`.
        round_down: the crop's offset, as transformers has it; torchvision rounds it to nearest.

    Returns:
        (N, 3, size, size), or of side `crop`; float32.

    Raises:
        ValueError: "shortest" and a picture of whose length next to nothing is left after cropping.
    """
    height, width = images.shape[-2:]
    short = min(height, width)
    if resize == "shortest" and max(height, width) > MAX_ASPECT * short:
        raise ValueError(f"images: got {width} x {height} pixels, expected an aspect ratio of at most {MAX_ASPECT}")
    to = [int(size * side / short) for side in (height, width)] if resize == "shortest" else [size, size]
    images = images.float()
    if to != [height, width]:
        images = F.interpolate(images, to, mode=mode, antialias=True, align_corners=False).clamp(0, 1)
    crop = crop or size
    top, left = ((side - crop) // 2 if round_down else round((side - crop) / 2) for side in to)
    images = images[..., top : top + crop, left : left + crop]
    mean_, std_ = (images.new_tensor(values).view(1, 3, 1, 1) for values in (mean, std))
    return (images - mean_) / std_


def clip_folder(model: str) -> Path | None:
    """The folder that `model` names ("local-dir:PATH" or a path), checked to be complete; None for a model's name.

    Raises:
        ValueError: no such folder, no open_clip_config.json, or no weights in it.
    """
    path = Path(model.removeprefix("local-dir:")).expanduser()
    if (
        path != SHIPPED
        and not model.startswith("local-dir:")
        and not path.is_dir()
        and not model.startswith((".", "/", "~"))
    ):
        return None
    if not path.is_dir():
        advice = "; train the shapes world's with `visalign world build clip`" if path == SHIPPED else ""
        raise ValueError(f"model: got {str(path)!r}, which is no folder{advice}")
    config = path / "open_clip_config.json"
    if not config.is_file():
        raise ValueError(f"model: got folder {str(path)!r}, expected an open_clip_config.json in it")
    try:
        known = "model_cfg" in json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"model: could not read {str(config)!r}: {error}") from error
    if not known:
        raise ValueError(f"model: got {str(config)!r} without 'model_cfg'")
    if not any(path.glob("*.safetensors")):
        raise ValueError(f"model: got folder {str(path)!r}, expected weights (*.safetensors) in it")
    return path


def check_clip_options(model: str, pretrained: str | None, dtype: str) -> None:
    """What can be said of these options without importing open_clip."""
    if dtype not in DTYPES:
        raise unknown_name("dtype", dtype, DTYPES)
    named = clip_folder(model) is None and not model.startswith("hf-hub:")
    if named and pretrained is None:
        raise ValueError(
            f"pretrained: got None for model {model!r}, expected a tag or a weights file (else it is random)"
        )
    if not named and pretrained is not None:
        raise ValueError(f"pretrained: got {pretrained!r}, expected None: {model!r} brings its own weights")


class ClipEncoder:
    """Embeds images and prompts with a frozen open_clip model; both L2-normalised, float32, (N, D).

    Args:
        model: a folder in open_clip's "local-dir" layout (with or without that prefix), "hf-hub:org/repo", or an
            open_clip model name, which then needs `pretrained`.
        pretrained: a tag of open_clip's (`open_clip.list_pretrained()`) or a weights file.
        device: where to run; None follows the images.
        dtype: of the model's weights: "float32", "bfloat16" or "float16". Embeddings are normalised in float32.
        download: fetch weights that are not in the local cache; without it they are an error.

    Raises:
        ValueError: the model is not known, not there, or not complete.
    """

    def __init__(
        self,
        model: str,
        pretrained: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        download: bool = False,
    ) -> None:
        check_clip_options(model, pretrained, dtype)
        self.model, self._tokenize = _load(model, pretrained, download)
        self.model = self.model.to(DTYPES[dtype]).eval().requires_grad_(False)
        self._device = None if device is None else torch.device(device)
        self._dtype = DTYPES[dtype]
        self._at = torch.device("cpu")
        self._texts: dict[str, Tensor] = {}  # each distinct prompt is encoded once
        cfg = self.model.visual.preprocess_cfg
        sides = cfg["size"] if isinstance(cfg["size"], (tuple, list)) else (cfg["size"],) * 2
        if sides[0] != sides[1] or cfg["resize_mode"] not in ("shortest", "squash"):
            raise ValueError(f"model: got preprocessing {cfg}, expected a square size, 'shortest' or 'squash'")
        self._preprocess = (sides[0], cfg["mean"], cfg["std"], cfg["interpolation"], cfg["resize_mode"])

    @property
    def logit_scale(self) -> float:
        """The factor of the cosine in the model's own training loss (about 100)."""
        return float(self.model.logit_scale.detach().float().exp())

    @property
    def embedding_size(self) -> int:
        with torch.no_grad():
            return self.embed_images(torch.zeros(1, 3, self._preprocess[0], self._preprocess[0])).shape[1]

    def embed_images(self, images: Tensor) -> Tensor:
        """images (N, 3, H, W) in [0, 1] to (N, D); gradients reach the images."""
        check_images(images)
        images = images.to(self._follow(images))
        features = self.model.encode_image(preprocess(images, *self._preprocess).to(self._dtype))
        return F.normalize(features.float(), dim=-1)

    def patch_tokens(self, images: Tensor) -> Tensor:
        """images (N, 3, H, W) in [0, 1] to the image tower's last tokens (N, P, W), float32, with gradient.

        They keep where things are, which the embedding mostly loses. P patches row by row; not normalised.

        Raises:
            ValueError: the model's image tower gives no tokens (it is no vision transformer).
        """
        check_images(images)
        visual = self.model.visual
        if not hasattr(visual, "output_tokens"):
            raise ValueError(f"model: got an image tower {type(visual).__name__}, expected one that gives patch tokens")
        images = images.to(self._follow(images))
        visual.output_tokens = True
        try:
            _, tokens = visual(preprocess(images, *self._preprocess).to(self._dtype))
        finally:
            visual.output_tokens = False
        return tokens.float()

    def embed_texts(self, prompts: Sequence[str]) -> Tensor:
        """prompts to (N, D), no gradient; what exceeds the model's context is cut off."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        if new:
            # Not under inference_mode: these embeddings may later take part in a backward pass.
            with torch.inference_mode(False), torch.no_grad():
                features = self.model.encode_text(self._tokenize(new).to(self._at))
                self._texts.update(zip(new, F.normalize(features.float(), dim=-1)))
        return torch.stack([self._texts[prompt] for prompt in prompts])

    def _follow(self, images: Tensor) -> torch.device:
        """Move the model to its device, or to that of the images, when it is not there yet."""
        device = self._device or images.device
        if device != self._at:
            self.model.to(device)
            self._texts = {prompt: features.to(device) for prompt, features in self._texts.items()}
            self._at = device
        return device


def _load(model: str, pretrained: str | None, download: bool) -> tuple[Any, Any]:
    """An open_clip model with its weights, on the CPU in float32, and its tokenizer."""
    import open_clip

    folder = clip_folder(model)
    if model.startswith("hf-hub:"):
        folder = _hub_folder(model.removeprefix("hf-hub:"), download)
    try:
        if folder is not None:
            source = f"local-dir:{folder}"
            return open_clip.create_model(source, require_pretrained=True), open_clip.get_tokenizer(source)
        if model not in open_clip.list_models():
            raise unknown_name("model", model, open_clip.list_models())
        assert pretrained is not None  # check_clip_options
        cfg = open_clip.get_pretrained_cfg(model, pretrained)
        loaded = open_clip.create_model(
            model,
            pretrained=str(_weights_file(model, pretrained, cfg, download)),
            force_quick_gelu=bool(cfg.get("quick_gelu", False)),  # OpenAI's weights need it; open_clip only warns
            force_preprocess_cfg={k: cfg[k] for k in ("mean", "std", "interpolation", "resize_mode") if k in cfg},
            require_pretrained=True,
        )
        return loaded, open_clip.get_tokenizer(model)
    except ValueError:
        raise
    except Exception as error:  # a weights file can be broken in many ways, each with an error type of its own
        raise ValueError(f"model: could not load {model!r}: {' '.join(str(error).split())[:300]}") from error


def _weights_file(model: str, pretrained: str, cfg: dict[str, Any], download: bool) -> Path:
    """The file of a tag, from the caches that open_clip uses, or the file that `pretrained` is."""
    import open_clip

    if not cfg:
        if Path(pretrained).expanduser().is_file():
            return Path(pretrained).expanduser()
        tags = open_clip.list_pretrained_tags_by_model(model)
        raise unknown_name(f"pretrained for {model!r}", pretrained, [*tags, "a weights file"])
    if download:
        return Path(open_clip.download_pretrained(cfg))
    if cfg.get("hf_hub"):
        repo = os.path.dirname(cfg["hf_hub"])
        cached = _cached(
            repo, [os.path.basename(cfg["hf_hub"]), "open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
        )
    else:
        repo = cfg["url"]
        target = Path("~/.cache/clip").expanduser() / os.path.basename(repo)
        cached = target if target.is_file() else None
    if cached is None:
        raise ValueError(
            f"pretrained: got {pretrained!r} for {model!r}, whose weights ({repo}) are not in the local cache; "
            "pass download=True, or a folder or file that has them"
        )
    return cached


def _cached(repo: str, names: Sequence[str]) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    hits = (try_to_load_from_cache(repo, name) for name in names if name)
    return next((Path(hit) for hit in hits if isinstance(hit, str)), None)


def _hub_folder(repo: str, download: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.txt", "*.model", "open_clip*.safetensors"]
    try:
        folder = snapshot_download(repo, allow_patterns=patterns, local_files_only=not download)
    except Exception as error:
        advice = "" if download else "; pass download=True to fetch it"
        raise ValueError(f"model: could not find 'hf-hub:{repo}' in the local cache{advice}") from error
    cached = clip_folder(f"local-dir:{folder}")
    assert cached is not None
    return cached
