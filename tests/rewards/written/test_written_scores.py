"""Judges that write their scores, with a scripted chat in the model's place."""

import json
import math
import re

import numpy as np
import pytest
import torch
from chats import Scripted, rational_reply

from visalign.rewards import RewardError, make_reward, parse_spec, score
from visalign.rewards.probability.ordinal import expected_rating, probability_better, rating_variance, tie_mass
from visalign.rewards.vlm.chat import Message, Reply, Token
from visalign.rewards.vlm.judging import (
    RETRY_SEED_STEP,
    UPSTREAM,
    SamplingParams,
    ask,
    fill,
    load_template,
    placeholder,
)
from visalign.rewards.vlm.parsing import Unreadable
from visalign.rewards.written.editscore import EditPass, edit_scores
from visalign.rewards.written.rational_rewards import rational_score, read_aspects, refined_prompt
from visalign.rewards.written.unifiedreward_answers import (
    read_dimensions,
    read_final_score,
    read_rank,
    read_shares,
    read_think,
)
from visalign.rewards.written.videoscore2 import expected_mark, published_mark

IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
VIDEOS = torch.rand(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
SOURCES = [[picture] for picture in torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(2))]
EDIT = {"references": SOURCES}
TEMPLATES = {  # words of these tests; the checkpoints were taught others
    "editscore_sc": "Obeyed? 0 to 10. Spared? 0 to 10, 10 at best. Write JSON with reasons. Wanted: <instruction>",
    "editscore_pq": "Natural? 0 to 10. Clean? 0 to 10. 10 is best. Write JSON with reasons.",
    "unifiedreward_point_v1": "Rate the picture.\nWanted: [{prompt}]",
    "unifiedreward_point_v2_image": "Rate three sides of the picture.\nWanted: [{prompt}]",
    "unifiedreward_point_v2_video": "Rate three sides of the video.\nWanted: [{prompt}]",
    "unifiedreward_pair_rank_image": "Rank for [{prompt}]",
    "unifiedreward_pair_score_image": "Share out for [{prompt}]",
    "unifiedreward_think_image": "Think, then rank for [{prompt}]",
    "rational_rewards_t2i_system": "You mark pictures.",
    "rational_rewards_t2i": "Wanted: {prompt}\nPicture: <image>\nMark it.",
    "rational_rewards_edit_system": "You mark edits.",
    "rational_rewards_edit": "Wanted: {prompt}\nBefore: <image>\nAfter: <image>\nMark it.",
}


@pytest.fixture(autouse=True)
def templates(tmp_path, monkeypatch):
    """The user's folder of templates, filled."""
    for name, text in TEMPLATES.items():
        (tmp_path / f"{name}.txt").write_bytes(text.encode())
    monkeypatch.setenv("VISALIGN_TEMPLATES", str(tmp_path))
    return tmp_path


def _text(conversation) -> str:
    return "".join(part for message in conversation for part in message.parts if isinstance(part, str))


def _pictures(conversation) -> list[torch.Tensor]:
    return [part for message in conversation for part in message.parts if isinstance(part, torch.Tensor)]


def _digit(text: str, probabilities: dict[str, float]) -> Token:
    return Token(text, math.log(probabilities[text]), {k: math.log(p) for k, p in probabilities.items()})


# Asking again


def test_unreadable_answers_are_asked_for_again_with_other_seeds_and_readable_ones_are_not():
    chat = Scripted(lambda c, o: "ok" if _text(c) == "easy" or o["seed"] >= 7 + 2 * RETRY_SEED_STEP else "??")
    asked = [[Message("user", (text,))] for text in ("easy", "hard")]
    answers = ask(chat, asked, _ok, SamplingParams(5, seed=7, temperature=0.3))
    assert [answer.value for answer in answers] == ["ok", "ok"]
    assert [(_text(c), o["seed"] - 7) for c, o in chat.asked] == [
        ("easy", 0),
        ("hard", 0),
        ("hard", RETRY_SEED_STEP),
        ("hard", 2 * RETRY_SEED_STEP),
    ]
    assert {o["temperature"] for _, o in chat.asked} == {0.3}


def test_asking_again_from_temperature_0_draws_instead_of_repeating():
    chat = Scripted(lambda c, o: "??")
    (answer,) = ask(chat, [[Message("user", ("x",))]], _ok, SamplingParams(5, retries=2))
    assert answer.value is None and answer.problem == "unreadable answer: not ok; it ends '??'"
    assert [o["temperature"] for _, o in chat.asked] == [0, 0.7, 0.7]


def test_a_failed_request_is_not_repeated_and_says_why():
    chat = Scripted(lambda c, o: Reply("", error="503 busy"))
    (answer,) = ask(chat, [[Message("user", ("x",))]], _ok, SamplingParams(5))
    assert answer.problem == "no answer: 503 busy" and len(chat.asked) == 1


def _ok(reply: Reply) -> str:
    if reply.text != "ok":
        raise Unreadable("not ok")
    return reply.text


def test_what_looks_like_a_placeholder_in_a_prompt_stays_as_it_is():
    parts = fill("Say {prompt} of <image> and <image>!", "a {prompt} <image> b", (IMAGES[0], IMAGES[1]))
    assert [p for p in parts if isinstance(p, str)] == ["Say a {prompt} <image> b of ", " and ", "!"]
    assert torch.equal(parts[1], IMAGES[0]) and torch.equal(parts[3], IMAGES[1])


# Templates of other projects

NAMED = [
    ("hpsv3", {}, ["hpsv3"]),
    ("editreward", {"weights": __file__}, ["editreward_following", "editreward_quality"]),
    ("editscore", {}, ["editscore_sc", "editscore_pq"]),
    ("unifiedreward", {"version": "1"}, ["unifiedreward_point_v1"]),
    ("unifiedreward_pair", {}, ["unifiedreward_think_image"]),
    ("unifiedreward_pair", {"format": "rank"}, ["unifiedreward_pair_rank_image"]),
    ("unifiedreward_pair", {"format": "score"}, ["unifiedreward_pair_score_image"]),
    ("rational_rewards", {}, ["rational_rewards_t2i_system", "rational_rewards_t2i"]),
    ("rational_rewards", {"task": "edit"}, ["rational_rewards_edit_system", "rational_rewards_edit"]),
]


@pytest.mark.parametrize("name, options, needed", NAMED)
def test_a_missing_template_is_told_before_anything_loads_with_where_to_find_it(templates, name, options, needed):
    for template in UPSTREAM:
        (templates / f"{template}.txt").write_text("{prompt} <instruction>")
    parse_spec(name, **options)
    for template in needed:
        path = templates / f"{template}.txt"
        path.unlink()
        with pytest.raises(ValueError) as caught:
            parse_spec(name, **options)
        message = str(caught.value)
        assert f"got no file at {str(path)!r}, expected the words that the checkpoint was trained on" in message
        assert UPSTREAM[template] in message and (placeholder(template) or "copy") in message and "\n" not in message
        path.write_text("{prompt} <instruction>")


@pytest.mark.parametrize("name", [name for name in UPSTREAM if placeholder(name)])
def test_a_template_without_the_prompts_place_is_refused(templates, name):
    (templates / f"{name}.txt").write_text("rate it")
    with pytest.raises(ValueError, match=f"got a text without '{placeholder(name)}'"):
        load_template(name)
    assert load_template(name, f"rate {placeholder(name)}") == f"rate {placeholder(name)}"


def test_a_template_is_read_as_it_is_from_the_environments_folder_or_the_homes(templates, tmp_path, monkeypatch):
    text = "\r\n {prompt}  \n\n"
    (templates / "hpsv3.txt").write_bytes(text.encode())
    assert load_template("hpsv3") == text == load_template("hpsv3", templates / "hpsv3.txt")
    monkeypatch.delenv("VISALIGN_TEMPLATES")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(ValueError, match="home/.cache/visalign/templates/hpsv3.txt"):
        load_template("hpsv3")


def test_given_templates_take_the_place_of_those_in_the_folder(templates):
    for path in templates.glob("*.txt"):
        path.unlink()
    (templates / "mine.txt").write_text("My own looks")
    given = {"sc": "My own 10 for <instruction>", "pq": str(templates / "mine.txt")}
    reward = _edit(_edit_answer([25, 25], [25, 25]), templates=given)
    reward(IMAGES[:1], ["cats"], {"references": SOURCES[:1]})
    assert [_text(conversation) for conversation, _ in reward.chat.asked] == ["My own 25 for cats", "My own looks"]
    with pytest.raises(ValueError, match="editscore_pq.txt"):
        parse_spec("editscore", templates={"sc": given["sc"]})


def test_a_medium_without_its_question_is_not_scored(templates):
    (templates / "unifiedreward_point_v2_video.txt").unlink()
    text = "Alignment Score (1-5): 2\nCoherence Score (1-5): 3\nStyle Score (1-5): 4"
    reward = _unified(lambda c, o: text)
    assert reward.media == "images" and score(reward, IMAGES, ["a"] * 3).total.tolist() == [3.0] * 3
    with pytest.raises(RewardError, match="scores images, got videos"):
        score(reward, VIDEOS, ["a"] * 2)
    assert _unified(lambda c, o: text, templates={"video": "{prompt}?"}).media == "both"
    (templates / "unifiedreward_point_v2_image.txt").unlink()
    assert _unified(lambda c, o: text, templates={"video": "{prompt}?"}).media == "videos"
    with pytest.raises(ValueError, match="unifiedreward_point_v2_image.txt"):
        parse_spec("unifiedreward")


# EditScore


def _edit_answer(sc, pq):
    def answer(conversation, options):
        numbers = sc if "Spared" in _text(conversation) else pq
        return json.dumps({"reasoning": "because", "score": numbers})

    return answer


def _edit(answer, **options):
    return make_reward("editscore", chat=Scripted(answer), **options)


def test_full_marks_are_10_and_any_zero_is_0():
    assert score(_edit(_edit_answer([25, 25], [25, 25])), IMAGES, ["a"] * 3, EDIT).total.tolist() == [10.0] * 3
    for sc, pq in (([0, 25], [25, 25]), ([25, 25], [25, 0])):
        assert score(_edit(_edit_answer(sc, pq)), IMAGES, ["a"] * 3, EDIT).total.tolist() == [0.0] * 3


def test_an_edits_scores_are_those_of_the_formula():
    output = _edit(_edit_answer([20, 12.5], [22, 18]))(IMAGES, ["a"] * 3, EDIT)
    assert output.scores.tolist() == pytest.approx([math.sqrt(12.5 / 2.5 * 18 / 2.5)] * 3, rel=1e-6)
    found = {key: value[0].item() for key, value in output.criteria.items()}
    expected = {"prompt_following": 8, "consistency": 5, "semantic_consistency": 5, "perceptual_quality": 7.2}
    assert found == pytest.approx(expected, rel=1e-6)
    assert output.rationale[0] == "SC: because\nPQ: because"


def test_identical_passes_score_as_one_pass_and_passes_differ_by_seed():
    reward = _edit(_edit_answer([20, 15], [10, 12]), num_pass=4)
    several, one = reward(IMAGES, ["a"] * 3, EDIT), _edit(_edit_answer([20, 15], [10, 12]))(IMAGES, ["a"] * 3, EDIT)
    torch.testing.assert_close(several.scores, one.scores)
    assert several.uncertainty.abs().max() < 1e-6
    assert sorted({o["seed"] for _, o in reward.chat.asked}) == [42, 43, 44, 45]
    assert all(o["temperature"] == 0.7 and o["top_p"] == 0.9 and o["max_tokens"] == 512 for _, o in reward.chat.asked)


def test_the_two_reductions_are_a_mean_of_roots_and_a_root_of_means():
    passes = [EditPass((25, 10), (25, 20)), EditPass((5, 20), (10, 15))]
    sc, pq = np.array([10, 5]) / 2.5, np.array([20, 10]) / 2.5
    assert edit_scores(passes)["overall"] == pytest.approx(np.sqrt(sc * pq).mean())
    assert edit_scores(passes, "average_first")["overall"] == pytest.approx(np.sqrt(sc.mean() * pq.mean()))
    quirk = edit_scores(passes, "average_first", ["first_by_following"])["overall"]
    assert quirk == pytest.approx(np.sqrt(np.mean([25, 5]) / 2.5 * pq.mean()))


def test_every_10_of_the_templates_is_25_and_those_of_the_instruction_stay():
    reward = _edit(_edit_answer([25, 25], [25, 25]))
    reward(IMAGES[:1], ["paint 10 cats"], {"references": SOURCES[:1]})
    sc, pq = (_text(conversation) for conversation, _ in reward.chat.asked)
    assert "paint 10 cats" in sc and not re.search("10", sc.replace("paint 10 cats", "")) and "10" not in pq
    assert sc.count("25") == 3 and pq.count("0 to 25") == 2 and pq.count("25") == 3 and "<instruction>" not in sc + pq


def test_looks_are_asked_of_the_edit_alone_unless_the_published_bug_is_wanted():
    for quirks, seen in ((), 1), (("pq_sees_source",), 2):
        reward = _edit(_edit_answer([25, 25], [25, 25]), quirks=quirks)
        reward(IMAGES[:1], ["a"], {"references": SOURCES[:1]})
        (sc, _), (pq, _) = reward.chat.asked
        assert torch.equal(_pictures(sc)[0], SOURCES[0][0]) and torch.equal(_pictures(sc)[1], IMAGES[0])
        assert len(_pictures(pq)) == seen and torch.equal(_pictures(pq)[-1], IMAGES[0])


def test_the_older_family_names_its_pictures():
    reward = _edit(_edit_answer([25, 25], [25, 25]), family="qwen2.5")
    reward(IMAGES[:1], ["a"], {"references": SOURCES[:1]})
    (sc, _), (pq, _) = reward.chat.asked
    assert [m.role for m in sc] == ["system", "user"] and sc[0].parts == ("You are a helpful assistant.",)
    assert sc[1].parts[0] == "<img1>: " and sc[1].parts[2] == "<img2>: " and pq[1].parts[0] == "<img1>: "


@pytest.mark.parametrize("text", ["no", '{"score": [26, 3]}', '{"score": [20, 2', '{"reasoning": "x"}'])
def test_an_edit_whose_answers_stay_unreadable_is_invalid_and_by_quirk_middling(text):
    sample_1 = "unlucky"
    answer = lambda c, o: text if sample_1 in _text(c) else _edit_answer([25, 25], [25, 25])(c, o)  # noqa: E731
    reward, prompts = _edit(answer, retries=1), ["a", sample_1, "b"]
    output = reward(IMAGES, prompts, EDIT)
    assert output.is_valid.tolist() == [True, False, True] and "unreadable answer" in output.rationale[1]
    assert score(reward, IMAGES, prompts, EDIT).total.tolist() == [10.0] * 3  # the group's mean: no advantage
    midpoint = _edit(answer, quirks=["midpoint"], retries=0)(IMAGES, prompts, EDIT)
    assert midpoint.scores[1] == pytest.approx(math.sqrt(5 * 10)) and bool(midpoint.is_valid.all())


def test_scores_beyond_the_scale_are_12_and_a_half_only_by_quirk():
    reward = _edit(_edit_answer([26, 30], [25, 25]), quirks=["overflow"])
    assert reward(IMAGES, ["a"] * 3, EDIT).scores.tolist() == pytest.approx([math.sqrt(12.5 * 10)] * 3)


def test_passes_that_fail_are_left_out():
    good = _edit_answer([25, 25], [25, 25])
    reward = _edit(lambda c, o: good(c, o) if o["seed"] == 43 else Reply("", error="gone"), num_pass=3)
    output = reward(IMAGES, ["a"] * 3, EDIT)
    assert output.scores.tolist() == [10.0] * 3 and output.extra["passes_read"] == [1, 1, 1]


def test_edits_need_their_sources():
    with pytest.raises(RewardError, match="without 'references'"):
        score(_edit(_edit_answer([1, 1], [1, 1])), IMAGES, ["a"] * 3)
    with pytest.raises(RewardError, match="sample 1: got no reference, expected the source image"):
        score(_edit(_edit_answer([1, 1], [1, 1])), IMAGES, ["a"] * 3, {"references": [SOURCES[0], [], SOURCES[2]]})


# VideoScore2

TEMPLATE = "Judge this video of {prompt}."


def _video_reply(marks, spread=None) -> Reply:
    """Thoughts with misleading digits, then three labelled marks, one token a piece."""
    tokens = [Token("visual quality: 1 of", -0.1), Token(" 9 frames blur.\n", -0.1)]
    for label, mark in zip(("visual quality", "text-to-video alignment", "physical/common-sense consistency"), marks):
        digit = _digit(str(mark), spread or {str(mark): 1.0})
        tokens += [Token(label, -0.1), Token(": ", -0.1), digit, Token(";\n", -0.1)]
    return Reply("".join(token.text for token in tokens), tuple(tokens))


def _video(answer, **options):
    return make_reward("videoscore2", chat=Scripted(answer), template=TEMPLATE, **options)


@pytest.mark.parametrize("soft", ["expected", "published", "written"])
def test_a_one_hot_distribution_gives_the_written_marks_whatever_the_kind(soft):
    output = _video(lambda c, o: _video_reply((4, 2, 5)), soft=soft)(VIDEOS, ["a"] * 2)
    assert [output.criteria[key][0].item() for key in output.criteria] == pytest.approx([4, 2, 5])
    assert output.scores.tolist() == pytest.approx([11 / 3] * 2)


def test_soft_marks_are_an_expectation_and_the_published_product():
    spread = {"4": 0.5, " 5": 0.1, "5": 0.1, "3": 0.1, "the": 0.15}
    probabilities = np.array([0, 0, 0.1, 0.5, 0.2]) / 0.8
    for soft, expected in (("expected", (probabilities * np.arange(1, 6)).sum()), ("published", 4 * 0.5 / 0.8)):
        output = _video(lambda c, o: _video_reply((4, 4, 4), spread), soft=soft)(VIDEOS, ["a"] * 2)
        assert output.scores.tolist() == pytest.approx([expected] * 2)


def test_moving_mass_to_a_higher_mark_raises_the_expectation_but_lowers_the_published_score():
    before, after = [0, 0, 0.2, 0.8, 0], [0, 0, 0.2, 0.6, 0.2]
    assert expected_mark(after) > expected_mark(before) and published_mark(after) < published_mark(before)


@pytest.mark.parametrize("marks", [(4, 4, 7), (0, 3, 3)])
def test_marks_out_of_range_are_unreadable(marks):
    output = _video(lambda c, o: _video_reply(marks), retries=0)(VIDEOS, ["a"] * 2)
    assert not output.is_valid.any() and "expected within [1, 2, 3, 4, 5]" in output.rationale[0]


def test_an_answer_cut_off_before_its_marks_or_without_log_probabilities_is_invalid():
    cut = lambda c, o: Reply("thinking", (Token("thinking", -0.1),))  # noqa: E731
    bare = lambda c, o: Reply(_video_reply((4, 4, 4)).text)  # noqa: E731
    for answer in (cut, bare):
        assert not _video(answer)(VIDEOS, ["a"] * 2).is_valid.any()
    assert _video(bare, soft="written")(VIDEOS, ["a"] * 2).scores.tolist() == [4.0, 4.0]


def test_the_video_goes_whole_and_in_front_of_the_question():
    reward = _video(lambda c, o: _video_reply((4, 4, 4)))
    reward(VIDEOS, ["a cat", "a dog"])
    (conversation, options), *_ = reward.chat.asked
    assert torch.equal(conversation[0].parts[0], VIDEOS[0]) and options["top_logprobs"] == 20
    assert conversation[0].parts[1] == "Judge this video of a cat."


# UnifiedReward


def _unified(answer, name="unifiedreward", **options):
    return make_reward(name, chat=Scripted(answer), **options)


@pytest.mark.parametrize("text, expected", [("Final Score: 4.5", 4.5), ("x 1\nFinal Score: 2\nFinal Score:\n 3", 3.0)])
def test_version_1_reads_the_final_score(text, expected):
    assert read_final_score(text) == expected
    assert _unified(lambda c, o: text, version="1")(IMAGES, ["a"] * 3).scores.tolist() == [expected] * 3


@pytest.mark.parametrize(
    "text", ["", "Final Score: high", "Final Score: 6", "Final Score: 0.5", "Score: 4", "Final Score: 45"]
)
def test_version_1_refuses_what_is_no_score_from_1_to_5(text):
    with pytest.raises(Unreadable):
        read_final_score(text)


def test_version_2_reads_three_dimensions_of_pictures_and_others_of_videos():
    text = "Alignment Score (1-5): 2.694700002670288\n{} Score (1-5): 3\nStyle Score (1-5): 4.5\n"
    output = _unified(lambda c, o: text.format("Coherence"))(IMAGES, ["a"] * 3)
    assert output.criteria["alignment"][0] == pytest.approx(2.6947) and set(output.criteria) == {
        "alignment",
        "coherence",
        "style",
    }
    assert output.scores[0] == pytest.approx((2.6947 + 3 + 4.5) / 3, rel=1e-5)
    videos = _unified(lambda c, o: text.format("Physics"))
    assert set(videos(VIDEOS, ["a"] * 2).criteria) == {"alignment", "physics", "style"}
    assert len(_pictures(videos.chat.asked[0][0])) == 4  # the frames, one by one, as the published code sends them
    with pytest.raises(Unreadable, match="Style: got 7"):
        read_dimensions("Style Score (1-5): 7", ("Style",))


def test_a_missing_dimension_is_invalid_and_by_flag_the_batchs_mean():
    full = "Alignment Score (1-5): 4\nCoherence Score (1-5): {}\nStyle Score (1-5): 4"

    def answer(conversation, options):
        told = re.search(r"Wanted: \[(.*)\]", _text(conversation))[1]
        return full.format(told) if told.isdigit() else "Alignment Score (1-5): 4\nStyle Score (1-5): 4"

    prompts = ["2", "none", "4"]
    strict = _unified(answer, retries=1)(IMAGES, prompts)
    assert strict.is_valid.tolist() == [True, False, True] and "no score for Coherence" in strict.rationale[1]
    filled = _unified(answer, fill_missing=True)(IMAGES, prompts)
    assert filled.criteria["coherence"].tolist() == [2, 3, 4] and bool(filled.is_valid.all())


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Image 1 is better.", 1.0),
        ("... so image 2 is better", 0.0),
        ("Both images are equally good.", 0.5),
        ("Image 1 is better in style, but Image 2 is better in content", 0.5),
    ],
)
def test_a_ranks_verdict_is_read_and_a_mention_of_both_is_a_tie(text, expected):
    assert read_rank(text) == expected


def test_thoughts_do_not_count_as_a_verdict_and_a_cut_answer_is_none():
    assert read_think("<think>Image 1 is better here</think><answer>Image 2 is better</answer>") == 0.0
    for text in (
        "<think>Image 1 is better",
        "<think>x</think><answer>Image 1 is bet",
        "<think><answer>Image 1 is better</answer></think>",
        "<think>x</think><answer>unsure</answer>",
        "Image 1 is better",
    ):
        with pytest.raises(Unreadable):
            read_think(text)


def test_shares_of_the_dimensions_are_averaged_and_must_sum_to_1():
    text = "Alignment Score:\n Image 1: 0.9\n Image 2: 0.1\n\nCoherence Score:\n Image 1: 0.6\n Image 2: 0.4\n\n"
    text += "Style Score:\n Image 1: 0.3\n Image 2: 0.7\n"
    assert read_shares(text) == pytest.approx(0.6)
    for bad in (text.replace("0.7", "0.5"), text.replace("0.9", "1.9"), text.replace("Style", "Look"), text[:-5]):
        with pytest.raises(Unreadable):
            read_shares(bad)


def _brighter(conversation, options):
    first, second = (picture.mean() for picture in _pictures(conversation))
    return f"<think>1 or 2?</think><answer>Image {1 if first > second else 2} is better</answer>"


def test_win_rates_order_a_group_and_sum_to_half_its_size_in_any_order():
    images = torch.linspace(0.1, 0.9, 5)[:, None, None, None].expand(5, 3, 8, 8)
    reward = _unified(_brighter, "unifiedreward_pair")
    rates = score(reward, images, ["a"] * 5).total
    torch.testing.assert_close(rates, torch.linspace(0, 1, 5))
    order = [3, 0, 4, 2, 1]
    torch.testing.assert_close(score(reward, images[order], ["a"] * 5).total, rates[order])
    grouped = score(reward, images[[0, 2, 1, 3]], ["a", "b"] * 2, {"group_ids": torch.tensor([7, 3, 7, 3])})
    assert grouped.total.tolist() == [0, 0, 1, 1] and len(reward.chat.asked) == 10 + 10 + 2


def test_a_group_of_ties_has_no_advantage():
    tied = lambda c, o: "<think></think><answer>Image 1 is better and Image 2 is better</answer>"  # noqa: E731
    assert score(_unified(tied, "unifiedreward_pair"), IMAGES, ["a"] * 3).total.tolist() == [0.5] * 3


def test_a_cut_answer_wins_for_nobody_and_a_picture_without_any_verdict_is_invalid():
    images = torch.tensor([0.1, 0.5, 0.9])[:, None, None, None].expand(3, 3, 8, 8)

    def answer(conversation, options):
        dark = any(picture.mean() < 0.2 for picture in _pictures(conversation))
        return "<think>Image 1 is better" if dark else _brighter(conversation, options)

    output = _unified(answer, "unifiedreward_pair", retries=1)(images, ["a"] * 3)
    assert output.is_valid.tolist() == [False, True, True]
    assert output.scores.tolist() == pytest.approx([0.5, 0.25, 0.75])


def test_single_pairs_are_judged_as_log_odds_with_nan_for_no_verdict():
    images = torch.tensor([0.1, 0.5, 0.9])[:, None, None, None].expand(3, 3, 8, 8)
    compare = _unified(_brighter, "unifiedreward_pair").compare
    odds = compare(images[[0, 2]], images[[1, 1]], ["a"] * 2)
    assert odds[0] < 0 < odds[1] and torch.isfinite(odds).all()
    unread = _unified(lambda c, o: "?", "unifiedreward_pair", retries=0).compare
    assert unread(images[:1], images[1:2], ["a"]).isnan().all()


def test_one_group_has_one_prompt():
    with pytest.raises(RewardError, match="different prompts in one group"):
        score(_unified(_brighter, "unifiedreward_pair"), IMAGES, ["a", "b", "a"])


# RationalRewards


ASPECTS = ("text_faithfulness", "physical_quality", "text_rendering")


@pytest.mark.parametrize(
    "marks, expected",
    [(("4", "4.0", "4"), 1.0), (("1", "1"), 0.0), (("3.5 (good)", "2"), 1.75 / 3), (("**3**", "9"), 2.5 / 3)],
)
def test_marks_are_averaged_clamped_and_scaled_to_0_and_1(marks, expected):
    output = make_reward("rational_rewards", chat=Scripted(lambda c, o: rational_reply(*marks)))(IMAGES, ["a"] * 3)
    assert output.scores.tolist() == pytest.approx([expected] * 3)
    assert output.extra["refined_prompt"] == ["a bright cat"] * 3


def test_an_aspect_that_does_not_apply_is_left_out_and_reads_nan():
    marks = read_aspects(rational_reply("4", "2"), ASPECTS)
    assert marks == {"text_faithfulness": 4, "physical_quality": 2, "text_rendering": None}
    assert rational_score(marks) == pytest.approx(2 / 3)
    output = make_reward("rational_rewards", chat=Scripted(lambda c, o: rational_reply("4", "2")))(IMAGES, ["a"] * 3)
    assert output.criteria["text_rendering"].isnan().all()


@pytest.mark.parametrize("text", ["", "N/A", "a fine cat", "# Summary: 4", rational_reply("N/A", "N/A", "N/A")])
def test_without_any_mark_the_sample_is_invalid(text):
    reward = make_reward("rational_rewards", chat=Scripted(lambda c, o: text), retries=1)
    output = reward(IMAGES, ["a"] * 3)
    assert not output.is_valid.any() and "no mark" in output.rationale[0] and len(reward.chat.asked) == 6


def test_an_edit_is_marked_on_four_aspects_with_both_pictures_in_their_places():
    text = "1. Text Faithfulness:\n## Score: 4\n2. Image Faithfulness:\n## Score: 1\n"
    reward = make_reward("rational_rewards", task="edit", chat=Scripted(lambda c, o: text))
    output = reward(IMAGES, ["make it blue"] * 3, EDIT)
    assert output.scores.tolist() == pytest.approx([0.5] * 3) and len(output.criteria) == 4
    system, user = reward.chat.asked[0][0]
    assert system.role == "system" and user.parts[0] == "Wanted: make it blue\nBefore: "
    assert torch.equal(user.parts[1], SOURCES[0][0]) and torch.equal(user.parts[3], IMAGES[0])
    assert output.extra["refined_prompt"] == [None] * 3 and refined_prompt("## Refined Request:  ") is None


def test_the_aspects_to_average_can_be_chosen():
    chat = Scripted(lambda c, o: rational_reply("4", "1"))
    assert make_reward("rational_rewards", chat=chat, aspects=["physical_quality"])(IMAGES, ["a"] * 3).scores[0] == 0


# Ordinal


def _random_ratings(count: int) -> torch.Tensor:
    return torch.softmax(torch.randn(count, 9, generator=torch.Generator().manual_seed(3)).double() * 2, dim=-1)


def test_better_worse_and_tie_sum_to_1_and_agree_with_the_double_sum():
    chosen, rejected = _random_ratings(20).split(10)
    better, worse, tie = (
        probability_better(chosen, rejected),
        probability_better(rejected, chosen),
        tie_mass(chosen, rejected),
    )
    torch.testing.assert_close(better + worse + tie, torch.ones(10, dtype=torch.float64))
    pairs = [(i, j) for i in range(9) for j in range(9) if i > j]
    direct = sum(chosen[:, i] * rejected[:, j] for i, j in pairs)
    torch.testing.assert_close(better, direct)


def test_identical_distributions_are_better_with_less_than_one_half():
    ratings = _random_ratings(10)
    assert (probability_better(ratings, ratings) < 0.5).all()


def test_shifting_mass_upwards_raises_the_rating():
    ratings = _random_ratings(10)
    shifted = ratings.clone()
    shifted[:, 7] += ratings[:, 3]
    shifted[:, 3] = 0
    assert (expected_rating(shifted) > expected_rating(ratings)).all()


def test_rating_and_variance_are_those_of_the_distribution():
    ratings, values = _random_ratings(4), np.arange(1, 10)
    mean = (ratings.numpy() * values).sum(1)
    np.testing.assert_allclose(expected_rating(ratings), mean)
    np.testing.assert_allclose(rating_variance(ratings), (ratings.numpy() * (values - mean[:, None]) ** 2).sum(1))
    assert rating_variance(torch.eye(9)).abs().max() == 0


def test_the_ordinal_reward_reads_the_digits_at_the_answers_place():
    digit = _digit("7", {"7": 0.4, " 7": 0.1, "8": 0.25, "great": 0.2})
    output = make_reward("ordinal", chat=Scripted(lambda c, o: Reply("\n7", (Token("\n", -0.1), digit))))(
        IMAGES, ["a"] * 3
    )
    assert output.scores.tolist() == pytest.approx([7 * 2 / 3 + 8 / 3] * 3)
    assert output.uncertainty.tolist() == pytest.approx([math.sqrt(2) / 3] * 3, rel=1e-5)
    torch.testing.assert_close(output.extra["probabilities"].sum(1), torch.ones(3))


def test_a_videos_frames_are_shown_one_by_one_to_the_ordinal_judge():
    chat = Scripted(lambda c, o: Reply("7", (_digit("7", {"7": 1.0}),)))
    assert make_reward("ordinal", chat=chat)(VIDEOS, ["a"] * 2).scores.tolist() == [7.0, 7.0]
    assert [len(_pictures(conversation)) for conversation, _ in chat.asked] == [4, 4]


def test_an_answer_without_digits_or_tokens_has_no_rating():
    for reply in (Reply("7"), Reply("good", (Token("good", -0.1, {"good": -0.1}),)), Reply("", error="gone")):
        output = make_reward("ordinal", chat=Scripted(lambda c, o, reply=reply: reply), retries=1)(IMAGES, ["a"] * 3)
        assert not output.is_valid.any() and output.scores.isnan().all()


# All of them

CLAIMS = {
    "editscore": ({"family": "qwen2.5"}, EDIT),
    "videoscore2": ({"template": TEMPLATE}, None),
    "unifiedreward": ({}, None),
    "rational_rewards": ({}, None),
    "ordinal": ({}, None),
}


def _by_content(conversation, options) -> Reply:
    """An answer in each judge's format that depends on the pictures alone."""
    x = float(torch.stack([p.float().mean() for p in _pictures(conversation)]).mean())
    mark, text = 1 + round(3.9 * x, 2), _text(conversation)
    if "JSON" in text:
        return Reply(json.dumps({"reasoning": "", "score": [25 * x, 20 * x]}))
    if "Judge this video" in text:
        return _video_reply((4, 3, 2), {"4": 0.2 + 0.5 * x, "3": 0.2, "2": 0.25 - 0.2 * x})
    if "one digit" in text:
        return Reply("5", (_digit("5", {"5": 0.5 + 0.3 * x, "6": 0.1}),))
    if "three sides" in text:
        return Reply("".join(f"{d} Score (1-5): {mark}\n" for d in ("Alignment", "Coherence", "Style")))
    return Reply(rational_reply(str(mark), str(mark)))


@pytest.mark.parametrize("name", CLAIMS)
def test_a_batch_scores_as_its_samples_do_alone_within_the_range_and_without_gradient(name):
    options, context = CLAIMS[name]
    reward = make_reward(name, chat=Scripted(_by_content), **options)
    media = VIDEOS if name == "videoscore2" else IMAGES
    prompts = [f"number {n}" for n in range(len(media))]
    whole = score(reward, media, prompts, context).total
    alone = [
        score(reward, media[n : n + 1], prompts[n : n + 1], context and {"references": SOURCES[n : n + 1]}).total
        for n in range(len(media))
    ]
    assert whole.dtype == torch.float32 and torch.equal(whole, torch.cat(alone)) and len(set(whole.tolist())) > 1
    assert (whole >= reward.range[0]).all() and (whole <= reward.range[1]).all()
    assert not reward.differentiable and reward.kind == "pointwise" and reward.source and reward.licence


BAD_OPTIONS = [
    ("editscore", {"quirks": "midpoint"}, "quirks: got 'midpoint', expected a list"),
    ("editscore", {"quirks": ["midpint"]}, "did you mean 'midpoint'"),
    ("editscore", {"num_pass": 0}, "num_pass: got 0, expected a whole number of at least 1"),
    ("editscore", {"reduction": "mean"}, "reduction: got 'mean', expected one of"),
    ("editscore", {"temperature": -1}, "temperature: got -1, expected a number of at least 0"),
    ("videoscore2", {}, "template: got None, expected the model's own question .*vs2_inference.py"),
    ("videoscore2", {"template": "x"}, "without '{prompt}'"),
    ("videoscore2", {"template": "no/such/file.txt"}, "got no file at 'no/such/file.txt'"),
    ("videoscore2", {"template": TEMPLATE, "url": "http://x", "soft": "hard"}, "soft: got 'hard', expected one of"),
    ("unifiedreward", {"version": 2.0}, "version: got 2.0, expected one of .* in quotes"),
    ("unifiedreward", {"version": "1", "fill_missing": True}, "fill_missing: got True with version '1'"),
    ("unifiedreward", {"templates": {"images": "{prompt}"}}, "did you mean 'image'"),
    ("editscore", {"templates": "{prompt}"}, "templates: got '{prompt}', expected a mapping"),
    ("rational_rewards", {"templates": {"question": "{prompt}: <image> <image>"}}, "got 2 <image>, expected 1"),
    ("rational_rewards", {"task": "edit", "templates": {"question": "{prompt}: <image>"}}, "got 1 <image>, expected 2"),
    ("unifiedreward_pair", {"format": "cot"}, "format: got 'cot', expected one of"),
    ("rational_rewards", {"task": "video"}, "task: got 'video', expected one of"),
    ("rational_rewards", {"aspects": ["image_faithfulness"]}, "aspects: got 'image_faithfulness', expected one of"),
    ("ordinal", {"template": "rate"}, "without '{prompt}'"),
    ("ordinal", {"retries": -1}, "retries: got -1, expected a whole number of at least 0"),
    ("ordinal", {"temprature": 0}, "temprature"),
]


@pytest.mark.parametrize("name, options, message", BAD_OPTIONS)
def test_unusable_options_are_refused_before_anything_is_opened(name, options, message):
    with pytest.raises(ValueError, match=message):
        parse_spec(name, **options)
