"""Critics: marks to a score, critiques out of a model's words, and the critic of the shapes world."""

import dataclasses

import numpy as np
import pytest
import torch
from chats import Endpoint, Scripted, completion, rational_reply
from fastapi.responses import JSONResponse
from live_server import LiveServer

from visalign.rewards.vlm.chat import Reply
from visalign.rewards.vlm.parsing import Unreadable
from visalign.rewards.written.rational_rewards import ASPECTS, HEADINGS
from visalign.search.prompts.critics import (
    OUR_TEMPLATES,
    Critique,
    VLMCritic,
    count_tokens,
    critique_score,
    make_critic,
    read_critique,
)
from visalign.worlds.shapes.captions import caption, parse
from visalign.worlds.shapes.critic import ShapesCritic, shapes_wordings
from visalign.worlds.shapes.drawing import draw
from visalign.worlds.shapes.scenes import Placed, Scene, Spec, place, sample_spec

PICTURES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


# The record


@pytest.mark.parametrize(
    "marks, expected",
    [
        ((4, 4, 4), 1.0),
        ((1, 1, 1), 0.0),
        ((4, 2.5, None), 0.75),
        ((9, -3, None), 0.5),
        ((None, 3, None), 2 / 3),
        ((None, None, None), 0.0),
        ((), 0.0),
    ],
)
def test_the_score_is_the_mean_of_the_clamped_marks_scaled_to_0_and_1(marks, expected):
    named = dict(zip(ASPECTS["t2i"], marks))
    assert critique_score(named) == pytest.approx(expected) and Critique(named).score == pytest.approx(expected)


def test_a_good_picture_needs_both_aspects():
    both = {"text_faithfulness": 3.0, "physical_quality": 3.0}
    assert Critique(both).is_good() and not Critique(both).is_good(3.5)
    for poorer in ({"text_faithfulness": 2.9}, {"physical_quality": 2.9}, {"physical_quality": None}):
        assert not Critique(both | poorer).is_good()
    assert not Critique({"text_faithfulness": 4.0}).is_good() and not Critique(problem="busy").is_good()


# What a model writes


def test_every_part_is_read_to_the_end_of_its_section():
    text = (
        "# User Request Analysis:\nA cat\nin boots.\n# Detailed Judgement\n"
        "1. Text Faithfulness:\n## Justification: The cat\nwears no boots.\n## Score: 1.5\n"
        "2. Physical and Visual Quality:\n## Justification: clean\n## Score: N/A\n"
        "# Summary: no boots\n"
        "# User Request Refinement:\n## Refinement Comments: say\nboots first\n"
        "## Refined Request: Red boots,\nworn by a cat\n# Note\nnone"
    )
    critique = read_critique(text)
    assert critique.marks == {"text_faithfulness": 1.5, "physical_quality": None, "text_rendering": None}
    assert critique.reasons == {
        "text_faithfulness": "The cat\nwears no boots.",
        "physical_quality": "clean",
        "text_rendering": "",
    }
    assert (critique.analysis, critique.summary) == ("A cat\nin boots.", "no boots")
    assert (critique.comments, critique.refined) == ("say\nboots first", "Red boots,\nworn by a cat")
    assert read_critique("1. Text Faithfulness\nScore: 4").refined is None
    with pytest.raises(Unreadable, match="no mark"):
        read_critique("# Summary: 4")


@pytest.mark.parametrize("task", ["t2i", "edit"])
def test_what_our_words_ask_for_is_what_is_read(task):
    asked = OUR_TEMPLATES[task]["question"]
    assert asked.count("{prompt}") == 1 and asked.count("<image>") == len(ASPECTS[task]) - 2
    layout = asked[asked.index("# User Request Analysis") :].replace("Score: ...", "Score: 2")
    critique = read_critique(layout, ASPECTS[task])
    assert critique.marks == dict.fromkeys(ASPECTS[task], 2.0)
    assert critique.reasons == dict.fromkeys(ASPECTS[task], "...")
    assert critique.refined == "(the whole request, reworded)" and "nothing that was not asked" in critique.comments
    assert all(title in layout for title in (HEADINGS[aspect] for aspect in ASPECTS[task]))


@pytest.mark.parametrize("text", ["", "{", "# Refined Request: x", "Score: N/A", rational_reply("N/A", "?", "none")])
def test_words_that_are_no_critique_are_its_problem_after_one_more_try(text):
    chat = Scripted(lambda c, o: text)
    [critique] = VLMCritic(chat=chat)(PICTURES[:1], ["a cat"])
    assert "no mark" in critique.problem and critique.score == 0 and critique.refined is None and len(chat.asked) == 2


def test_each_attempt_asks_with_another_seed_and_all_pictures_together():
    chat = Scripted(lambda c, o: rational_reply("3", "2") if o["seed"] else Reply("", error="gone"))
    critic = VLMCritic(chat=chat, seed=0)
    assert [c.problem for c in critic(PICTURES, ["a", "b"])] == ["no answer: gone"] * 2
    critiques = critic(PICTURES, ["a", "b"], attempt=3)
    assert [c.score for c in critiques] == pytest.approx([0.5, 0.5]) and critiques[0].refined == "a bright cat"
    assert critiques[0].tokens == count_tokens(chat, rational_reply("3", "2"))
    assert [count_tokens(chat, "x" * n) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]  # where the tokenizer is not here
    assert [o["seed"] for _, o in chat.asked] == [0, 0, 3, 3] and critic.judge.params.seed == 0
    system, user = chat.asked[-1][0]
    assert "asked for: b\n" in user.parts[0] and torch.equal(user.parts[1], PICTURES[1]) and system.parts[0]


def test_an_edit_is_criticised_beside_its_source():
    chat = Scripted(lambda c, o: "1. Text Faithfulness:\n## Score: 4\n2. Image Faithfulness:\n## Score: 1\n")
    [critique] = VLMCritic("edit", chat=chat)(PICTURES[:1], ["bluer"], context={"references": [[PICTURES[1]]]})
    assert critique.marks["image_faithfulness"] == 1 and critique.score == 0.5
    pictures = [part for part in chat.asked[0][0][1].parts if isinstance(part, torch.Tensor)]
    assert torch.equal(pictures[0], PICTURES[1]) and torch.equal(pictures[1], PICTURES[0])


def test_a_served_critic_is_asked_again_while_it_is_busy_and_its_failure_is_a_problem():
    endpoint = Endpoint()
    endpoint.answer = lambda body, n: JSONResponse({}, 503) if n == 0 else completion(rational_reply("2", "4"))
    with LiveServer(endpoint.app) as server:
        options = {"url": server.url, "chat_options": {"backoff": 0.01, "retries": 1}}
        critic = make_critic("vlm", model="judge", **options)
        [critique] = critic(PICTURES[:1], ["a cat"])
        assert critique.problem is None and critique.score == pytest.approx(2 / 3) and len(endpoint.bodies) == 2
        user = endpoint.bodies[1]["messages"][1]["content"]
        assert [part["type"] for part in user] == ["text", "image_url", "text"] and "a cat" in user[0]["text"]
        assert endpoint.bodies[1]["temperature"] == 0.1 and endpoint.bodies[1]["max_tokens"] == 2048
        endpoint.answer = lambda body, n: JSONResponse({"error": "broken"}, 500)
        [critique] = critic(PICTURES[:1], ["a cat"])
        assert "HTTP 500" in critique.problem and critique.score == 0


# The shapes world


def drawn(spec: Spec, seed: int = 0) -> torch.Tensor:
    return draw([place(spec, np.random.default_rng(seed))])


def test_a_true_drawing_has_no_flaw_and_a_wrong_one_is_named():
    rng, critic = np.random.default_rng(1), ShapesCritic()
    for n in range(8):
        spec = sample_spec(rng)
        [critique] = critic(drawn(spec, n), [caption(spec, rng)])
        assert critique.score == 1 and critique.is_good() and critique.summary == "wrong: nothing"
    [critique] = critic(drawn(parse("a red circle")), ["a red circle and two blue stars"])
    assert critique.marks["text_faithfulness"] == 1 and critique.marks["physical_quality"] == 4
    assert critique.reasons["text_faithfulness"] == "shows 1 red circle" and not critique.is_good()
    assert critique.analysis == "asks for 1 red circle, 2 blue star"
    assert critique.summary == "wrong: objects, colours, counts"
    [nearly] = critic(drawn(parse("a red circle and a blue star")), ["a red circle and two blue stars"])
    assert critique.marks["text_faithfulness"] < nearly.marks["text_faithfulness"] < 3


def test_proposals_ask_for_more_of_what_is_missing_and_name_it_last():
    there = {("red", "circle"): 1}
    asked = shapes_wordings(parse("two blue stars and a red circle"), there)
    assert asked[0] == "a red circle and four blue stars" and asked[1] == "four blue stars and a red circle"
    assert asked[2] == "a red circle and two blue stars"
    too_many = shapes_wordings(parse("two blue stars"), {("blue", "star"): 3})
    assert too_many[0] == "a blue star"
    related = shapes_wordings(parse("a blue star above a red circle"), there)
    assert related[0] == "a red circle below two blue stars" and related[2] == "a red circle below a blue star"


def test_every_proposal_is_a_caption_and_only_counts_may_differ():
    rng = np.random.default_rng(2)
    for _ in range(200):
        spec = sample_spec(rng)
        there = {(c, s): int(rng.integers(0, 4)) for c, s, _ in spec.groups}
        wordings = shapes_wordings(spec, there)
        meanings = [parse(words) for words in wordings]
        assert len(set(wordings)) == len(wordings)
        assert sum(meaning.key() == spec.key() for meaning in meanings) >= 2
        for meaning in meanings:  # the kinds and the relation stay
            level = dict(zip(((c, s) for c, s, _ in spec.groups), (n for *_, n in spec.groups)))
            same = tuple((c, s, level[c, s]) for c, s, _ in meaning.groups)
            assert dataclasses.replace(meaning, groups=same).key() == spec.key()


def test_proposals_come_one_an_attempt_and_end():
    critic, picture = ShapesCritic(), drawn(parse("a red circle"))
    given = [critic(picture, ["a red circle"], attempt=k)[0].refined for k in range(4)]
    assert given == ["a picture of a red circle", None, None, None]  # nothing else can be said of one object
    asked = [critic(picture, ["a blue star and a red circle"], attempt=k)[0].refined for k in range(9)]
    ends = asked.index(None)
    assert ends >= 4 and not any(asked[ends:]) and "a blue star and a red circle" not in asked


def test_smears_lower_the_physical_quality_and_nothing_drawn_has_none():
    picture = draw([Scene((Placed("red", "circle", 16, 16, 10),))])
    picture[:, :, 40:60, 44:48] = torch.tensor([0.13, 0.30, 0.90]).view(3, 1, 1)  # a bar is no shape of this world
    [critique] = ShapesCritic()(picture, ["a red circle"])
    assert critique.marks["physical_quality"] == 2.5 and critique.reasons["physical_quality"].startswith("1 regions")
    [empty] = ShapesCritic()(draw([Scene(())]), ["a red circle"])
    assert empty.marks["physical_quality"] is None and empty.marks["text_faithfulness"] == 1 and empty.score == 0


def test_what_it_cannot_read_is_its_problem():
    critic = ShapesCritic()
    [small] = critic(torch.rand(1, 3, 8, 8), ["a red circle"])
    [strange] = critic(PICTURES[:1], ["a cat"])
    [broken] = critic(torch.full((1, 3, 64, 64), torch.nan), ["a red circle"])
    assert "shape (3, 8, 8)" in small.problem and "cannot read" in strange.problem and "NaN" in broken.problem
    with pytest.raises(ValueError, match="cannot read"):
        critic.check_prompt("a cat")


# By name


def test_critics_are_made_by_name_or_path_or_taken_as_they_are():
    assert isinstance(make_critic("shapes"), ShapesCritic)
    assert isinstance(make_critic("visalign.worlds.shapes.critic:ShapesCritic"), ShapesCritic)
    critic = ShapesCritic()
    assert make_critic(critic) is critic


@pytest.mark.parametrize(
    "critic, options, says",
    [
        ("vlms", {}, "critic: got 'vlms'.*did you mean 'vlm'"),
        ("vlm", {"modle": "x"}, "option of critic 'vlm': got 'modle'.*did you mean 'model'"),
        (ShapesCritic(), {"strict": 1}, "critic: got"),
        (3, {}, "critic: got 3"),
        ("vlm", {"task": "video", "chat": Scripted(str)}, "task: got 'video'"),
        ("vlm", {"templates": "ours", "chat": Scripted(str)}, "templates: got 'ours', expected None, 'published'"),
        ("vlm", {"retries": -1, "chat": Scripted(str)}, "retries: got -1"),
    ],
)
def test_what_is_no_critic_is_refused(critic, options, says):
    with pytest.raises(ValueError, match=says):
        make_critic(critic, **options)


def test_the_published_words_are_the_users_files(tmp_path, monkeypatch):
    monkeypatch.setenv("VISALIGN_TEMPLATES", str(tmp_path))
    with pytest.raises(ValueError, match="copy them from"):
        VLMCritic(chat=Scripted(str), templates="published")
    (tmp_path / "rational_rewards_t2i_system.txt").write_text("Mark.")
    (tmp_path / "rational_rewards_t2i.txt").write_text("Wanted: {prompt} <image>")
    chat = Scripted(lambda c, o: rational_reply("4", "4"))
    assert VLMCritic(chat=chat, templates="published")(PICTURES[:1], ["a cat"])[0].score == 1
    assert chat.asked[0][0][1].parts[0] == "Wanted: a cat "
