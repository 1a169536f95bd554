"""A vision-language model run here by transformers, for judges that read its probabilities or its answers.

`VLM.hidden(sequences)` gives the hidden states that probabilities are read from; what the sequences begin with in
common is computed once. `yes_token` asks yes/no questions on top of it, `local_chat` generates text.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .chat import Message
from .loading import check_vlm_options, load_vlm
from .prompt import Picture, Prompt, Vision, picture_key
from .qwen_vision import QWEN, VIDEO, QwenVision
from .shared_prefix import shared_hidden


class VLM:
    """A frozen vision-language model with its processor.

    Qwen2-VL, Qwen2.5-VL and Qwen3-VL take the fast road: pictures stay tensors (`differentiable` is True: gradients
    reach the pixels), the vision tower reads all of a batch's pictures packed, its outputs are kept by content, and
    shared beginnings run once. Qwen2-VL and Qwen2.5-VL also take videos (`takes_videos`), likewise. Any other model of
    AutoModelForImageTextToText goes through its own processor, one whole sequence a conversation, with no gradient.

    Args:
        model: a hub id, a folder, or "shapes-vlm", the shapes world's own, of no use elsewhere.
        device: "cpu", "cuda", ...; None: wherever the first pictures are.
        batch_size: sequences the language model runs at once.
        min_pixels, max_pixels: the pixel budget of a picture, and of a frame; None: the processor's own for each.
        share_prefix: False computes every sequence whole; for comparison.
        gradient_checkpointing: less memory in the backward pass; leaves no cache to share prefixes by.
        picture_cache: how many pictures' and videos' vision-tower outputs are kept.
        fps: frames a second of videos, all of whose frames are seen.

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
        fps: float = 2.0,
    ) -> None:
        check_vlm_options(dtype, batch_size, fps)
        self.name = model
        self.model, self.processor = load_vlm(model, dtype, download)
        self._wire(device, batch_size, min_pixels, max_pixels, share_prefix, gradient_checkpointing, picture_cache, fps)

    @classmethod
    def of(cls, model: Any, processor: Any, name: str = "model", device: str | None = None, **options: Any) -> "VLM":
        """A VLM of a model and a processor that are loaded already; options as above."""
        vlm = cls.__new__(cls)
        vlm.name, vlm.model, vlm.processor = name, model, processor
        known: dict[str, Any] = dict(batch_size=16, min_pixels=None, max_pixels=None, share_prefix=True)
        known.update(gradient_checkpointing=False, picture_cache=128, fps=2.0)
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
        fps: float,
    ) -> None:
        self.model.requires_grad_(False).eval()
        self.tokenizer = self.processor.tokenizer
        self.base = self.model.base_model
        self.differentiable = self.model.config.model_type in QWEN
        self.batch_size = batch_size
        self.share_prefix = share_prefix and not gradient_checkpointing
        self.vision = None
        if self.differentiable:
            self.vision = QwenVision(self.model, self.processor, min_pixels, max_pixels, fps)
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

    @property
    def takes_videos(self) -> bool:
        return self.vision is not None and self.vision.takes_videos

    # From a conversation to tokens

    def render(self, conversation: Sequence[Message], generation_prompt: bool = True) -> str:
        """The conversation in the model's chat template, up to where its answer begins."""
        if getattr(self.processor, "chat_template", None) is None:
            raise ValueError(f"model: got {self.name!r} without a chat template, expected an instruction-tuned model")
        turns = [{"role": m.role, "content": [_content(part) for part in m.parts]} for m in conversation]
        return self.processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation_prompt)

    def prompts(self, conversations: Sequence[Sequence[Message]]) -> list[Prompt]:
        """Conversations as tokens; a picture that several hold is hashed once, words that several hold are cut once."""
        keys: dict[int, str] = {}
        words: dict[Any, tuple[str, tuple[int, ...]]] = {}
        return [self.prompt(conversation, keys=keys, words=words) for conversation in conversations]

    def prompt(
        self,
        conversation: Sequence[Message],
        generation_prompt: bool = True,
        keys: dict[int, str] | None = None,
        words: dict[Any, tuple[str, tuple[int, ...]]] | None = None,
    ) -> Prompt:
        """A conversation as tokens; pictures are not looked at yet.

        `keys` holds those of pictures by id, `words` texts and their ids by what conversations say.
        """
        shape = tuple((m.role, *(p if isinstance(p, str) else p.ndim for p in m.parts)) for m in conversation)
        words = {} if words is None else words
        if shape not in words:
            text = self.render(conversation, generation_prompt)
            words[shape] = text, tuple(self.tokenizer(text, add_special_tokens=not self.differentiable)["input_ids"])
        text, ids = words[shape]
        pixels = [part for m in conversation for part in m.parts if isinstance(part, Tensor)]
        for part in pixels:
            self._check_part(part)
        self._follow(pixels)
        keys = {} if keys is None else keys
        pictures = tuple(Picture(p, keys.get(id(p)) or keys.setdefault(id(p), picture_key(p))) for p in pixels)
        if self.vision is None:  # its processor will put the pictures in; nothing is shared by marks
            return Prompt(text, ids, ids, pictures)
        return self.vision.with_places(text, ids, pictures)

    def _check_part(self, part: Tensor) -> None:
        shape = tuple(part.shape)
        if part.ndim not in (3, 4) or part.shape[-3] != 3 or 0 in shape or not part.is_floating_point():
            raise ValueError(f"picture: got {part.dtype} {shape}, expected floats (3, H, W), or a video (F, 3, H, W)")
        if part.ndim == 4 and not self.takes_videos:
            got = f"{shape} for a model of type {self.model.config.model_type!r}"
            raise ValueError(f"video: got {got}, expected one of {VIDEO}; give its frames one by one")

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
        if self.vision is not None:
            made = self.vision.inputs(prompts, self.tokenizer.pad_token_id or 0)
            return {name: value.to(self.device) for name, value in made.items()}
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
        assert self.vision is not None
        return self.vision.look(pictures, self.device, graph)

    def positions(self, prompt: Prompt) -> Tensor:
        """M-RoPE positions (3, T) of a prompt, as the model itself counts them."""
        assert self.vision is not None
        return self.vision.positions(prompt)

    def _follow(self, pixels: Sequence[Tensor]) -> None:
        """Move the model to where the first pictures are, unless it was told where to be."""
        if self._device is None and pixels:
            self._device = pixels[0].device
            self.model.to(self._device)


def _steps(items: Sequence[Any], size: int) -> range:
    return range(0, len(items), size)


def _content(part: str | Tensor) -> dict[str, str]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "video" if part.ndim == 4 else "image"}
