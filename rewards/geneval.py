"""GenEval (Ghosh et al. 2023, arXiv:2310.11513): are the prompt's objects there, as many, so coloured, so placed?

The rules are those of the benchmark's evaluation code; the soft score is that of Flow-GRPO's reward server. Their
detector ran on mmcv; here it is any model of transformers, so counts at a threshold may differ a little from theirs.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visalign.images import check_images
from visalign.names import unknown_name

from .base import Context, RewardError, check_prompts, register_reward
from .clip_encoder import MAX_ASPECT, ClipEncoder, check_clip_options, preprocess
from .detector import Box, Detection, TransformersDetector, canonical
from .output import RewardOutput
from .plugins import load_callable

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
GREY = 0x99 / 255  # painted over what is not the object when its colour is asked
MARGIN = 0.1  # of the two sizes' sum: what centres must be apart before they count as apart
Objects = Mapping[str, Sequence[Detection]]  # by canonical label, surest first
Colours = Callable[[Tensor, Sequence[Detection], str], Sequence[str]]  # image (3, H, W), objects, their class


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union; a box from 0 to 9 is ten pixels wide, as in the benchmark."""

    def area(x0: float, y0: float, x1: float, y1: float) -> float:
        return max(x1 - x0 + 1, 0) * max(y1 - y0 + 1, 0)

    common = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(*a) + area(*b) - common
    return common / union if union else 0.0


def keep_objects(
    detections: Sequence[Detection], threshold: float, max_objects: int = 16, max_overlap: float = 1.0
) -> dict[str, list[Detection]]:
    """Detections scoring above `threshold`, by label, surest first, at most `max_objects` each.

    Of two of one label whose IoU reaches `max_overlap`, the surer stays; 1 keeps all.
    """
    kept: dict[str, list[Detection]] = {}
    sure = sorted((d for d in detections if d.score > threshold), key=lambda d: -d.score)
    for label in dict.fromkeys(canonical(d.label) for d in sure):
        mine: list[Detection] = []
        for d in [d for d in sure if canonical(d.label) == label][:max_objects]:
            if max_overlap == 1 or all(box_iou(d.box, other.box) < max_overlap for other in mine):
                mine.append(d)
        kept[label] = mine
    return kept


def relations(a: Box, b: Box) -> set[str]:
    """Where `a` lies as seen from `b`: a subset of RELATIONS; two at most, none where the boxes crowd each other.

    Per axis the centres' offset o shrinks to sign(o) max(|o| - 0.1 (size_a + size_b), 0); its share of the whole
    offset's length must exceed one half.
    """
    offset = [(a[k] + a[k + 2] - b[k] - b[k + 2]) / 2 for k in (0, 1)]
    sizes = [abs(a[k + 2] - a[k]) + abs(b[k + 2] - b[k]) for k in (0, 1)]
    apart = [math.copysign(max(abs(o) - MARGIN * s, 0.0), o) for o, s in zip(offset, sizes)]
    length = math.hypot(*offset)
    if all(abs(value) < 1e-3 for value in apart):
        return set()
    x, y = (value / length for value in apart)
    found = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {relation for relation, holds in found.items() if holds}


@dataclass(frozen=True)
class Verdict:
    """What became of a picture's clauses: `strict`, the benchmark's yes or no, and the terms of the soft score."""

    strict: bool
    count: tuple[float, ...]  # a term each clause, 1 where the count is exact; may be negative
    colour: tuple[float, ...]
    position: tuple[float, ...]
    reasons: tuple[str, ...]  # of the strict score's failures

    @property
    def soft(self) -> float:
        """Mean of all terms, clamped to [0, 1] (a crowd of false objects would go below; the clamp is our choice)."""
        terms = self.count + self.colour + self.position
        return min(max(sum(terms) / len(terms), 0.0), 1.0)


def judge_objects(
    objects: Objects, metadata: Mapping[str, Any], colours_of: Callable[[Sequence[Detection], str], Sequence[str]]
) -> Verdict:
    """Check the clauses of one prompt's metadata on the objects found.

    Strict: every `include` clause finds at least its count; its `count` surest are of its colour; each of them stands
    in its relation to each of the clause pointed at; no `exclude` clause reaches its count. Soft: per clause
    1 - |found - count| / count, and where the count is exact 1 - |coloured - count| / count and 1 for the relation;
    where it is not these are 0. (The reward server appends a further 1 after a failed relation; that is not copied.)
    `exclude` has no soft term.

    Args:
        colours_of: (objects, class) to a colour for each.
    """
    count, colour, position, reasons = [], [], [], []
    matched: list[tuple[Sequence[Detection], bool, bool]] = []  # objects of each clause, met strictly, met softly
    for clause in metadata["include"]:
        name, n = canonical(clause["class"]), clause["count"]
        found = objects.get(name, ())
        strict, soft, top = len(found) >= n, len(found) == n, found[:n]
        count.append(1 - abs(len(found) - n) / n)
        if not strict:
            reasons.append(f"{len(found)} {name}, expected {n}")
        if "color" in clause:
            hits = list(colours_of(top, clause["class"])).count(clause["color"]) if strict else 0
            colour.append(1 - abs(hits - n) / n if soft else 0.0)
            if strict and hits < n:
                reasons.append(f"{hits} {clause['color']} {name}, expected {n}")
            strict, soft = strict and hits == n, soft and hits == n
        if "position" in clause:
            relation, index = clause["position"]
            target, target_strict, target_soft = matched[index]
            holds = all(relation in relations(a.box, b.box) for a in top for b in target)
            position.append(float(soft and target_soft and holds))
            if strict and not (target_strict and holds):
                reasons.append(f"{name} not {relation} {canonical(metadata['include'][index]['class'])}")
            strict, soft = strict and target_strict and holds, soft and target_soft and holds
        matched.append((top, strict, soft))
    for clause in metadata.get("exclude", ()):
        found = objects.get(canonical(clause["class"]), ())
        if len(found) >= clause["count"]:
            reasons.append(f"{len(found)} {clause['class']}, expected fewer than {clause['count']}")
    return Verdict(not reasons, tuple(count), tuple(colour), tuple(position), tuple(reasons))


def check_metadata(metadata: Any, labels: frozenset[str] | None = None) -> None:
    """Raise ValueError unless this is metadata as GenEval writes it; `labels`: what the detector can find, if known."""
    if not isinstance(metadata, Mapping) or not metadata.get("include"):
        raise ValueError(f"metadata: got {metadata!r}, expected {{'tag': ..., 'include': [{{'class', 'count'}}, ...]}}")
    for key in ("include", "exclude"):
        for k, clause in enumerate(metadata.get(key, ())):
            if not isinstance(clause, Mapping) or not {"class", "count"} <= clause.keys():
                raise ValueError(f"{key} {k}: got {clause!r}, expected a mapping with 'class' and 'count'")
            if not isinstance(clause["count"], int) or clause["count"] < 1:
                raise ValueError(f"{key} {k}: got count {clause['count']!r}, expected an integer >= 1")
            if clause.get("color", "red") not in COLOURS:
                raise unknown_name(f"{key} {k}: color", str(clause["color"]), COLOURS)
            if "position" in clause:
                relation, index = clause["position"]
                if relation not in RELATIONS:
                    raise unknown_name(f"{key} {k}: position", str(relation), RELATIONS)
                if index not in range(k):
                    raise ValueError(f"{key} {k}: position names clause {index!r}, expected one before it")
            if labels is not None and canonical(clause["class"]) not in labels:
                raise unknown_name(f"{key} {k}: class (as the detector knows them)", clause["class"], labels)


def tag_accuracies(strict: Tensor, metadata: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The benchmark's table: mean of strict scores (N,) by tag, and "overall", the unweighted mean of these."""
    by_tag: dict[str, list[float]] = {}
    for value, item in zip(strict.tolist(), metadata, strict=True):
        by_tag.setdefault(item["tag"], []).append(value)
    means = {tag: sum(values) / len(values) for tag, values in by_tag.items()}
    return {**means, "overall": sum(means.values()) / len(means)}


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


def crop_object(image: Tensor, found: Detection) -> Tensor:
    """The object's box out of an image (3, H, W), at least one pixel, grey where its mask is not."""
    if found.mask is not None:
        image = torch.where(found.mask.to(image.device), image.float(), image.new_tensor(GREY).float())
    height, width = image.shape[1:]
    left, right = _pixels(found.box[0], found.box[2], width)
    top, bottom = _pixels(found.box[1], found.box[3], height)
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
        found = self._detector(images.detach())
        if len(found) != len(images):
            raise RewardError(self.name, f"the detector gave {len(found)} lists for {len(images)} images")
        verdicts = [self._judge(*item) for item in zip(images.detach(), found, metadata, strict=True)]
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
        return judge_objects(objects, metadata, lambda found, name: self._colours(image, found, name))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
