"""Reading written answers: whatever stands around what was asked for, and nothing guessed where it is missing."""

import json
import math
import random
import string

import pytest

from visalign.rewards.vlm.chat import Token
from visalign.rewards.vlm.parsing import (
    Unreadable,
    as_numbers,
    digit_probabilities,
    labelled_number,
    leading_number,
    read_json,
    token_after_label,
)

GOOD = {"reasoning": 'it\'s good, "really": [1, 2] {x}', "score": [20, 23.5]}
PLAIN = {"reasoning": "the sky is red", "score": [20, 23.5]}


VARIANTS = {
    "plain": json.dumps(GOOD),
    "indented": json.dumps(GOOD, indent=2),
    "fenced": f"```json\n{json.dumps(GOOD)}\n```",
    "prose around": f"Let me {{think}} about [this].\n{json.dumps(GOOD)}\nThat is my answer, {{}}.",
    "single quotes": str(PLAIN),
    "apostrophe in single quotes": "{'reasoning': 'the dog's tail is gone', 'score': [20, 23.5]}",
    "quotes in a string": '{"reasoning": "the "red" car is there", "score": [20, 23.5]}',
    "line break in a string": '{"reasoning": "first\nsecond", "score": [20, 23.5]}',
    "trailing commas": '{"reasoning": "x", "score": [20, 23.5,],}',
    "bare keys": "{reasoning: 'x', score: [20, 23.5]}",
    "python words": "{'reasoning': None, 'good': True, 'score': [20, 23.5]}",
    "strings for numbers": '{"reasoning": "x", "score": ["20", "23.5/25"]}',
    "an example before": '{"score": [1, 2]} was the example. ' + json.dumps(GOOD),
}


@pytest.mark.parametrize("text", VARIANTS.values(), ids=VARIANTS)
def test_json_is_read_out_of_whatever_surrounds_it(text):
    assert as_numbers(read_json(text, keys=("score",))["score"], 2, 0, 25) == [20, 23.5]


BAD = {
    "empty": "",
    "no JSON": "I cannot assist with that request.",
    "other keys": '{"rating": [20, 20]}',
    "cut off in a number": '{"reasoning": "x", "score": [20, 2',
    "cut off before the end": '{"reasoning": "x", "score": [20, 23]',
    "NaN": '{"score": [NaN, 3]}',
    "infinite": '{"score": [1e999, 3]}',
    "too few": '{"score": [20]}',
    "too many": '{"score": [20, 20, 20]}',
    "words": '{"score": ["high", "low"]}',
    "booleans": '{"score": [true, false]}',
    "too high": '{"score": [26, 3]}',
    "negative": '{"score": [-1, 3]}',
    "deep": '{"score": ' + "[" * 5000,
    "null": '{"score": null}',
}


@pytest.mark.parametrize("text", BAD.values(), ids=BAD)
def test_what_is_missing_cut_off_or_out_of_range_is_unreadable_and_not_guessed(text):
    with pytest.raises(Unreadable):
        as_numbers(read_json(text, keys=("score",))["score"], 2, 0, 25)


def test_mangled_answers_never_raise_anything_but_unreadable_and_stay_in_range():
    rng = random.Random(0)
    seeds, read = [*VARIANTS.values(), *(t for t in BAD.values() if len(t) < 200)], 0
    for _ in range(3000):
        text = list(rng.choice(seeds))
        for _ in range(rng.randint(0, 6)):
            place = rng.randrange(len(text) + 1)
            kind = rng.randrange(3)
            if kind == 0:
                text.insert(place, rng.choice(string.printable + "{}[]\"',:\\ä\x00"))
            elif kind == 1 and text:
                del text[min(place, len(text) - 1)]
            else:
                text = text[:place] if rng.random() < 0.3 else text + text[place : place + 20]
        try:
            numbers = as_numbers(read_json("".join(text), keys=("score",))["score"], 2, 0, 25)
        except Unreadable:
            continue
        read += 1
        assert all(math.isfinite(n) and 0 <= n <= 25 for n in numbers)
    assert read > 300  # most small damage does not matter


def test_json_written_by_json_is_read_back_as_it_was():
    rng = random.Random(1)
    for _ in range(300):
        reasoning = "".join(rng.choice(string.printable) for _ in range(rng.randint(0, 40)))
        value = {"reasoning": reasoning, "score": [rng.randint(0, 25), round(rng.uniform(0, 25), 2)]}
        around = "".join(rng.choice(string.ascii_letters + " \n") for _ in range(20))
        assert read_json(around + json.dumps(value) + around, keys=("score",)) == value


def test_long_hostile_answers_are_read_in_little_time():
    for text in ("{" * 20_000, '{"a' * 5_000, "{'a': " * 5_000, '"' * 20_000, "{" + " " * 20_000):
        with pytest.raises(Unreadable):
            read_json(text, keys=("score",))


def test_a_labelled_number_is_that_after_its_last_label():
    text = "visual quality: 9 would be wrong.\nVisual Quality: **4**\ntext-to-video alignment: 2.5"
    assert labelled_number(text, "visual quality", 1, 5) == 4
    assert labelled_number(text, "text-to-video alignment", 1, 5) == 2.5
    with pytest.raises(Unreadable, match="no number after 'physics'"):
        labelled_number(text, "physics", 1, 5)
    with pytest.raises(Unreadable, match=r"quality: got 7, expected within \[1, 5\]"):
        labelled_number("quality: 7", "quality", 1, 5)
    with pytest.raises(Unreadable):
        labelled_number("quality: 4th best", "quality", 1, 5)


@pytest.mark.parametrize(
    "text, expected", [("3.5 (good)", 3.5), ("4", 4.0), ("**2.5**", 2.5), ("[ 3 ]", 3.0), ("N/A", None), ("n/a.", None)]
)
def test_a_leading_number_is_read_without_what_follows(text, expected):
    assert leading_number(text) == expected


@pytest.mark.parametrize("text", ["", "good", "-1", "about 3"])
def test_text_that_does_not_begin_with_a_number_is_unreadable(text):
    with pytest.raises(Unreadable):
        leading_number(text)


def _tokens(*texts: str) -> list[Token]:
    return [Token(text, -0.1) for text in texts]


def test_the_digit_token_is_found_by_its_offset_and_not_by_its_first_occurrence():
    tokens = _tokens("In", " 4", "K: ", "quality", ": ", "fine, 4 of 5", ".\n", "qual", "ity:", " ", "3", ";")
    assert token_after_label(tokens, "quality") == (10, 3)
    glued = _tokens("quality", ": 3", "; alignment: ", "5")
    assert token_after_label(glued, "quality") == (1, 3) and token_after_label(glued, "alignment") == (3, 5)


@pytest.mark.parametrize("texts", [("quality", ": "), ("quality: 12",), ("quality: 3.5",), ("4 quality",)])
def test_without_a_single_digit_after_the_label_there_is_no_token(texts):
    with pytest.raises(Unreadable, match="no single digit after 'quality'"):
        token_after_label(_tokens(*texts), "quality")


def test_answers_without_tokens_say_so():
    with pytest.raises(Unreadable, match="no tokens with log-probabilities"):
        token_after_label([], "quality")


def test_digit_probabilities_add_spellings_up_ignore_others_and_sum_to_one():
    top = {"4": math.log(0.3), " 4": math.log(0.1), "5": math.log(0.1), "good": math.log(0.4), "9": math.log(0.05)}
    probabilities = digit_probabilities(Token("4", math.log(0.3), top), (1, 2, 3, 4, 5))
    assert probabilities == pytest.approx([0, 0, 0, 0.8, 0.2])
    with pytest.raises(Unreadable, match="among the likeliest"):
        digit_probabilities(Token("good", -1.0, {"good": -1.0}), (1, 2, 3))
