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


def match_question(shown: Spec, said: Spec, rng: np.random.Generator) -> Question:
    """Whether a picture of `shown` is one of `said`, nothing missing and nothing besides."""
    text = MATCH[rng.integers(len(MATCH))].format(caption(said, rng))
    return Question("match", text, _yes(_shows(shown, said)))


def _shows(shown: Spec, said: Spec) -> bool:
    """A caption without a relation also fits a picture that was drawn for one with it."""
    return shown.key() == said.key() or (
        said.relation is None and sorted(shown.groups) == sorted(said.groups) and shown.relation is not None
    )


def object_question(shown: Spec, rng: np.random.Generator) -> Question:
    """Whether an object of a colour and shape is there; as often as not one that nearly is."""
    colour, shape, _ = shown.groups[rng.integers(len(shown.groups))]
    chance = rng.random()
    if chance < 0.5:
        colour = list(COLOURS)[rng.integers(6)] if chance < 0.25 else colour
        shape = shape if chance < 0.25 else SHAPES[rng.integers(4)]
    there = any((c, s) == (colour, shape) for c, s, _ in shown.groups)
    return Question("object", f"Is there {_some(1, colour, shape)} in the picture?", _yes(there))


def part_question(shown: Spec, rng: np.random.Generator) -> Question:
    """Whether a shape of any colour, or anything of a colour, is there."""
    if rng.random() < 0.5:
        shape = _mostly([s for _, s, _ in shown.groups], SHAPES, rng)
        return Question("shape", f"Is there a {shape} in the picture?", _yes(shape in {s for _, s, _ in shown.groups}))
    colour = _mostly([c for c, _, _ in shown.groups], tuple(COLOURS), rng)
    there = colour in {c for c, _, _ in shown.groups}
    return Question("colour", f"Is anything in the picture {colour}?", _yes(there))


def _mostly(present: list[str], names: tuple[str, ...], rng: np.random.Generator) -> str:
    absent = [name for name in names if name not in present]
    chosen = present if rng.random() < 0.5 or not absent else absent
    return chosen[rng.integers(len(chosen))]


def count_question(shown: Spec, rng: np.random.Generator) -> Question:
    """Whether there are exactly so many of a colour and shape."""
    colour, shape, count = shown.groups[rng.integers(len(shown.groups))]
    asked = count if rng.random() < 0.5 else int(rng.choice([n for n in (1, 2, 3, 4) if n != count]))
    verb = "Is" if asked == 1 else "Are"
    number = "one" if asked == 1 else NUMBERS[asked][0]
    text = f"{verb} there exactly {number} {colour} {shape}{'s' * (asked > 1)} in the picture?"
    return Question("count", text, _yes(asked == count))


def relation_question(shown: Spec, rng: np.random.Generator) -> Question:
    """Whether one of two objects stands so to the other; only for pictures drawn for a relation."""
    (c0, s0, _), (c1, s1, _) = shown.groups
    relation = RELATIONS.index(shown.relation or "")
    asked = relation if rng.random() < 0.5 else relation ^ 1  # the opposite; a third one could hold as well
    first, second, said = (c0, s0), (c1, s1), asked
    if rng.random() < 0.5:
        first, second, said = second, first, asked ^ 1
    text = f"Is the {' '.join(first)} {RELATIONS[said]} the {' '.join(second)}?"
    return Question("relation", text, _yes(asked == relation))


def ask(shown: Spec, miss: Spec, rng: np.random.Generator) -> Question:
    """A random question about a picture of `shown`; `miss` is a meaning that nearly agrees with it."""
    chance = rng.random()
    if chance < 0.4:
        return match_question(shown, shown if rng.random() < 0.5 else miss, rng)
    if chance < 0.55:
        return object_question(shown, rng)
    if chance < 0.62:
        return part_question(shown, rng)
    if chance < 0.8 or shown.relation is None:
        return count_question(shown, rng) if chance < 0.9 else Question("describe", DESCRIBE, caption(shown, rng))
    if chance < 0.93:
        return relation_question(shown, rng)
    return Question("describe", DESCRIBE, caption(shown, rng))


def question_words() -> list[str]:
    """Every text that the tokenizer should know by heart."""
    spec = Spec((("red", "circle", 2), ("orange", "square", 1)))
    said = caption(spec)
    texts = [DESCRIBE, WHOLE, SAME, *(text.format(said) for text in (BETTER, *MATCH))]
    texts += ["Is there an exactly anything of", "Yes", "No"]
    texts += [f"Is the {c} {s} {r} the {c} {s}s?" for c in COLOURS for s in SHAPES for r in RELATIONS]
    texts += [f"to the {r}, one two three four over under of a picture an image drawing" for r in RELATIONS]
    return texts + ["Are there exactly four in the picture? Which is better?"]
