import pytest
from PIL import Image

from visalign.demos import markup
from visalign.demos.plots import curves_html, search_curve_html
from visalign.demos.requests import DrawRequest, Reading, Side
from visalign.demos.tabs.runs import findings_html, runs_html
from visalign.demos.tabs.score import ranking_html, read_rubric
from visalign.worlds.shapes.scenes import Placed

EVIL = "<img src=x onerror=alert(1)>\"'&"
SAFE = "&lt;img src=x onerror=alert(1)&gt;"
PICTURE = Image.new("RGB", (64, 64), "red")


def test_no_text_of_people_files_or_rewards_becomes_html(tmp_path):
    bad = [Reading(0.5, {EVIL: 0.5}, EVIL)], [Reading(None, problem=EVIL)]
    line = {"step": 1, "reward_mean": 0.5, "findings": [EVIL]}
    (tmp_path / "metrics.jsonl").write_text("")
    for html in (
        markup.figure(PICTURE, EVIL, EVIL),
        markup.bars({EVIL: bad}, {}),
        markup.details({EVIL: bad[0]}, EVIL),
        markup.table(EVIL, [EVIL], [[EVIL]]),
        markup.status(EVIL),
        markup.problem(EVIL),
        markup.note(EVIL),
        curves_html(EVIL, ["reward_mean"], {EVIL: [line], "other": [line]}),
        search_curve_html([(1, 0.5)], 10, EVIL),
        findings_html({EVIL: [line]}),
        runs_html({EVIL: tmp_path}, ["reward"]),
        ranking_html([(EVIL, PICTURE)], {EVIL: bad[0], "b": bad[1]}, [EVIL]),
    ):
        assert "<img src=x" not in html and SAFE in html


def test_pictures_have_alternative_texts_and_boxes_lie_around_objects():
    html = markup.figure(PICTURE, "a red circle", "left", [Placed("red", "circle", 20.0, 30.0, 10.0)])
    assert 'alt="a red circle"' in html and '<rect x="10.0" y="20.0" width="20.0" height="20.0"/>' in html
    assert ">red circle</text>" in html and 'aria-hidden="true"' in html
    assert "<svg" not in markup.figure(PICTURE, "a", "b")
    assert markup.reading_of([]) == "The judge reads: nothing"
    assert "something unknown" in markup.reading_of([Placed("red", "unknown", 0.0, 0.0, 0.0)])


def test_bars_are_as_long_as_the_reward_in_its_range_and_the_better_side_is_marked():
    readings = {"gold": ([Reading(0.25)], [Reading(0.75)]), "jpeg": ([Reading(-4.0)], [Reading(-1.0)])}
    html = markup.bars(readings, {"gold": (0.0, 1.0), "jpeg": (float("-inf"), 0.0)})
    assert 'left" style="width:25.0%' in html and 'right" style="width:75.0%' in html
    assert 'left" style="width:0.0%' in html  # of infinite range: from the least shown to 0
    assert html.count("va-winner") == 2 and '<span class="va-winner">0.7500' in html
    tie = markup.bars({"gold": ([Reading(0.5)], [Reading(0.5)])}, {})
    assert "va-winner" not in tie
    assert "a dog" in markup.bars({"gold": ([Reading(None, problem="cannot read a dog")], [Reading(1.0)])}, {})


def test_pictures_are_ranked_by_the_first_reward_and_unscored_ones_come_last():
    pictures = [(name, PICTURE) for name in ("low", "none", "high")]
    readings = {"gold": [Reading(0.1), Reading(None, problem="is no shapes picture"), Reading(0.9)]}
    html = ranking_html(pictures, readings, ["cut.png: is broken"])
    assert html.index('alt="high"') < html.index('alt="low"') < html.index('alt="none"')
    assert "Not scored: is no shapes picture" in html and "Not scored: cut.png: is broken" in html


def test_rubrics_are_read_line_by_line():
    found = read_rubric("Is it red?\n\n 2 | The shape {is} whole.\n")
    assert [c["weight"] for c in found] == [1.0, 2.0] and found[0]["question"] == "Is it red?"
    assert "question" not in found[1] and found[1]["text"] == "The shape (is) whole."
    assert read_rubric("") == [] == read_rubric(None)


@pytest.mark.parametrize(
    "lines, message",
    [
        ("often | it is red", "rubric: got weight 'often'"),
        ("-1 | it is red", "expected a weight above 0"),
        ("nan | it is red", "expected a weight above 0"),
        ("2 | ", "expected a weight above 0 and a criterion"),
        ("it is red\n" * 21, "rubric: got 21 criteria"),
        ("x" * 5000, "rubric: got 5000 characters"),
    ],
)
def test_unusable_rubrics_are_refused(lines, message):
    with pytest.raises(ValueError, match=message):
        read_rubric(lines)


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(prompt="  "), "prompt: got 0 characters"),
        (dict(prompt="x" * 501), "prompt: got 501"),
        (dict(count=9), "count: got 9, expected 1 to 8"),
        (dict(steps=0), "steps: got 0"),
        (dict(seed=-1), "seed: got -1"),
        (dict(guidance=99.0), "guidance: got 99"),
    ],
)
def test_what_is_asked_for_is_checked(given, message):
    with pytest.raises(ValueError, match=message):
        DrawRequest(**{**dict(prompt="a", seed=0, count=1, steps=10, guidance=None), **given})


def test_sides_are_named_by_all_that_makes_them():
    assert Side().name == "base" and Side("run", 0.5).name == "run at 0.5" and Side("base", 0.5).name == "base"
    assert Side("run", 1.0, "fk", 100, "clip").name == "run, fk for clip, 100 calls"
