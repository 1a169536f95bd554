"""A vision-language model run here by transformers, for judges that read its probabilities or its answers.

`VLM.hidden(sequences)` gives the hidden states that probabilities are read from; what the sequences begin with in
common is computed once. `yes_token` asks yes/no questions on top of it, `local_chat` generates text.
"""

import hashlib
import inspect
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visalign.worlds import JUDGES

from .chat import Message
from .qwen_patches import Patches

DTYPES = ("float32", "bfloat16", "float16")
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")  # packed vision tower, M-RoPE, a cache of keys and values


@dataclass(frozen=True)
class Picture:
    """A picture (3, H, W) in [0, 1] and what tells it from others: its content, or its self where gradients flow."""

    pixels: Tensor
    key: str


@dataclass(frozen=True)
class Prompt:
    """A conversation as tokens. Each picture's place is held by one token for each of its visual tokens."""

    text: str  # the chat template's output, with one placeholder a picture
    ids: tuple[int, ...]
    marks: tuple[Any, ...]  # ids, with each visual token's id replaced by its picture's key; equal marks, equal states
    pictures: tuple[Picture, ...]

    def followed_by(self, ids: Sequence[int]) -> "Prompt":
        """The same with further text tokens after it."""
        return Prompt(self.text, (*self.ids, *ids), (*self.marks, *ids), self.pictures)


@dataclass(frozen=True)
class Vision:
    """What the vision tower makes of a picture."""

    grid: tuple[int, int, int]
    features: Tensor  # (tokens, D)
    deepstack: tuple[Tensor, ...]  # (tokens, D) each; Qwen3-VL adds them to its first layers


def check_vlm_options(dtype: str = "float32", batch_size: int = 16) -> None:
    """Raise ValueError for options that no model accepts."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, expected one of {DTYPES}")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size!r}, expected a whole number >= 1")


class VLM:
    """A frozen vision-language model with its processor.

    Qwen2-VL, Qwen2.5-VL and Qwen3-VL take the fast road: pictures stay tensors (`differentiable` is True: gradients
    reach the pixels), the vision tower reads all of a batch's pictures packed, its outputs are kept by content, and
    shared beginnings run once. Any other model of AutoModelForImageTextToText goes through its own processor, one
    whole sequence a conversation, and gives no gradient.

    Args:
        model: a hub id, a folder, or "shapes-vlm", the shapes world's own, of no use elsewhere.
        device: "cpu", "cuda", ...; None: wherever the first pictures are.
        batch_size: sequences the language model runs at once.
        min_pixels, max_pixels: the pixel budget of a picture; None: the processor's own.
        share_prefix: False computes every sequence whole; for comparison.
        gradient_checkpointing: less memory in the backward pass; leaves no cache to share prefixes by.
        picture_cache: how many pictures' vision-tower outputs are kept.

    Raises:
        ValueError: nothing of that name on this machine (and `download` is False), or not such a model.
    """

    def __init__(
        self,
        model: str,
        device: str | None = None,
        dtype: str = "float32",
        download: bool = False,
        batch_size: int = 16,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        share_prefix: bool = True,
        gradient_checkpointing: bool = False,
        picture_cache: int = 128,
    ) -> None:
        check_vlm_options(dtype, batch_size)
        self.name = model
        self.model, self.processor = _load(model, dtype, download)
        self._wire(device, batch_size, min_pixels, max_pixels, share_prefix, gradient_checkpointing, picture_cache)

    @classmethod
    def of(cls, model: Any, processor: Any, name: str = "model", device: str | None = None, **options: Any) -> "VLM":
        """A VLM of a model and a processor that are loaded already; options as above."""
        vlm = cls.__new__(cls)
        vlm.name, vlm.model, vlm.processor = name, model, processor
        known = dict(batch_size=16, min_pixels=None, max_pixels=None, share_prefix=True)
        known.update(gradient_checkpointing=False, picture_cache=128)
        if odd := set(options) - set(known):
            raise ValueError(f"options: got {sorted(odd)}, expected some of {sorted(known)}")
        vlm._wire(device, **{**known, **options})
        return vlm

    def _wire(
        self,
        device: str | None,
        batch_size: int,
        min_pixels: int | None,
        max_pixels: int | None,
        share_prefix: bool,
        gradient_checkpointing: bool,
        picture_cache: int,
    ) -> None:
        self.model.requires_grad_(False).eval()
        self.tokenizer = self.processor.tokenizer
        self.base = self.model.base_model
        self.differentiable = self.model.config.model_type in QWEN
        self.batch_size = batch_size
        self.share_prefix = share_prefix and not gradient_checkpointing
        self.patches = (
            Patches.of(self.processor.image_processor, min_pixels, max_pixels) if self.differentiable else None
        )
        if not self.differentiable and (min_pixels or max_pixels):
            raise ValueError(
                f"max_pixels: got a budget for {self.name!r}, expected none: its processor has its own rule"
            )
        if gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
            self.model.train()  # checkpointing is asleep in eval mode; dropout is 0 in these models
        self._seen: OrderedDict[str, Vision] = OrderedDict()
        self._picture_cache = picture_cache
        self._device = None if device is None else torch.device(device)
        if self._device is not None:
            self.model.to(self._device)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    # From a conversation to tokens

    def render(self, conversation: Sequence[Message], generation_prompt: bool = True) -> str:
        """The conversation in the model's chat template, up to where its answer begins."""
        if getattr(self.processor, "chat_template", None) is None:
            raise ValueError(f"model: got {self.name!r} without a chat template, expected an instruction-tuned model")
        turns = [{"role": m.role, "content": [_content(part) for part in m.parts]} for m in conversation]
        return self.processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation_prompt)

    def prompts(self, conversations: Sequence[Sequence[Message]]) -> list[Prompt]:
        """Conversations as tokens; a picture that several hold is hashed once."""
        keys: dict[int, str] = {}
        return [self.prompt(conversation, keys=keys) for conversation in conversations]

    def prompt(
        self, conversation: Sequence[Message], generation_prompt: bool = True, keys: dict[int, str] | None = None
    ) -> Prompt:
        """A conversation as tokens; pictures are not looked at yet. `keys` holds those of pictures by id."""
        text = self.render(conversation, generation_prompt)
        pixels = [part for m in conversation for part in m.parts if isinstance(part, Tensor)]
        for part in pixels:
            if part.ndim != 3 or part.shape[0] != 3 or not part.is_floating_point():
                got = f"{part.dtype} {tuple(part.shape)}"
                raise ValueError(f"picture: got {got}, expected floats (3, H, W); give a video's frames one by one")
        self._follow(pixels)
        keys = {} if keys is None else keys
        pictures = tuple(Picture(p, keys.get(id(p)) or keys.setdefault(id(p), _key(p))) for p in pixels)
        ids = tuple(self.tokenizer(text, add_special_tokens=not self.differentiable)["input_ids"])
        if not self.differentiable:  # its processor will put the pictures in; nothing is shared by marks
            return Prompt(text, ids, ids, pictures)
        return self._with_places(text, ids, pictures)

    def _with_places(self, text: str, ids: tuple[int, ...], pictures: tuple[Picture, ...]) -> Prompt:
        """`ids` with each picture's placeholder repeated once for each of its visual tokens."""
        assert self.patches is not None
        image_id, waiting = self.model.config.image_token_id, list(pictures)
        if ids.count(image_id) != len(pictures):
            problem = f"got {ids.count(image_id)} places for {len(pictures)} pictures in the rendered conversation"
            raise ValueError(f"conversation: {problem}; does its text hold the model's picture token?")
        places: list[int] = []
        marks: list[Any] = []
        for token in ids:
            if token == image_id:
                picture = waiting.pop(0)
                count = self.patches.tokens(*picture.pixels.shape[-2:])
                places += [token] * count
                marks += [picture.key] * count
            else:
                places.append(token)
                marks.append(token)
        return Prompt(text, tuple(places), tuple(marks), pictures)

    def continuation(self, text: str, answer: str) -> list[int]:
        """Token ids of `answer` where it follows the rendered `text`, which keeps the tokens it has alone."""
        before = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        whole = self.tokenizer(text + answer, add_special_tokens=False)["input_ids"]
        if whole[: len(before)] == before:
            return whole[len(before) :]
        return self.tokenizer(answer, add_special_tokens=False)["input_ids"]

    # From tokens to hidden states

    def hidden(self, prompts: Sequence[Prompt], keep: int = 1) -> Tensor:
        """Final hidden states (normalised, as the head reads them) of the last `keep` tokens: (N, keep, D).

        A prompt of fewer tokens is padded on the left; what stands there means nothing.
        """
        if self.differentiable:
            from .shared_prefix import shared_hidden

            return shared_hidden(self, prompts, keep)
        return torch.cat(
            [self._whole(prompts[k : k + self.batch_size], keep) for k in _steps(prompts, self.batch_size)]
        )

    def head(self, hidden: Tensor, rows: Tensor | None = None) -> Tensor:
        """Logits (..., rows), float32: of the vocabulary, or of `rows` (K,) of it alone. Soft-capped where Gemma is."""
        out = self.model.get_output_embeddings()
        weight, bias = out.weight, getattr(out, "bias", None)
        if rows is not None:
            weight, bias = weight[rows], None if bias is None else bias[rows]
        logits = hidden.float() @ weight.float().T
        if bias is not None:
            logits = logits + bias.float()
        cap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _whole(self, prompts: Sequence[Prompt], keep: int) -> Tensor:
        inputs = self.inputs(prompts)
        with torch.no_grad():
            states = self.base(**inputs, use_cache=False).last_hidden_state
        if states.shape[1] < keep:
            states = torch.nn.functional.pad(states, (0, 0, keep - states.shape[1], 0))
        return states[:, -keep:]

    def inputs(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """What the model's `forward` or `generate` takes for a batch, padded on the left; no gradient."""
        if self.differentiable:
            return self._qwen_inputs(prompts)
        appended = [self.tokenizer.decode(p.ids[len(self._alone(p.text)) :]) for p in prompts]
        pictures = [
            [(p.pixels.detach() * 255).round().clamp(0, 255).byte() for p in prompt.pictures] for prompt in prompts
        ]
        made = self.processor(
            text=[prompt.text + more for prompt, more in zip(prompts, appended)],
            images=pictures if any(pictures) else None,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        return {k: v.to(self.device, self.model.dtype if v.is_floating_point() else None) for k, v in made.items()}

    def _alone(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]

    def _qwen_inputs(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        assert self.patches is not None
        ids, mask = left_pad([p.ids for p in prompts], self.tokenizer.pad_token_id or 0)
        pictures = [picture.pixels.detach() for prompt in prompts for picture in prompt.pictures]
        inputs = {"input_ids": ids, "attention_mask": mask}
        if pictures:
            grids = [self.patches.grid(*p.shape[-2:]) for p in pictures]
            inputs["pixel_values"] = torch.cat([self.patches(p[None])[0] for p in pictures]).to(self.model.dtype)
            inputs["image_grid_thw"] = torch.tensor(grids)
            inputs["mm_token_type_ids"] = (ids == self.model.config.image_token_id).int()
        return {name: value.to(self.device) for name, value in inputs.items()}

    # What pictures look like to the language model

    def see(self, pictures: Sequence[Picture]) -> dict[str, Vision]:
        """The vision tower's outputs by key. Those that need no gradient are computed once, and kept by content."""
        wanted = {picture.key: picture for picture in pictures}
        new = [picture for key, picture in wanted.items() if key not in self._seen]
        seen = {key: self._seen[key] for key in wanted if key in self._seen}
        for graph in (False, True):
            group = [p for p in new if (p.pixels.requires_grad and torch.is_grad_enabled()) == graph]
            for k in _steps(group, self.batch_size):
                seen.update(self._look(group[k : k + self.batch_size], graph))
        for key, picture in wanted.items():
            if not picture.pixels.requires_grad:
                self._seen[key] = seen[key]
                self._seen.move_to_end(key)
        while len(self._seen) > self._picture_cache:
            self._seen.popitem(last=False)
        return seen

    def _look(self, pictures: Sequence[Picture], graph: bool) -> dict[str, Vision]:
        assert self.patches is not None
        grids = [self.patches.grid(*p.pixels.shape[-2:]) for p in pictures]
        # Not under inference mode: these outputs may later take part in a backward pass.
        with torch.inference_mode(False), torch.set_grad_enabled(graph):
            patches: list[Tensor | None] = [None] * len(pictures)
            sizes: dict[tuple[int, ...], list[int]] = {tuple(p.pixels.shape): [] for p in pictures}
            for n, picture in enumerate(pictures):
                sizes[tuple(picture.pixels.shape)].append(n)
            for places in sizes.values():  # pictures of one size are resized and cut together
                batch = torch.stack([pictures[n].pixels.to(self.device) for n in places])
                for n, cut in zip(places, self.patches(batch)):
                    patches[n] = cut
            packed = torch.cat([cut for cut in patches if cut is not None]).to(self.model.dtype)
            out = self.base.get_image_features(packed, torch.tensor(grids, device=self.device), return_dict=True)
        deep = [list(layer) for layer in getattr(out, "deepstack_features", None) or ()]
        return {
            picture.key: Vision(grids[n], out.pooler_output[n], tuple(layer[n] for layer in deep))
            for n, picture in enumerate(pictures)
        }

    def positions(self, prompt: Prompt) -> Tensor:
        """M-RoPE positions (3, T) of a prompt, as the model itself counts them."""
        assert self.patches is not None
        ids = torch.tensor([prompt.ids])
        count = inspect.signature(self.base.get_rope_index).parameters  # older releases find the pictures by their ids
        given = {"input_ids": ids, "mm_token_type_ids": (ids == self.model.config.image_token_id).int()}
        if prompt.pictures:
            grids = [self.patches.grid(*p.pixels.shape[-2:]) for p in prompt.pictures]
            given["image_grid_thw"] = torch.tensor(grids)
        return self.base.get_rope_index(**{k: v for k, v in given.items() if k in count})[0][:, 0]

    def _follow(self, pixels: Sequence[Tensor]) -> None:
        """Move the model to where the first pictures are, unless it was told where to be."""
        if self._device is None and pixels:
            self._device = pixels[0].device
            self.model.to(self._device)


def left_pad(rows: Sequence[Sequence[int]], fill: int) -> tuple[Tensor, Tensor]:
    """Rows of ids as one tensor (N, longest), padded on the left, and its mask, 1 where a token is."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[fill] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def _steps(items: Sequence[Any], size: int) -> range:
    return range(0, len(items), size)


def _content(part: str | Tensor) -> dict[str, str]:
    return {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}


def _key(pixels: Tensor) -> str:
    """By content, so that a reference handed in again is known again; by identity where gradients must find it."""
    if pixels.requires_grad:
        return f"tensor-{id(pixels)}"
    data = pixels.detach().float().cpu().contiguous()
    content = hashlib.blake2b(data.numpy().data, digest_size=16)
    content.update(repr(tuple(data.shape)).encode())
    return content.hexdigest()


def _load(model: str, dtype: str, download: bool) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, options = str(JUDGES.get(model, model)), {"local_files_only": not download}
    try:
        processor = AutoProcessor.from_pretrained(model, **options)
        loaded = AutoModelForImageTextToText.from_pretrained(model, dtype=getattr(torch, dtype), **options)
    except Exception as error:  # a missing or broken checkpoint shows in many types of error
        advice = "" if download else " (looked on this machine only; pass download=True to fetch it)"
        raise ValueError(f"model: could not load {model!r}{advice}: {' '.join(str(error).split())[:300]}") from error
    return loaded, processor
