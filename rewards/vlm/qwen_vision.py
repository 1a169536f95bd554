"""Pictures and videos in a Qwen-VL's prompts: how many tokens stand for them, where, and what the tower makes of them.

Numbers are those of transformers' own processors and models, but for their rounding of resized pixels to 8 bits.
"""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .prompt import Picture, Prompt, Vision, left_pad
from .qwen_patches import Patches

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")  # packed vision tower, M-RoPE, a cache of keys and values
VIDEO = ("qwen2_vl", "qwen2_5_vl")  # a video is one block of tokens; Qwen3-VL writes times between its frames
PICTURE_TYPE, VIDEO_TYPE = 1, 2  # in mm_token_type_ids


class QwenVision:
    """For one model and its processor.

    Args:
        min_pixels, max_pixels: the pixel budget of a picture, and of a frame; None: the processor's own for each.
        fps: frames a second of all videos; Qwen2.5-VL tells time by it, Qwen2-VL counts frames.
    """

    def __init__(
        self, model: Any, processor: Any, min_pixels: int | None, max_pixels: int | None, fps: float = 2.0
    ) -> None:
        self.model, self.fps, config = model, fps, model.config
        self.patches = Patches.of(processor.image_processor, min_pixels, max_pixels)
        cutter = getattr(processor, "video_processor", None) if config.model_type in VIDEO else None
        self.video_patches = None if cutter is None else Patches.of(cutter, min_pixels, max_pixels)
        self.image_id, self.video_id = config.image_token_id, getattr(config, "video_token_id", None)
        self.types = {self.image_id: PICTURE_TYPE} | ({} if cutter is None else {self.video_id: VIDEO_TYPE})

    @property
    def takes_videos(self) -> bool:
        return self.video_patches is not None

    def is_visual(self, ids: Tensor) -> Tensor:
        """Where a token stands for a part of a picture or video; bool, of the shape of `ids`."""
        return torch.isin(ids, torch.tensor(list(self.types), device=ids.device))

    def grid(self, picture: Picture) -> tuple[int, int, int]:
        """Steps in time, rows and columns of patches."""
        height, width = picture.pixels.shape[-2:]
        return self._cutter(picture).grid(height, width, len(picture.pixels) if picture.is_video else 1)

    def with_places(self, text: str, ids: tuple[int, ...], pictures: tuple[Picture, ...]) -> Prompt:
        """`ids` with each placeholder repeated once for each visual token of its picture or video.

        Raises:
            ValueError: other placeholders than these pictures and videos, in this order.
        """
        videos = [token == self.video_id for token in ids if token in self.types]
        if videos != [picture.is_video for picture in pictures]:
            held, given = _count(videos), _count([picture.is_video for picture in pictures])
            problem = f"got {held[0]} places for {given[0]} pictures and {held[1]} for {given[1]} videos"
            problem += " once rendered; does the text hold the model's own tokens, or the chat template too few places?"
            raise ValueError(f"conversation: {problem}")
        waiting = list(pictures)
        places: list[int] = []
        marks: list[Any] = []
        for token in ids:
            if token not in self.types:
                places.append(token)
                marks.append(token)
                continue
            picture = waiting.pop(0)
            count = math.prod(self.grid(picture)) // self.patches.merge**2
            places += [token] * count
            marks += [picture.key] * count
        return Prompt(text, tuple(places), tuple(marks), pictures)

    def inputs(self, prompts: Sequence[Prompt], fill: int) -> dict[str, Tensor]:
        """What the model's `forward` or `generate` takes for a batch, padded on the left with `fill`; no gradient."""
        ids, mask = left_pad([p.ids for p in prompts], fill)
        inputs = {"input_ids": ids, "attention_mask": mask}
        every = [picture for prompt in prompts for picture in prompt.pictures]
        for name, group in (
            ("pixel_values", [p for p in every if not p.is_video]),
            ("pixel_values_videos", [p for p in every if p.is_video]),
        ):
            if group:
                cut = [self._cutter(p)(p.pixels.detach()[None])[0] for p in group]
                inputs[name] = torch.cat(cut).to(self.model.dtype)
        return inputs | self._about(ids, every)

    def positions(self, prompt: Prompt) -> Tensor:
        """M-RoPE positions (3, T) of a prompt, as the model itself counts them."""
        ids, count = torch.tensor([prompt.ids]), self.model.base_model.get_rope_index
        given = {"mm_token_type_ids": torch.zeros_like(ids, dtype=torch.int32), **self._about(ids, prompt.pictures)}
        known = inspect.signature(count).parameters  # older releases find the pictures by their ids
        return count(input_ids=ids, **{key: value for key, value in given.items() if key in known})[0][:, 0]

    def look(self, pictures: Sequence[Picture], device: torch.device, graph: bool) -> dict[str, Vision]:
        """The vision tower's outputs by key, in one pass; with gradient if `graph`."""
        grids = [self.grid(picture) for picture in pictures]
        # Not under inference mode: these outputs may later take part in a backward pass.
        with torch.inference_mode(False), torch.set_grad_enabled(graph):
            patches: list[Tensor | None] = [None] * len(pictures)
            sizes: dict[tuple[int, ...], list[int]] = {tuple(p.pixels.shape): [] for p in pictures}
            for n, picture in enumerate(pictures):
                sizes[tuple(picture.pixels.shape)].append(n)
            for places in sizes.values():  # pictures of one size are resized and cut together
                batch = torch.stack([pictures[n].pixels.to(device) for n in places])
                for n, cut in zip(places, self._cutter(pictures[places[0]])(batch)):
                    patches[n] = cut
            packed = torch.cat([cut for cut in patches if cut is not None]).to(self.model.dtype)
            # One tower for both: a video is a picture of several steps in time.
            out = self.model.base_model.get_image_features(packed, torch.tensor(grids, device=device), return_dict=True)
        deep = [list(layer) for layer in getattr(out, "deepstack_features", None) or ()]
        return {
            picture.key: Vision(grids[n], out.pooler_output[n], tuple(layer[n] for layer in deep))
            for n, picture in enumerate(pictures)
        }

    def _about(self, ids: Tensor, pictures: Sequence[Picture]) -> dict[str, Tensor]:
        """Types of the tokens (N, T), and grids and times of the pictures and videos; nothing where there are none."""
        if not pictures:
            return {}
        kinds = torch.zeros_like(ids, dtype=torch.int32)
        for token, kind in self.types.items():
            kinds[ids == token] = kind
        about = {"mm_token_type_ids": kinds}
        if grids := [self.grid(p) for p in pictures if not p.is_video]:
            about["image_grid_thw"] = torch.tensor(grids)
        if grids := [self.grid(p) for p in pictures if p.is_video]:
            about["video_grid_thw"] = torch.tensor(grids)
            if self.model.config.model_type == "qwen2_5_vl":
                assert self.video_patches is not None
                about["second_per_grid_ts"] = torch.full((len(grids),), self.video_patches.temporal / self.fps)
        return about

    def _cutter(self, picture: Picture) -> Patches:
        if not picture.is_video:
            return self.patches
        if self.video_patches is None:
            got = f"{tuple(picture.pixels.shape)} for a model of type {self.model.config.model_type!r}"
            raise ValueError(f"video: got {got}, expected one of {VIDEO}; give its frames one by one")
        return self.video_patches


def _count(videos: Sequence[bool]) -> tuple[int, int]:
    return len(videos) - sum(videos), sum(videos)
