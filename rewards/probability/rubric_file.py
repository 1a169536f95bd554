"""Rubrics in YAML: weighted criteria, asked of a vision-language model as yes/no questions about each picture.

    name: portraits
    criteria:
      - name: subject                  # short, in logs
        text: The person is the subject of the picture.
        weight: 2                      # default 1
        question: Does the picture show {prompt}, and is a person its subject?   # default: made from the text
      - name: glasses
        text: Glasses are worn where the prompt asks for them.
        applies_to: (?P<what>(?:sun)?glasses)     # a regular expression; the criterion skips prompts without a match
        question: Is the person wearing {what}?   # asked once for each different match, named parts filled in
      - name: blur
        text: Nothing is blurred.
        question: Is any part of the picture blurred?
        answer: no                     # the answer that speaks for the picture; default yes

Several questions with an `applies_to` each may stand in a list `questions`. A `wording` beside `criteria` (default:
"{question} Answer Yes or No.") is put around every question.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visalign.files import read_yaml
from visalign.names import unknown_name

FOLDER = Path(__file__).parents[1] / "rubrics"  # those that come with the project
WORDING = "{question} Answer Yes or No."
DEFAULT_QUESTION = 'The prompt of this picture was "{prompt}". Is the following true of the picture? {text}'
_KEYS = {"name", "text", "weight", "applies_to", "question", "questions", "answer"}
_PLACE = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Ask:
    """A question with {prompt} and the parts that `applies_to` names in it."""

    question: str
    applies_to: re.Pattern | None = None

    def about(self, prompt: str) -> list[str]:
        """The questions to put for this prompt, each once; none where the criterion does not apply."""
        if self.applies_to is None:
            return [_fill(self.question, {"prompt": prompt})]
        asks = [_fill(self.question, {**m.groupdict(), "prompt": prompt}) for m in self.applies_to.finditer(prompt)]
        return list(dict.fromkeys(asks))


@dataclass(frozen=True)
class Criterion:
    name: str
    text: str
    asks: tuple[Ask, ...]
    weight: float = 1.0
    answer: bool = True  # whether "yes" speaks for the picture


@dataclass(frozen=True)
class Rubric:
    name: str
    criteria: tuple[Criterion, ...]
    wording: str = WORDING

    def questions(self, prompt: str) -> list[list[str]]:
        """For each criterion its questions about a picture of this prompt, worded."""
        return [
            [self.wording.replace("{question}", q) for ask in c.asks for q in ask.about(prompt)] for c in self.criteria
        ]


def _fill(template: str, values: Mapping[str, str | None]) -> str:
    # In one pass: braces in a prompt stay as they are.
    return _PLACE.sub(lambda place: values[place[1]] or "", template)


def load_rubric(source: str | Path | Mapping[str, Any]) -> Rubric:
    """A rubric from a YAML file, by the name of one that comes with the project ("shapes"), or from its content.

    Raises:
        ValueError: no such file, no YAML, or a criterion that cannot work; names file, criterion and key.
    """
    if not isinstance(source, (str, Path)):
        return _read_rubric(source, "rubric")
    shipped = {path.stem: path for path in FOLDER.glob("*.yaml")}
    path = shipped.get(str(source), Path(source).expanduser())
    if not path.is_file():
        raise unknown_name("rubric", str(source), [*shipped, "a file's path"])
    return _read_rubric(read_yaml(path, "rubric"), f"rubric {str(path)!r}")


def _read_rubric(content: Any, where: str) -> Rubric:
    if not isinstance(content, Mapping) or not isinstance(content.get("criteria"), list) or not content["criteria"]:
        raise ValueError(f"{where}: got {str(content)[:60]!r}, expected a mapping with a list 'criteria'")
    for key in content.keys() - {"name", "wording", "criteria"}:
        raise unknown_name(f"{where}: key", str(key), ["name", "wording", "criteria"])
    wording = content.get("wording", WORDING)
    if not isinstance(wording, str) or "{question}" not in wording:
        raise ValueError(f"{where}: got wording {wording!r}, expected text with {{question}} in it")
    criteria = tuple(_read_criterion(c, f"{where}, criterion {k}") for k, c in enumerate(content["criteria"], start=1))
    names = [c.name for c in criteria]
    if len(set(names)) < len(names):
        raise ValueError(f"{where}: got criteria {names}, expected different names")
    return Rubric(str(content.get("name", "rubric")), criteria, wording)


def _read_criterion(content: Any, where: str) -> Criterion:
    if not isinstance(content, Mapping) or not isinstance(content.get("text"), str):
        raise ValueError(f"{where}: got {str(content)[:60]!r}, expected a mapping with 'text'")
    for key in content.keys() - _KEYS:
        raise unknown_name(f"{where}: key", str(key), _KEYS)
    weight = content.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
        raise ValueError(f"{where}: got weight {weight!r}, expected a finite number above 0")
    answer = content.get("answer", True)  # YAML reads a bare yes or no as a truth value
    if str(answer).lower() not in ("yes", "no", "true", "false"):
        raise ValueError(f"{where}: got answer {answer!r}, expected yes or no")
    listed = content.get("questions", [content])
    if "questions" in content and ("question" in content or "applies_to" in content or not listed):
        raise ValueError(f"{where}: got 'questions', expected a list with each question's own 'applies_to' in it")
    asks = tuple(_read_ask(item, content["text"], where) for item in listed)
    yes = str(answer).lower() in ("yes", "true")
    return Criterion(str(content.get("name", content["text"])), content["text"], asks, float(weight), yes)


def _read_ask(content: Any, text: str, where: str) -> Ask:
    if not isinstance(content, Mapping):
        raise ValueError(f"{where}: got {content!r} in 'questions', expected a mapping with 'question'")
    question = content.get("question", DEFAULT_QUESTION.replace("{text}", text.replace("{", "(").replace("}", ")")))
    pattern = content.get("applies_to")
    if not isinstance(question, str) or not isinstance(pattern, (str, type(None))):
        raise ValueError(f"{where}: got question {question!r} and applies_to {pattern!r}, expected texts")
    try:
        applies_to = None if pattern is None else re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise ValueError(f"{where}: applies_to is no regular expression: {error}") from error
    known = {"prompt", *(applies_to.groupindex if applies_to else ())}
    for place in _PLACE.findall(question):
        if place not in known:
            raise unknown_name(f"{where}: {{...}} in question", place, known)
    return Ask(question, applies_to)


def rubric_scores(
    answers: Tensor, places: Sequence[tuple[int, int]], count: int, rubric: Rubric
) -> tuple[Tensor, Tensor]:
    """Scores (N,) and criteria (N, C) in [0, 1] from the probabilities of "yes" to the questions asked.

    A criterion's score is the mean over its questions of the probability of the answer that speaks for the picture; NaN
    where none was asked. A sample's is sum_k weight_k score_k / sum_k weight_k over those that apply; NaN without any.

    Args:
        answers: (Q,).
        places: (sample, criterion) of each.
    """
    width = len(rubric.criteria)
    wanted = torch.tensor([rubric.criteria[c].answer for _, c in places], dtype=torch.bool, device=answers.device)
    cells = torch.tensor([n * width + c for n, c in places], dtype=torch.long, device=answers.device)
    sums = answers.new_zeros(count * width).index_add(0, cells, torch.where(wanted, answers, 1 - answers))
    counts = torch.bincount(cells, minlength=count * width)
    criteria = torch.where(counts > 0, sums / counts.clamp(min=1), math.nan).view(count, width)
    known = (counts > 0).view(count, width)
    weights = answers.new_tensor([c.weight for c in rubric.criteria]) * known
    total = (torch.where(known, criteria, 0.0) * weights).sum(dim=1)
    return total / weights.sum(dim=1), criteria
