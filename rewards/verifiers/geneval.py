"""GenEval (Ghosh et al. 2023, arXiv:2310.11513): are the prompt's objects there, as many, so coloured, so placed?

The rules are those of the benchmark's evaluation code; the soft score is that of Flow-GRPO's reward server. Their
detector ran on mmcv; here it is any model of transformers, so counts at a threshold may differ a little from theirs.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visalign.images import check_images
from visalign.locations import load_callable
from visalign.rewards.base import Context, RewardError, RewardOutput, check_prompts, register_reward
from visalign.rewards.embedding.encoder import MAX_ASPECT, ClipEncoder, check_clip_options, preprocess

from .detector import Detection, TransformersDetector
from .geneval_rules import COLOURS, Verdict, check_metadata, judge_objects, keep_objects

GREY = 0x99 / 255  # painted over what is not the object when its colour is asked
Colours = Callable[[Tensor, Sequence[Detection], str], Sequence[str]]  # image (3, H, W), objects, their class


class ClipColours:
    """Names objects' colours zero-shot: the nearest of COLOURS' mean embeddings over three templates.

    The object is cropped to its box, with grey (#999) where its mask is not.
    """

    def __init__(self, encoder: ClipEncoder) -> None:
        self._encoder = encoder
        self._classes: dict[str, Tensor] = {}  # (10, D) by class of object

    def __call__(self, image: Tensor, objects: Sequence[Detection], name: str) -> list[str]:
        """image: (3, H, W) in [0, 1]. Returns a colour for each object."""
        cfg = self._encoder.model.visual.preprocess_cfg
        side = cfg["size"][0] if isinstance(cfg["size"], (tuple, list)) else cfg["size"]
        like = (side, (0, 0, 0), (1, 1, 1), cfg["interpolation"], cfg["resize_mode"])  # sizes only: to batch the crops
        crops = [preprocess(_middle(crop_object(image, d))[None], *like) for d in objects]
        features = self._encoder.embed_images(torch.cat(crops))
        best = (features @ self._embeddings(name).to(features.device).T).argmax(dim=1)
        return [COLOURS[k] for k in best.tolist()]

    def _embeddings(self, name: str) -> Tensor:
        if name not in self._classes:
            wordings = (f"a photo of a {{}} {name}", f"a photo of a {{}}-colored {name}", "a photo of a {} object")
            texts = [wording.format(colour) for colour in COLOURS for wording in wordings]
            means = self._encoder.embed_texts(texts).unflatten(0, (len(COLOURS), len(wordings))).mean(dim=1)
            self._classes[name] = F.normalize(means, dim=-1)
        return self._classes[name]


def crop_object(image: Tensor, detection: Detection) -> Tensor:
    """The object's box out of an image (3, H, W), at least one pixel, grey where its mask is not."""
    if detection.mask is not None:
        image = torch.where(detection.mask.to(image.device), image.float(), image.new_tensor(GREY).float())
    height, width = image.shape[1:]
    left, right = _pixels(detection.box[0], detection.box[2], width)
    top, bottom = _pixels(detection.box[1], detection.box[3], height)
    return image[:, top:bottom, left:right]


def _middle(crop: Tensor) -> Tensor:
    """Of a box too long to be resized whole, the part that a square in the middle lies in."""
    most = MAX_ASPECT * min(crop.shape[1:])
    top, left = (max(0, (side - most) // 2) for side in crop.shape[1:])
    return crop[:, top : top + most, left : left + most]


def _pixels(low: float, high: float, size: int) -> tuple[int, int]:
    first = min(max(round(low), 0), size - 1)
    return first, min(max(round(high), first + 1), size)


@register_reward("geneval")
class GenevalReward:
    """Share of a GenEval prompt's clauses that a picture satisfies (soft), or whether all are (strict); range [0, 1].

    Reads `context["metadata"]`, a dict a picture as in the benchmark's file of prompts:
    {"tag", "include": [{"class", "count", "color"?, "position"?: [relation, index of a clause before]}], "exclude"?}.
    Criteria: "strict", "soft", and the soft score's "count", "colour" and "position" (NaN without such a clause).
    No gradient. `tag_accuracies` makes the benchmark's table of the strict ones.

    Args:
        detector: a folder or hub id of a transformers model for instance segmentation or detection, "module:attribute"
            or a callable (see `detector.Detector`).
        strict: score all or nothing, as the benchmark does, instead of the mean of the clauses' terms.
        colours: what names colours, a callable (see `Colours`) or "module:attribute"; None: CLIP.
        colour_model, colour_pretrained: that CLIP, as for the reward `clip`.
        threshold, counting_threshold: a detection's score must exceed it; the latter where the tag is "counting".
        max_objects, max_overlap: see `keep_objects`.
        device, download: of the models made here.
    """

    name = "geneval"
    differentiable = False
    kind = "pointwise"
    range = (0.0, 1.0)
    needs = ("metadata",)
    media = "images"
    checkpoints = ("facebook/mask2former-swin-small-coco-instance", "ViT-L-14 (openai), for colours")
    licence = "the detector's and CLIP's own (OpenAI's CLIP: MIT)"
    source = "Ghosh et al. 2023, arXiv:2310.11513; soft score: Flow-GRPO, arXiv:2505.05470"

    def __init__(
        self,
        detector: str | Callable = "facebook/mask2former-swin-small-coco-instance",
        strict: bool = False,
        colours: str | Callable | None = None,
        colour_model: str = "ViT-L-14",
        colour_pretrained: str | None = "openai",
        threshold: float = 0.3,
        counting_threshold: float = 0.9,
        max_objects: int = 16,
        max_overlap: float = 1.0,
        device: str | None = None,
        download: bool = False,
    ) -> None:
        self.preflight(
            {
                "colours": colours,
                "colour_model": colour_model,
                "colour_pretrained": colour_pretrained,
                "threshold": threshold,
                "counting_threshold": counting_threshold,
                "max_objects": max_objects,
                "max_overlap": max_overlap,
            }
        )
        if isinstance(detector, str) and ":" not in detector:
            lowest = min(threshold, counting_threshold)
            self._detector: Callable = TransformersDetector(detector, lowest, device, download=download)
        else:
            self._detector = load_callable("detector", detector)
        if colours is None:
            encoder = ClipEncoder(colour_model, colour_pretrained, device, download=download)
            self._colours: Colours = ClipColours(encoder)
        else:
            self._colours = load_callable("colours", colours)
        self.strict = strict
        self._threshold, self._counting_threshold = threshold, counting_threshold
        self._max_objects, self._max_overlap = max_objects, max_overlap

    @staticmethod
    def preflight(options: Mapping[str, Any]) -> None:
        """Raise ValueError for options that cannot work, without loading anything."""
        if options.get("colours") is None:
            model, pretrained = options.get("colour_model", "ViT-L-14"), options.get("colour_pretrained", "openai")
            check_clip_options(model, pretrained, "float32")
        for name, default in (("threshold", 0.3), ("counting_threshold", 0.9), ("max_overlap", 1.0)):
            value = options.get(name, default)
            if not 0 <= value <= 1:
                raise ValueError(f"{name}: got {value}, expected a number in [0, 1]")
        if options.get("max_objects", 16) < 1:
            raise ValueError(f"max_objects: got {options['max_objects']}, expected >= 1")

    def __call__(self, images: Tensor, prompts: Sequence[str], context: Context | None = None) -> RewardOutput:
        """images: (N, 3, H, W) in [0, 1]; context["metadata"]: N dicts. Returns (N,), float32 on the CPU."""
        check_images(images)
        check_prompts(images, prompts)
        metadata = (context or {})["metadata"]
        for n, item in enumerate(metadata):
            try:
                check_metadata(item, getattr(self._detector, "labels", None))
            except ValueError as error:
                raise RewardError(self.name, str(error), n, prompts[n]) from error
        detections = self._detector(images.detach())
        if len(detections) != len(images):
            raise RewardError(self.name, f"the detector gave {len(detections)} lists for {len(images)} images")
        verdicts = [self._judge(*item) for item in zip(images.detach(), detections, metadata, strict=True)]
        criteria = {
            "strict": torch.tensor([float(v.strict) for v in verdicts]),
            "soft": torch.tensor([v.soft for v in verdicts]),
            **{
                key: torch.tensor([_mean(getattr(v, key)) for v in verdicts]) for key in ("count", "colour", "position")
            },
        }
        rationale = ["; ".join(v.reasons) or None for v in verdicts]
        return RewardOutput(criteria["strict" if self.strict else "soft"].clone(), criteria, rationale)

    def _judge(self, image: Tensor, detections: Sequence[Detection], metadata: Mapping[str, Any]) -> Verdict:
        threshold = self._counting_threshold if metadata.get("tag") == "counting" else self._threshold
        objects = keep_objects(detections, threshold, self._max_objects, self._max_overlap)
        return judge_objects(objects, metadata, lambda objects_of, name: self._colours(image, objects_of, name))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
