"""GenEval's rules (see geneval.py): what a prompt's metadata asks of the objects that were found in a picture."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from visalign.names import unknown_name

from .detector import Box, Detection, canonical

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
MARGIN = 0.1  # of the two sizes' sum: what centres must be apart before they count as apart
Objects = Mapping[str, Sequence[Detection]]  # by canonical label, surest first


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
    by_class: dict[str, list[Detection]] = {}
    sure = sorted((d for d in detections if d.score > threshold), key=lambda d: -d.score)
    for label in dict.fromkeys(canonical(d.label) for d in sure):
        own: list[Detection] = []
        for d in [d for d in sure if canonical(d.label) == label][:max_objects]:
            if max_overlap == 1 or all(box_iou(d.box, other.box) < max_overlap for other in own):
                own.append(d)
        by_class[label] = own
    return by_class


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
    places = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {relation for relation, holds in places.items() if holds}


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
        detections = objects.get(name, ())
        strict, soft, top = len(detections) >= n, len(detections) == n, detections[:n]
        count.append(1 - abs(len(detections) - n) / n)
        if not strict:
            reasons.append(f"{len(detections)} {name}, expected {n}")
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
        detections = objects.get(canonical(clause["class"]), ())
        if len(detections) >= clause["count"]:
            reasons.append(f"{len(detections)} {clause['class']}, expected fewer than {clause['count']}")
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
