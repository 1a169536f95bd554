import random
import sys
import types

import pytest
import torch

from visalign.rewards import score
from visalign.rewards.verifiers.ocr import OcrReward, edit_distance, normalise, quoted_text, text_score

IMAGES = torch.full((1, 3, 8, 8), 0.5)


@pytest.mark.parametrize(
    "prompt, text",
    [
        ('A sign that says "Hello World" in "red"', "Hello World"),
        ("A sign that says \u201cHello World\u201d", "Hello World"),
        ("Ein Schild mit \u201eGuten Tag\u201c", "Guten Tag"),
        ('Straight "to curly\u201d', "to curly"),
        ("It's 5 o'clock", None),
        ('one quote " only', None),
        ('empty "" first, then "text"', ""),
    ],
)
def test_the_target_stands_between_the_first_pair_of_double_quotes(prompt, text):
    assert quoted_text(prompt) == text


def test_edit_distance_agrees_with_its_recursion():
    def slow(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(slow(a[1:], b) + 1, slow(a, b[1:]) + 1, slow(a[1:], b[1:]) + (a[0] != b[0]))

    rng = random.Random(0)
    for _ in range(60):
        a, b = ("".join(rng.choices("abc", k=rng.randint(0, 5))) for _ in range(2))
        assert edit_distance(a, b) == slow(a, b) == edit_distance(b, a)
    assert edit_distance("kitten", "sitting") == 3


@pytest.mark.parametrize(
    "target, read, expected",
    [
        ("Hello World", "hello  WORLD", 1.0),  # case and spaces do not count
        ("Hello", "xxHelloHelloyy", 1.0),  # more than asked for is no better and no worse
        ("Hello", "", 0.0),
        ("abcdefghij", "abcdefghix", 0.9),
        ("abcdefghij", "abcdefghi", 0.9),
        ("ab", "zzzzzzzzzzzz", 0.0),  # the distance is capped at the target's length
        ("abcd", "ad", 0.5),
    ],
)
def test_scores_of_known_readings(target, read, expected):
    assert text_score(target, read) == pytest.approx(expected)


def test_a_score_stays_within_its_range():
    rng = random.Random(1)
    for _ in range(200):
        target, read = ("".join(rng.choices("ab ", k=rng.randint(0, 8))) for _ in range(2))
        if normalise(target):
            assert 0 <= text_score(target, read) <= 1
    with pytest.raises(ValueError, match="target: got no letters"):
        text_score("  ", "a")


def test_the_reward_joins_lines_and_keeps_what_was_read():
    reward = OcrReward(lambda picture: ["Hello", "World"] if picture.size == (8, 8) else [])
    result = score(reward, IMAGES.repeat(2, 1, 1, 1), ['"Hello World"', '"Hello Moon"'])
    assert result.total.tolist() == pytest.approx([1.0, 1 - 4 / 9])  # moon to world: four edits of nine letters
    assert result.outputs["ocr"].extra["recognised"] == ["HelloWorld"] * 2


def test_prompts_without_text_and_failing_engines_are_invalid_not_zero():
    def engine(picture):
        if picture.getpixel((0, 0))[0] > 200:
            raise RuntimeError("no paper")
        return "abcde"

    images = torch.cat([IMAGES, IMAGES, torch.ones(1, 3, 8, 8), IMAGES])
    prompts = ['"abcde"', "no text", '"abcde"', '"abxyz"']
    reward = OcrReward(engine)
    result = score(reward, images, prompts)
    output = result.outputs["ocr"]
    assert output.is_valid.tolist() == [True, False, False, True]
    assert "no text between double quotes" in output.rationale[1] and "RuntimeError: no paper" in output.rationale[2]
    assert result.total.tolist() == pytest.approx([1, 0.7, 0.7, 0.4])  # the mean of those that were read
    assert score(reward, images, prompts, on_fail="zero").total[2] == 0


def test_an_engine_may_be_named_by_file(tmp_path):
    (tmp_path / "mine.py").write_text("def read(picture):\n    return 'abc'\n")
    assert score(OcrReward(f"{tmp_path}/mine.py:read"), IMAGES, ['"abc"']).total.item() == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"engine": "tesserakt"}, "did you mean 'tesseract'"),
        ({"engine": "no.such:thing"}, "engine: could not import 'no.such:thing'"),
        ({"engine": "paddleocr"}, "it fetches missing models itself; expected download=True"),
        ({"engine": len, "engine_options": {"lang": "de"}}, "engine_options: got ['lang'], expected none"),
        ({"engine": 3}, "engine: got 3, expected something callable"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError) as error:
        OcrReward(**options)
    assert message in str(error.value)


def test_a_missing_engine_is_said_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "easyocr", None)
    with pytest.raises(ValueError, match="engine: got 'easyocr', which is not installed here"):
        OcrReward("easyocr")


# The adapters, on stand-ins with the engines' documented interfaces


def stand_in(monkeypatch, name, **attributes):
    module = types.ModuleType(name)
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, name, module)


def test_tesseract(monkeypatch):
    stand_in(monkeypatch, "pytesseract", image_to_string=lambda picture, lang="": f"ab\n{lang}\n")
    reward = OcrReward("tesseract", engine_options={"lang": "deu"})
    assert reward(IMAGES, ['"ab deu"']).scores.item() == 1


def test_easyocr(monkeypatch):
    class Reader:
        def __init__(self, lang_list, verbose, download_enabled, gpu=True):
            assert (lang_list, download_enabled, gpu) == (["en"], False, False)

        def readtext(self, pixels, detail):
            assert pixels.shape == (8, 8, 3) and detail == 0
            return ["ab", "cd"]

    stand_in(monkeypatch, "easyocr", Reader=Reader)
    assert OcrReward("easyocr", engine_options={"gpu": False})(IMAGES, ['"abcd"']).scores.item() == 1


def test_paddleocr_2_and_3(monkeypatch):
    class Old:
        def __init__(self, lang, use_angle_cls, show_log, det_model_dir=None):
            assert lang == "en" and det_model_dir == "here"

        def ocr(self, pixels, cls):
            box = [[0, 0]] * 4
            return [[[box, ("ab", 0.9)], [box, ("noise", 0.0)], [box, ("cd", 0.4)]], None]

    class New:
        def __init__(self, lang, use_doc_orientation_classify, use_doc_unwarping, use_textline_orientation):
            assert not (use_doc_orientation_classify or use_doc_unwarping or use_textline_orientation)

        def predict(self, pixels):
            return [{"rec_texts": ["ab", "cd"]}]

    stand_in(monkeypatch, "paddleocr", PaddleOCR=Old)
    assert OcrReward("paddleocr", engine_options={"det_model_dir": "here"})(IMAGES, ['"abcd"']).scores.item() == 1
    stand_in(monkeypatch, "paddleocr", PaddleOCR=New)
    assert OcrReward("paddleocr", download=True)(IMAGES, ['"abcd"']).scores.item() == 1
