"""PromptEnhancer's key points (arXiv:2509.04545): what of a prompt a picture can get wrong, in six groups, and a mean.

The names are reconstructed from summaries of the paper; its judge, AlignEvaluator, is not public. Any judge that says
for each point whether it applies, and holds, will do.
"""

import math
from collections.abc import Mapping

from visalign.names import unknown_name

KEY_POINT_GROUPS = {
    "language": ("negation", "attribute consistency", "pronoun resolution"),
    "visual attributes": ("counting", "size", "material", "expression", "artistic style"),
    "action and interaction": (
        "full-body action",
        "hand action",
        "animal action",
        "contact interaction",
        "non-contact interaction",
        "state",
    ),
    "relations and structure": (
        "comparative relation",
        "compositional relation",
        "containment",
        "similarity",
        "cross-entity binding",
        "entity layout",
    ),
    "knowledge": ("knowledge application", "counterfactual"),
    "scene text": ("text rendering", "text layout"),
}
KEY_POINTS = tuple(point for group in KEY_POINT_GROUPS.values() for point in group)
STRUCTURAL = frozenset({"full-body action", "hand action", "animal action", "contact interaction"})  # or deformed


def key_point_holds(point: str, consistent: bool, intact: bool = True) -> bool:
    """Whether a picture passes a point: it shows what the prompt says, and for STRUCTURAL ones is not deformed."""
    if point not in KEY_POINTS:
        raise unknown_name("point", point, KEY_POINTS)
    return consistent and (intact or point not in STRUCTURAL)


def key_point_score(held: Mapping[str, float | None], by_group: bool = True) -> float:
    """The mean over the groups of the means of their applicable points: in [0, 1]; [R], reconstructed.

    Args:
        held: by point, 1 (or True) where it holds, 0 where not, anything between for doubt; None, or left out: does
            not apply. Judged against the prompt as the user wrote it.
        by_group: False averages over all applicable points alike, as another summary of the paper has it.

    Raises:
        ValueError: an unknown point, a value outside [0, 1], or no point that applies.
    """
    for point, value in held.items():
        if point not in KEY_POINTS:
            raise unknown_name("held", point, KEY_POINTS)
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"held: got {value} for {point!r}, expected 0 .. 1, or None where it does not apply")
    groups = [[held[p] for p in group if held.get(p) is not None] for group in KEY_POINT_GROUPS.values()]
    groups = [group for group in groups if group]
    if not groups:
        raise ValueError(f"held: got no point that applies, expected at least one of {KEY_POINTS}")
    if not by_group:
        groups = [[value for group in groups for value in group]]
    return math.fsum(math.fsum(float(v) for v in group if v is not None) / len(group) for group in groups) / len(groups)
