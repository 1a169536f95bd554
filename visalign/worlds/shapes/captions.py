"""Meanings to captions and back: a small grammar with paraphrases, and the parser that inverts it."""

import re

import numpy as np

from .scenes import COLOURS, SHAPES, Spec

NUMBERS = {1: ("a", "one"), 2: ("two",), 3: ("three",), 4: ("four",)}
PREFIXES = ("", "a picture of ", "an image of ", "a drawing of ")
RELATION_WORDS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
_WORD_NUMBER = {word: number for number, words in NUMBERS.items() for word in words} | {"an": 1}
_GROUP = re.compile(
    rf"(?P<n>{'|'.join(sorted(_WORD_NUMBER, key=len, reverse=True))}) "
    rf"(?P<c>{'|'.join(COLOURS)}) (?P<s>{'|'.join(SHAPES)})s?"
)


def caption(spec: Spec, rng: np.random.Generator | None = None) -> str:
    """A caption of the meaning; with `rng` a random wording, without it the plainest."""

    def pick(options):
        return options[rng.integers(len(options))] if rng is not None else options[0]

    groups = [f"{pick(NUMBERS[n])} {colour} {shape}{'s' if n > 1 else ''}" for colour, shape, n in spec.groups]
    groups = [g.replace("a orange", "an orange", 1) if g.startswith("a orange") else g for g in groups]
    if spec.relation:
        body = f"{groups[0]} {pick(RELATION_WORDS[spec.relation])} {groups[1]}"
    elif len(groups) == 3:
        body = f"{groups[0]}, {groups[1]} and {groups[2]}"
    else:
        body = " and ".join(groups)
    return pick(PREFIXES) + body


def parse(text: str) -> Spec:
    """The meaning of a caption in this grammar; case, extra spaces and a final stop do not matter.

    Raises:
        ValueError: the text is not in the grammar.
    """
    plain = re.sub(r"\s+", " ", text.lower().replace(",", " , ")).strip(" .")
    for prefix in sorted(PREFIXES[1:], key=len, reverse=True):
        plain = plain.removeprefix(prefix)
    groups, rest, at = [], [], 0
    for match in _GROUP.finditer(plain):
        rest.append(plain[at : match.start()].strip())
        groups.append((match["c"], match["s"], _WORD_NUMBER[match["n"]]))
        at = match.end()
    joints, tail = rest[1:], plain[at:].strip()
    words = {word: relation for relation, options in RELATION_WORDS.items() for word in options}
    if groups and not rest[0] and not tail and len({g[:2] for g in groups}) == len(groups):
        if all(j in ("and", ",", ", and") for j in joints):
            return Spec(tuple(groups))
        if len(groups) == 2 and joints[0] in words:
            return Spec(tuple(groups), words[joints[0]])
    raise ValueError(
        f"prompt: got {text!r}, which the shapes world cannot read; expected e.g. 'a red circle', 'two blue squares', "
        f"'a red star above a green circle' with colours {tuple(COLOURS)} and shapes {SHAPES}"
    )
