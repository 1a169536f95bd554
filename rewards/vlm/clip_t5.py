"""CLIP-FlanT5, VQAScore's own encoder-decoder (Lin et al. 2024, arXiv:2404.01291), in its published files' layout.

A picture's patches, from the second to last layer of CLIP's vision tower and through a projector, stand between T5's
tokens of the conversation; T5's decoder is asked how likely an answer is.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from visalign.rewards.embedding.frozen import FrozenModel, check_dtype, is_path, load_model, load_pretrained
from visalign.rewards.embedding.preprocessing import CLIP, load_preprocessing

from .heads import read_weights
from .judging import load_template
from .qwen_patches import MAX_ASPECT

QUESTION = 'Does this figure show "{prompt}"? Please answer yes or no.'  # these few words are part of the metric
SYSTEM = "clip_flant5_system"  # the template that a conversation begins with
TOWER = "vision_tower.vision_tower."
EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "embed_tokens.weight")
UNUSED = (".position_ids", "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight")
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # whole, or in the shards that an index lists
CONTEXT = 2048  # tokens of a conversation, the picture counted as one; what is longer is cut, as published
SETTINGS = {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_feature": "patch"}  # what can be followed here


def is_clip_t5(model: str, download: bool = False) -> bool:
    """Whether the checkpoint's config.json says so; False also where there is none to read."""
    path = _find(model, "config.json", download)
    try:
        return path is not None and json.loads(path.read_text(encoding="utf-8")).get("model_type") == "clip_t5"
    except ValueError:
        return False


def convert_state_dict(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """A checkpoint's tensors by part: "t5" and "vision" with transformers' names, "projector" with its layers' places.

    T5's embedding is in the file under one or more of EMBEDDINGS; here it is "shared.weight". "vision" is empty where
    the frozen tower was not saved along. What older releases saved without need (UNUSED) is left out.
    """
    parts: dict[str, dict[str, Tensor]] = {"t5": {}, "projector": {}, "vision": {}}
    for key, tensor in state.items():
        if key.startswith("mm_projector."):
            parts["projector"][key.removeprefix("mm_projector.")] = tensor
        elif key.startswith(TOWER):
            parts["vision"][key.removeprefix(TOWER)] = tensor
        elif key not in EMBEDDINGS:
            parts["t5"][key] = tensor
    parts = {
        part: {key: value for key, value in own.items() if not key.endswith(UNUSED)} for part, own in parts.items()
    }
    embeddings = [state[key] for key in EMBEDDINGS if key in state]
    if not embeddings:
        raise ValueError(f"weights: got none of {EMBEDDINGS}, expected T5's embedding")
    parts["t5"]["shared.weight"] = embeddings[0]
    return parts


def pad_to_square(images: Tensor, mean: Sequence[float]) -> Tensor:
    """(N, 3, H, W) in the middle of squares of the mean colour, which has 8 bits; an odd rest goes right or below."""
    height, width = images.shape[-2:]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    colour = images.new_tensor([int(value * 255) / 255 for value in mean]).view(1, 3, 1, 1)
    around = (left, side - width - left, top, side - height - top)
    return F.pad(images - colour, around) + colour


class ClipT5(FrozenModel):
    """Log-probabilities that CLIP-FlanT5 gives to answers to a question about a picture; gradients reach the picture.

    They are over the tokens that the tokenizer has, as published: the head's rows past them are padding.

    Args:
        model: folder or hub id with config.json (model_type "clip_t5"), weights and T5's tokenizer.
        vision_tower: folder or id of the vision tower's config, image settings and (where the checkpoint has none)
            weights; None: the one that the config names, openai/clip-vit-large-patch14-336.
        template: the sentence that the conversation begins with, a .txt file or the text; None: clip_flant5_system.txt
            in the folder of templates, see `load_template`. "" leaves it out.
        device: where to run; None follows the images.
        dtype: of the weights; bfloat16 as published. T5 overflows in float16. Probabilities are float32.
        batch_size: pictures at once.

    Raises:
        ValueError: files that are missing or of another layout; names the first key or setting that is off.
    """

    def __init__(
        self,
        model: str,
        vision_tower: str | None = None,
        template: str | Path | None = None,
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int = 16,
        download: bool = False,
    ) -> None:
        from transformers import CLIPVisionConfig, T5Tokenizer

        check_options({"dtype": dtype, "batch_size": batch_size, "template": template})
        settings = _settings(model, download)
        tower = settings["mm_vision_tower"] if vision_tower is None else vision_tower
        tower_config = load_pretrained("vision_tower", CLIPVisionConfig, tower, download)
        state = convert_state_dict(_read(model, download))
        parts = {
            "vision": _vision(state["vision"], tower_config, tower, download),
            "projector": _projector(state["projector"], settings),
            "t5": _t5(state["t5"], settings),
        }
        super().__init__(nn.ModuleDict(parts), device, dtype)
        self.tokenizer = load_pretrained("model", T5Tokenizer, model, download)
        place = str(Path(tower).expanduser()) if is_path(tower) else tower
        self.preprocess = load_preprocessing(place, CLIP, tower_config.image_size, download)
        self.layer, self.batch_size = int(settings["mm_vision_select_layer"]), batch_size
        self.opening = f"{load_template(SYSTEM, template)} USER: "

    def __call__(self, images: Tensor, questions: Sequence[str], answers: Sequence[str]) -> list[Tensor]:
        """images: (N, 3, H, W) in [0, 1]; N questions. For each answer (N, its tokens and the end token), float32."""
        height, width = images.shape[-2:]
        if max(height, width) > MAX_ASPECT * min(height, width):
            got = f"{width} x {height} pixels"
            raise ValueError(f"images: got {got}, expected an aspect ratio of at most {MAX_ASPECT}")
        log_probs = []
        for k in range(0, len(images), self.batch_size):
            states, mask = self.encode(images[k : k + self.batch_size], questions[k : k + self.batch_size])
            log_probs.append([self.log_probs(states, mask, answer) for answer in answers])
        return [torch.cat(batches) for batches in zip(*log_probs)]

    def encode(self, images: Tensor, questions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """T5's encoder on the conversations about the pictures: (N, T, D), padded on the right, and the mask (N, T)."""
        images = self.follow(images).float()
        pixels = self.preprocess(pad_to_square(images, self.preprocess.mean)).to(self.dtype)
        layers = self.model["vision"](pixel_values=pixels, output_hidden_states=True).hidden_states
        seen = self.model["projector"](layers[self.layer][:, 1:])  # without the class token
        # The pieces are tokenized each by itself, so that the first ends with T5's end token too: so it was trained.
        before = self._ids(self.opening)
        after = [self._ids(f"\n{question} ASSISTANT: ")[: CONTEXT - 1 - len(before)] for question in questions]
        embed = self.model["t5"].shared
        rows = [torch.cat([embed(before), patches, embed(ids)]) for patches, ids in zip(seen, after)]
        mask = pad_sequence([torch.ones(len(row), device=self.at) for row in rows], batch_first=True)
        embeddings = pad_sequence(rows, batch_first=True)
        return self.model["t5"].encoder(inputs_embeds=embeddings, attention_mask=mask).last_hidden_state, mask

    def log_probs(self, states: Tensor, mask: Tensor, answer: str) -> Tensor:
        """Those (N, tokens) of one answer after what `encode` returns."""
        labels = self._ids(answer).repeat(len(states), 1)
        logits = self.model["t5"](encoder_outputs=(states,), attention_mask=mask, labels=labels).logits
        known = logits[..., : len(self.tokenizer)].float().log_softmax(dim=-1)
        return known.gather(-1, labels[..., None])[..., 0]

    def _ids(self, text: str) -> Tensor:
        return torch.tensor(self.tokenizer(text)["input_ids"], device=self.at)


def check_options(options: Mapping[str, Any]) -> None:
    """What can be said of ClipT5's options without loading anything."""
    check_dtype(options.get("dtype", "float32"))
    size = options.get("batch_size", 16)
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"batch_size: got {size!r}, expected a whole number >= 1")
    load_template(SYSTEM, options.get("template"))


def _find(model: str, name: str, download: bool) -> Path | None:
    from transformers.utils import cached_file

    place = str(Path(model).expanduser()) if is_path(model) else model
    options: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False}
    try:
        path = cached_file(place, name, local_files_only=not download, **options)
    except Exception:  # no such folder or repository, or no way to it: there are many types of error
        return None
    return None if path is None else Path(path)


def _settings(model: str, download: bool) -> dict[str, Any]:
    """config.json, checked for what this can follow."""
    path = _find(model, "config.json", download)
    if path is None:
        raise ValueError(f"model: got no config.json in {model!r}; pass download=True, or the path of a local copy")
    settings = json.loads(path.read_text(encoding="utf-8"))
    for name in ("d_model", "mm_hidden_size", "mm_vision_tower", "mm_vision_select_layer", *SETTINGS):
        if name not in settings:
            raise ValueError(f"model: got a config.json without {name!r} in {model!r}")
        if name in SETTINGS and settings[name] != SETTINGS[name]:
            raise ValueError(f"{name}: got {settings[name]!r} in {str(path)!r}, expected {SETTINGS[name]!r}")
    return settings


def _read(model: str, download: bool) -> dict[str, Tensor]:
    """All tensors of the checkpoint, from one file or its shards."""
    for name in WEIGHTS:
        if index := _find(model, f"{name}.index.json", download):
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            return {key: value for shard in shards for key, value in _read_file(model, shard, download).items()}
        if _find(model, name, download):
            return _read_file(model, name, download)
    advice = "" if download or is_path(model) else " (looked on this machine only; pass download=True to fetch them)"
    raise ValueError(f"weights: got none of {WEIGHTS}, nor an index of their shards, in {model!r}{advice}")


def _read_file(model: str, name: str, download: bool) -> dict[str, Tensor]:
    path = _find(model, name, download)
    if path is None:
        raise ValueError(f"weights: got no {name} in {model!r}, which its index lists")
    return read_weights(path)


def _load(module: nn.Module, state: Mapping[str, Tensor], what: str) -> nn.Module:
    try:
        module.load_state_dict(dict(state), strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(f"weights of {what}: {' '.join(str(error).split())[:400]}") from error
    return module


def _t5(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> nn.Module:
    """T5 with exactly these weights: from_pretrained might tie the head to the embedding, and Flan-T5's is not."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(**{key: value for key, value in settings.items() if key != "model_type"})
    with torch.device("meta"):
        empty = T5ForConditionalGeneration(config)
    same = {key: state["shared.weight"] for key in EMBEDDINGS[1:3]}
    _load(empty, {**state, **same}, "T5")
    empty.set_input_embeddings(empty.shared)  # one embedding, not three copies
    return empty


def _projector(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> nn.Module:
    width = settings["d_model"]
    layers = nn.Sequential(nn.Linear(settings["mm_hidden_size"], width), nn.GELU(), nn.Linear(width, width))
    return _load(layers, state, "mm_projector")


def _vision(state: dict[str, Tensor], config: Any, tower: str, download: bool) -> nn.Module:
    """The tower with the checkpoint's weights, or with its own where the checkpoint has none."""
    from transformers import CLIPVisionModel

    if not state:
        return load_model(CLIPVisionModel, tower, download)
    loaded, info = CLIPVisionModel.from_pretrained(None, config=config, state_dict=state, output_loading_info=True)
    if odd := sorted([*info["missing_keys"], *info["unexpected_keys"]]):
        raise ValueError(f"weights of the vision tower: got missing or unknown {odd[:3]}, expected those of {tower!r}")
    return loaded
