"""Regression heads on vision-language models: a special token in the prompt, a small network on its hidden state."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visalign.names import unknown_name
from visalign.rewards.base import RewardError

from .chat import Message
from .loading import DTYPES, check_vlm_options
from .model import VLM
from .prompt import Prompt

REWARD_TOKEN = "<|Reward|>"
PIXELS = 256 * 28 * 28  # lower and upper bound of each picture's pixels, as published
HEAD_LAYERS = (0, 3, 5)  # places of the linear layers; between them ReLU, dropout in training, ReLU
_RENAMED = (("visual.", "model.visual."), ("model.", "model.language_model."))  # before and since transformers 4.52


def convert_state_dict(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """A checkpoint's tensors by the names that transformers gives them today.

    Read: tensors nested under "model"; backbones saved before transformers 4.52 (`visual.*`, `model.layers.*`) and
    since (`model.visual.*`, `model.language_model.*`), told apart by their prefixes. `lm_head`, `rm_head` and
    `rm_heads` keep their names.

    Raises:
        ValueError: a key of neither layout, or one of the old among those of the new; names it.
    """
    inner = state.get("model")
    if isinstance(inner, Mapping):
        state = inner
    new = any(key.startswith(("model.visual.", "model.language_model.")) for key in state)
    converted = {}
    for key, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"weights: got {type(tensor).__name__} under {key!r}, expected a tensor")
        converted[_new_name(key, new)] = tensor
    return converted


def _new_name(key: str, new: bool) -> str:
    if key.startswith(("lm_head.", "rm_head.", "rm_heads.")):
        return key
    if new and key.startswith(("model.visual.", "model.language_model.")):
        return key
    for old, now in _RENAMED:
        if not new and key.startswith(old):
            return now + key.removeprefix(old)
    layout = "transformers since 4.52 (model.visual, model.language_model)" if new else "before 4.52 (visual, model)"
    raise ValueError(f"weights: got key {key!r}, expected the layout of {layout}, or lm_head, rm_head or rm_heads")


def read_weights(path: str | Path) -> dict[str, Any]:
    """The content of a .safetensors, .pth or .pt file, tensors only; ValueError if that cannot be."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"weights: got no file at {str(path)!r}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"weights: could not read {str(path)!r}: {' '.join(str(error).split())[:200]}") from error


def find_file(repo: str, names: Sequence[str], download: bool) -> Path:
    """The first of the named files that the hub repository has, from the local cache, or fetched with `download`."""
    from huggingface_hub import hf_hub_download

    problems = []
    for name in names:
        try:
            return Path(hf_hub_download(repo, name, local_files_only=not download))
        except Exception as error:
            problems.append(" ".join(str(error).split())[:100])
    advice = problems[-1] if download else "looked on this machine only; pass download=True, or weights=PATH"
    raise ValueError(f"weights: could not find {' or '.join(names)} of {repo!r}: {advice}")


def make_head(state: Mapping[str, Tensor], prefix: str, features: int) -> nn.Sequential:
    """The head under `prefix` ("rm_head", ...), float32: features-1024-16-2 with ReLU between; dropout is left out.

    Raises:
        ValueError: a missing key, an odd one or a wrong shape; names it.
    """
    widths = [(1024, features), (16, 1024), (2, 16)]
    expected: dict[str, tuple[int, ...]] = {}
    for place, (wide, narrow) in zip(HEAD_LAYERS, widths):
        expected |= {f"{prefix}.{place}.weight": (wide, narrow), f"{prefix}.{place}.bias": (wide,)}
    check_shapes({key: value for key, value in state.items() if key.startswith(f"{prefix}.")}, expected)
    layers: list[nn.Module] = []
    for place, (wide, narrow) in zip(HEAD_LAYERS, widths):
        linear = nn.Linear(narrow, wide)
        weights = {part: state[f"{prefix}.{place}.{part}"].float() for part in ("weight", "bias")}
        linear.load_state_dict(weights)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1]).requires_grad_(False).eval()


def check_shapes(state: Mapping[str, Tensor], expected: Mapping[str, Sequence[int]]) -> None:
    """Raise ValueError unless `state` has exactly the expected keys with these shapes; names the first that is off."""
    for key in sorted(set(state) ^ set(expected)):
        raise ValueError(f"weights: got {'no' if key in expected else 'an unexpected'} key {key!r}")
    for key, shape in expected.items():
        if tuple(state[key].shape) != tuple(shape):
            raise ValueError(f"weights: got shape {tuple(state[key].shape)} for {key!r}, expected {tuple(shape)}")


class RewardTokenVLM(VLM):
    """A VLM whose prompts hold a reward token, with plain positions 0, 1, 2, ... for all tokens, pictures' too.

    The published code calls the language model without position ids, so its checkpoints know no M-RoPE.
    """

    token = REWARD_TOKEN

    def positions(self, prompt: Prompt) -> Tensor:
        return torch.arange(len(prompt.ids)).expand(3, -1)

    def at_token(self, conversations: Sequence[Sequence[Message]], name: str) -> Tensor:
        """Final hidden states (N, D) at the reward token of each conversation, float32, with gradient to the pixels.

        What follows the token cannot reach it in a causal model, and is not run.

        Raises:
            RewardError: a conversation without the token, or with more than one; `name` is the reward's.
        """
        token, cut = self.tokenizer.convert_tokens_to_ids(self.token), []
        for n, conversation in enumerate(conversations):
            prompt = self.prompt(conversation)
            if (count := prompt.ids.count(token)) != 1:
                problem = f"got {count} {self.token} tokens in one conversation, expected 1; is one in the prompt?"
                raise RewardError(name, problem, sample=n)
            stop = prompt.ids.index(token) + 1
            cut.append(Prompt(prompt.text, prompt.ids[:stop], prompt.marks[:stop], prompt.pictures))
        return self.hidden(cut, keep=1)[:, 0].float()


def load_backbone(
    base: str, state: Mapping[str, Tensor], device: str | None, dtype: str, download: bool, pixels: int, batch_size: int
) -> RewardTokenVLM:
    """The backbone of a checkpoint: architecture and processor of `base`, the reward token added, weights of `state`.

    Raises:
        ValueError: `base` is not on this machine, or keys or shapes of `state` are not its own; names the key.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(base, local_files_only=not download)
        config = AutoConfig.from_pretrained(base, local_files_only=not download)
    except Exception as error:  # a missing or broken checkpoint shows in many types of error
        advice = "" if download else " (looked on this machine only; pass download=True to fetch it)"
        raise ValueError(f"base: could not load {base!r}{advice}: {' '.join(str(error).split())[:200]}") from error
    processor.tokenizer.add_tokens([REWARD_TOKEN], special_tokens=True)
    config.get_text_config().vocab_size = len(processor.tokenizer)
    with torch.device("meta"):
        empty = AutoModelForImageTextToText.from_config(config)
    expected = {key: value.shape for key, value in empty.state_dict().items()}
    if config.tie_word_embeddings and "lm_head.weight" not in state:
        expected.pop("lm_head.weight", None)
    backbone = {key: value for key, value in state.items() if not key.startswith(("rm_head.", "rm_heads."))}
    check_shapes(backbone, expected)
    model = type(empty).from_pretrained(None, config=config, state_dict=backbone, dtype=getattr(torch, dtype))
    budget = {"min_pixels": pixels, "max_pixels": pixels}
    return RewardTokenVLM.of(model, processor, base, device, batch_size=batch_size, **budget)  # type: ignore[return-value]


def check_head_options(options: Mapping[str, Any]) -> None:
    """What can be said of the options of a reward with a head without loading anything."""
    dtype = options.get("dtype", DTYPES[0])
    if dtype not in DTYPES:
        raise unknown_name("dtype", dtype, DTYPES)
    check_vlm_options(dtype, options.get("batch_size", 1))
    weights = options.get("weights")
    if weights is not None and not Path(weights).expanduser().is_file():
        raise ValueError(f"weights: got no file at {str(Path(weights).expanduser())!r}")
    pixels = options.get("pixels", PIXELS)
    if isinstance(pixels, bool) or not isinstance(pixels, int) or pixels < 28 * 28:
        raise ValueError(f"pixels: got {pixels!r}, expected a whole number of at least {28 * 28}")
