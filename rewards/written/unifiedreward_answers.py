"""What UnifiedReward's models write: reading their scores, verdicts and shares."""

import math
import re
from collections.abc import Sequence

from visalign.rewards.vlm.parsing import Unreadable, as_numbers

DIMENSIONS = {"images": ("Alignment", "Coherence", "Style"), "videos": ("Alignment", "Physics", "Style")}
_SHARE = r"\s*:?\s*Image\s*1\s*:\s*([\d.]+)\s*Image\s*2\s*:\s*([\d.]+)"


def read_final_score(text: str) -> float:
    """The number after the last "Final Score:", 1 to 5 (version 1)."""
    marks = re.findall(r"Final Score:\s*\**\s*(\d+(?:\.\d+)?)", text)
    if not marks:
        raise Unreadable("no 'Final Score:'")
    return as_numbers(float(marks[-1]), 1, 1, 5, "Final Score")[0]


def read_dimensions(text: str, dimensions: Sequence[str]) -> dict[str, float | None]:
    """The numbers, 0 to 5, after "<Dimension> Score (1-5):" (version 2.0); None for those that are missing.

    Raises:
        Unreadable: all are missing, or one is out of range.
    """
    marks = dict(re.findall(r"(\w+) Score \(1-5\):\s*\**\s*(\d+(?:\.\d+)?)", text))
    if not set(marks) & set(dimensions):
        raise Unreadable(f"no score for any of {list(dimensions)}")
    return {d: as_numbers(float(marks[d]), 1, 0, 5, d)[0] if d in marks else None for d in dimensions}


def read_rank(text: str) -> float:
    """1 where the text says that image 1 is better, 0 for image 2, 1/2 for neither or both."""
    better = {number for number in "12" if re.search(rf"\bImage {number} is better\b", text, re.IGNORECASE)}
    if len(better) == 1:
        return 1.0 if better == {"1"} else 0.0
    if better or re.search(r"\bBoth images are equally good\b", text, re.IGNORECASE):
        return 0.5
    raise Unreadable("no verdict")


def read_think(text: str) -> float:
    """As `read_rank`, of the last <answer>...</answer> after the thinking; an unfinished one counts for nothing."""
    answers = re.findall(r"<answer>(.*?)</answer>", text.rpartition("</think>")[2], re.DOTALL)
    if not answers:
        raise Unreadable("no finished <answer>")
    return read_rank(answers[-1])


def read_shares(text: str) -> float:
    """Image 1's share, 0 to 1: the mean over dimensions of x / (x + y), which the judge is told to make sum to 1."""
    shares = []
    for dimension in DIMENSIONS["images"]:
        match = re.search(rf"{dimension} Score{_SHARE}", text)
        if match is None:
            raise Unreadable(f"no shares for {dimension}")
        try:
            first, second = as_numbers([float(match[1]), float(match[2])], 2, 0, 1, dimension)
        except ValueError as error:
            raise Unreadable(f"{dimension}: got {match[1]} and {match[2]}, expected numbers within [0, 1]") from error
        if abs(first + second - 1) > 0.05:
            raise Unreadable(f"{dimension}: got shares {first:g} and {second:g}, expected a sum of 1")
        shares.append(first / (first + second))
    return math.fsum(shares) / len(shares)
