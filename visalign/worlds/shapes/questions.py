"""Questions about shapes pictures with known answers: what the world's vision-language model is taught and tested with.

The wordings of judges that come with the project (rubrics, VQAScore, PromptEcho, comparisons) are among them.
"""

from dataclasses import dataclass

import numpy as np

from .captions import NUMBERS, caption
from .scenes import COLOURS, RELATIONS, SHAPES, Spec

DESCRIBE = "Describe this image in detail"
WHOLE = "Is every shape in the picture whole and clean?"
SAME = "Do the two pictures show the same objects?"
MATCH = (
    'Does this figure show "{}"? Please answer yes or no.',
    'Does this figure show "{}"? Please answer Yes or No.',
    "Does the picture show exactly {}?",
)
BETTER = 'Which picture shows "{}"? Is the second better than the first?'


@dataclass(frozen=True)
class Question:
    """A question and its answer: "Yes", "No", or a caption. `kind` names what it is about."""

    kind: str
    text: str
    answer: str


def _yes(true: bool) -> str:
    return "Yes" if true else "No"


def _some(count: int, colour: str, shape: str) -> str:
    if count == 1:
        return f"{'an' if colour == 'orange' else 'a'} {colour} {shape}"
    return f"{NUMBERS[count][0]} {colour} {shape}s"


def match_question(spec: Spec, described: Spec, rng: np.random.Generator) -> Question:
    """Whether a picture of `shown` is one of `said`, nothing missing and nothing besides."""
    text = MATCH[rng.integers(len(MATCH))].format(caption(described, rng))
    return Question("match", text, _yes(_shows(spec, described)))


def _shows(spec: Spec, described: Spec) -> bool:
    """A caption without a relation also fits a picture that was drawn for one with it."""
    return spec.key() == described.key() or (
        described.relation is None and sorted(spec.groups) == sorted(described.groups) and spec.relation is not None
    )


def object_question(spec: Spec, rng: np.random.Generator) -> Question:
    """Whether an object of a colour and shape is there; as often as not one that nearly is."""
    colour, shape, _ = spec.groups[rng.integers(len(spec.groups))]
    chance = rng.random()
    if chance < 0.5:
        colour = list(COLOURS)[rng.integers(6)] if chance < 0.25 else colour
        shape = shape if chance < 0.25 else SHAPES[rng.integers(4)]
    there = any((c, s) == (colour, shape) for c, s, _ in spec.groups)
    return Question("object", f"Is there {_some(1, colour, shape)} in the picture?", _yes(there))


def part_question(spec: Spec, rng: np.random.Generator) -> Question:
    """Whether a shape of any colour, or anything of a colour, is there."""
    if rng.random() < 0.5:
        shape = _mostly([s for _, s, _ in spec.groups], SHAPES, rng)
        return Question("shape", f"Is there a {shape} in the picture?", _yes(shape in {s for _, s, _ in spec.groups}))
    colour = _mostly([c for c, _, _ in spec.groups], tuple(COLOURS), rng)
    there = colour in {c for c, _, _ in spec.groups}
    return Question("colour", f"Is anything in the picture {colour}?", _yes(there))


def _mostly(present: list[str], names: tuple[str, ...], rng: np.random.Generator) -> str:
    absent = [name for name in names if name not in present]
    chosen = present if rng.random() < 0.5 or not absent else absent
    return chosen[rng.integers(len(chosen))]


def count_question(spec: Spec, rng: np.random.Generator) -> Question:
    """Whether there are exactly so many of a colour and shape."""
    colour, shape, count = spec.groups[rng.integers(len(spec.groups))]
    claimed = count if rng.random() < 0.5 else int(rng.choice([n for n in (1, 2, 3, 4) if n != count]))
    verb = "Is" if claimed == 1 else "Are"
    number = "one" if claimed == 1 else NUMBERS[claimed][0]
    text = f"{verb} there exactly {number} {colour} {shape}{'s' * (claimed > 1)} in the picture?"
    return Question("count", text, _yes(claimed == count))


def relation_question(spec: Spec, rng: np.random.Generator) -> Question:
    """Whether one of two objects stands so to the other; only for pictures drawn for a relation."""
    (c0, s0, _), (c1, s1, _) = spec.groups
    relation = RELATIONS.index(spec.relation or "")
    wanted = relation if rng.random() < 0.5 else relation ^ 1  # the opposite; a third one could hold as well
    first, second, claim = (c0, s0), (c1, s1), wanted
    if rng.random() < 0.5:
        first, second, claim = second, first, wanted ^ 1
    text = f"Is the {' '.join(first)} {RELATIONS[claim]} the {' '.join(second)}?"
    return Question("relation", text, _yes(wanted == relation))


def ask(spec: Spec, miss: Spec, rng: np.random.Generator) -> Question:
    """A random question about a picture of `shown`; `miss` is a meaning that nearly agrees with it."""
    chance = rng.random()
    if chance < 0.4:
        return match_question(spec, spec if rng.random() < 0.5 else miss, rng)
    if chance < 0.55:
        return object_question(spec, rng)
    if chance < 0.62:
        return part_question(spec, rng)
    if chance < 0.8 or spec.relation is None:
        return count_question(spec, rng) if chance < 0.9 else Question("describe", DESCRIBE, caption(spec, rng))
    if chance < 0.93:
        return relation_question(spec, rng)
    return Question("describe", DESCRIBE, caption(spec, rng))


def question_words() -> list[str]:
    """Every text that the tokenizer should know by heart."""
    spec = Spec((("red", "circle", 2), ("orange", "square", 1)))
    words = caption(spec)
    texts = [DESCRIBE, WHOLE, SAME, *(text.format(words) for text in (BETTER, *MATCH))]
    texts += ["Is there an exactly anything of", "Yes", "No"]
    texts += [f"Is the {c} {s} {r} the {c} {s}s?" for c in COLOURS for s in SHAPES for r in RELATIONS]
    texts += [f"to the {r}, one two three four over under of a picture an image drawing" for r in RELATIONS]
    return texts + ["Are there exactly four in the picture? Which is better?"]
