import json
import math
import re

import numpy as np
import pytest
import torch
from tiny_vlm import FAMILIES, save_tiny_vlm

from visalign.rewards import RewardError, make_reward, score
from visalign.rewards.groups.candidates import picture_digest, shown_order, shown_pairs
from visalign.rewards.probability.rubric import RubricReward
from visalign.rewards.probability.rubric_file import load_rubric, rubric_scores
from visalign.rewards.vlm.chat import Reply, Token
from visalign.rewards.vlm.judging import SamplingParams
from visalign.rewards.written.auto_rubric import (
    AutoRubric,
    AutoRubricReward,
    Theme,
    judge_ranks,
    load_auto_rubric,
    rank_rewards,
)
from visalign.rewards.written.cdrrm import IDENTIFIER, Profile, contrast_rubrics, judge_accuracy, profiles, synthesise
from visalign.rewards.written.delta_rubric import DeltaRubricReward, delta_scores, plan
from visalign.rewards.written.rubric_learning import Preference, build_rubric, gather, learn_criteria
from visalign.rewards.written.unifiedreward_flex import (
    Comparison,
    UnifiedRewardFlex,
    decoupled_advantages,
    flex_scores,
    read_comparison,
)
from visalign.worlds.shapes import questions as world_questions
from visalign.worlds.shapes.captions import caption
from visalign.worlds.shapes.scenes import sample_spec


class Script:
    """A chat that answers by a function of (text of the conversation, brightness of its pictures, attempt)."""

    name = "script"

    def __init__(self, answer):
        self.answer, self.asked, self.calls = answer, [], 0

    def __call__(self, conversations, *, max_tokens, temperature=0.0, top_p=1.0, seed=None, top_logprobs=0):
        self.calls += 1
        replies = []
        for conversation in conversations:
            parts = [part for message in conversation for part in message.parts]
            text = "\n".join(part for part in parts if isinstance(part, str))
            self.asked.append(text)
            reply = self.answer(text, [float(part.mean()) for part in parts if isinstance(part, torch.Tensor)])
            if top_logprobs and isinstance(reply, float):  # a probability of yes
                top = {"Yes": math.log(max(reply, 1e-12)), "No": math.log(max(1 - reply, 1e-12))}
                replies.append(Reply("Yes", (Token("Yes", top["Yes"], top),)))
            else:
                replies.append(reply if isinstance(reply, Reply) else Reply(str(reply)))
        return replies


def grey(*levels):
    """Pictures of given brightness."""
    return torch.stack([torch.full((3, 4, 4), level) for level in levels])


def bright_first(text, levels):
    """Ranks the pictures by brightness, as the judge of a rubric is asked to."""
    ranks = np.argsort(np.argsort([-level for level in levels])) + 1
    return json.dumps({"rank": ranks.tolist()})


# Rubric files


def rubric(**criterion):
    return {"criteria": [{"name": "a", "text": "It is red.", **criterion}]}


def test_questions_are_filled_in_and_asked_once_for_each_match():
    loaded = load_rubric(
        {
            "wording": "{question} Yes or no?",
            "criteria": [
                {"text": "x", "applies_to": r"(?P<n>two|three) (?P<what>\w+)s", "question": "Are there {n} {what}s?"},
                {"text": "All is there.", "question": "Is it {prompt}?"},
            ],
        }
    )
    asked = loaded.questions("Two cats, three dogs {and} two cats")
    assert asked[0] == [
        "Are there Two cats? Yes or no?",
        "Are there three dogs? Yes or no?",
        "Are there two cats? Yes or no?",
    ]
    assert asked[1] == ["Is it Two cats, three dogs {and} two cats? Yes or no?"]
    assert load_rubric(rubric(applies_to="cat")).questions("a dog") == [[]]
    assert "It is red." in load_rubric(rubric()).questions("a {prompt}")[0][0]


def test_yes_and_no_of_yaml_are_answers(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("criteria:\n- {name: a, text: x, answer: no}\n- {name: b, text: x, answer: 'yes', weight: 3}\n")
    assert [(c.answer, c.weight) for c in load_rubric(file).criteria] == [(False, 1.0), (True, 3.0)]


@pytest.mark.parametrize(
    "content, message",
    [
        ([], "rubric: got '[]', expected a mapping with a list 'criteria'"),
        ({"criteria": [{"name": "a"}]}, "criterion 1: got \"{'name': 'a'}\", expected a mapping with 'text'"),
        (rubric(wieght=2), "criterion 1: key: got 'wieght'"),
        (rubric(weight=0), "got weight 0, expected a finite number above 0"),
        (rubric(answer="maybe"), "got answer 'maybe', expected yes or no"),
        (rubric(applies_to="("), "applies_to is no regular expression"),
        (rubric(question="Is it {colour}?"), "{...} in question: got 'colour'"),
        (rubric(question="x", questions=[{"question": "y"}]), "got 'questions', expected a list with each"),
        ({"criteria": [{"text": "x"}, {"text": "x"}]}, "expected different names"),
        ({"wording": "x", **rubric()}, "got wording 'x', expected text with {question}"),
        ("shape", "did you mean 'shapes'"),
    ],
)
def test_a_rubric_that_cannot_work_is_refused(content, message):
    with pytest.raises(ValueError) as error:
        load_rubric(content)
    assert message in str(error.value)


def test_broken_yaml_is_named_with_its_file(tmp_path):
    (tmp_path / "r.yaml").write_text("criteria: [")
    with pytest.raises(ValueError, match="r.yaml.*is not YAML"):
        load_rubric(tmp_path / "r.yaml")


def test_a_criterion_is_the_mean_of_its_questions_and_a_score_the_weighted_mean_of_criteria():
    loaded = load_rubric(
        {"criteria": [{"text": "a", "weight": 2}, {"text": "b", "answer": "no"}, {"text": "c", "weight": 5}]}
    )
    answers, places = torch.tensor([0.2, 0.6, 0.9, 0.5]), [(0, 0), (0, 0), (0, 1), (2, 2)]
    scores, criteria = rubric_scores(answers, places, 3, loaded)
    nan = math.nan
    expected = torch.tensor([[0.4, 0.1, nan], [nan, nan, nan], [nan, nan, 0.5]])
    torch.testing.assert_close(criteria, expected, equal_nan=True)
    torch.testing.assert_close(scores, torch.tensor([(2 * 0.4 + 0.1) / 3, nan, 0.5]), equal_nan=True)


def test_a_criterion_that_does_not_apply_leaves_the_gradient_of_others_finite():
    answers = torch.tensor([0.2], requires_grad=True)
    scores, _ = rubric_scores(answers, [(0, 0)], 1, load_rubric({"criteria": [{"text": "a"}, {"text": "b"}]}))
    assert torch.autograd.grad(scores.sum(), answers)[0].item() == 1


# The shapes world's rubric


def test_the_shapes_rubric_asks_about_objects_counts_colours_and_the_relation():
    asked = load_rubric("shapes").questions("a picture of an orange star to the left of a red square")
    named = dict(zip([c.name for c in load_rubric("shapes").criteria], asked))
    assert set(named["objects"]) == {"Is there a red square in the picture?", "Is there an orange star in the picture?"}
    assert set(named["counts"]) == {f"Is there exactly one {x} in the picture?" for x in ("orange star", "red square")}
    assert named["relation"] == ["Is the orange star left of the red square?"]
    assert set(named["colours"]) == {f"Is anything in the picture {c}?" for c in ("orange", "red")}
    asked = load_rubric("shapes").questions("two blue circles, one red star and four green triangles")
    named = dict(zip(named, asked))
    assert len(named["objects"]) == 3 and not named["relation"]
    assert "Are there exactly four green triangles in the picture?" in named["counts"] and len(named["counts"]) == 3


def test_the_shapes_rubric_speaks_as_the_worlds_own_questions_do():
    rng, loaded = np.random.default_rng(0), load_rubric("shapes")
    index = {c.name: k for k, c in enumerate(loaded.criteria)}
    kinds = {
        "objects": world_questions.object_question,
        "counts": world_questions.count_question,
        "relation": world_questions.relation_question,
    }
    for _ in range(60):
        for name, ask in kinds.items():
            spec = sample_spec(rng, kind="relation" if name == "relation" else None)
            mine = loaded.questions(caption(spec, rng))[index[name]]
            assert len(mine) == (1 if name == "relation" else len(spec.groups))
            spoken = {ask(spec, rng).text for _ in range(60)}  # about this picture, with right and wrong answers
            assert set(mine) & spoken, (mine, spoken)
    whole = loaded.questions("a red star")[index["whole"]][0]
    assert whole == world_questions.MATCH[0].format("a red star")
    assert loaded.questions("a red star")[index["clean"]] == [world_questions.WHOLE]


# The reward of a rubric


TWO = {
    "criteria": [
        {"name": "bright", "text": "x", "question": "Is it bright?", "weight": 3},
        {"name": "cat", "text": "y", "applies_to": "cat"},
    ]
}


def test_the_rubric_reward_weighs_probabilities_of_a_chat():
    chat = Script(lambda text, levels: levels[0] if "bright" in text else 0.5)
    result = score(RubricReward(TWO, chat=chat), grey(0.25, 0.75), ["a cat", "a dog"])
    assert result.total.tolist() == pytest.approx([(3 * 0.25 + 0.5) / 4, 0.75])
    cat = result.outputs["rubric"].criteria["cat"]
    assert cat[0].item() == pytest.approx(0.5) and cat[1].isnan()


def test_a_picture_with_an_unanswered_question_or_without_criteria_is_invalid():
    def answer(text, levels):
        if levels[0] < 0.2:
            return Reply("", error="too dark")
        return Reply("Maybe", (Token("Maybe", -0.1, {"Maybe": -0.1, "Perhaps": -3.0}),)) if levels[0] > 0.8 else 0.5

    content = {"criteria": [{"name": "cat", "text": "y", "applies_to": "cat", "answer": "no"}]}
    result = score(RubricReward(content, chat=Script(answer)), grey(0.1, 0.5, 0.9, 0.5), ["a cat"] * 3 + ["a dog"])
    output = result.outputs["rubric"]
    assert output.is_valid.tolist() == [False, True, False, False]
    dark, answered, neither, none = output.rationale
    assert (dark, answered, none) == ("too dark", None, "no criterion applies to the prompt")
    assert neither.startswith("neither 'Yes' nor 'No' is among the likeliest first tokens")


@pytest.fixture(scope="module")
def vlm_folder(tmp_path_factory):
    return save_tiny_vlm(tmp_path_factory.mktemp("vlm"), FAMILIES[1])


def test_a_local_model_gives_the_probabilities_of_the_naive_route_and_a_gradient(vlm_folder):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from visalign.images import images_to_pil

    reward = make_reward("rubric", rubric=TWO, model=str(vlm_folder))
    images = torch.rand(2, 3, 56, 56, generator=torch.Generator().manual_seed(0)).mul(255).round().div(255)
    prompts = ["a cat", "a dog"]
    output = reward(images.clone().requires_grad_(), prompts)
    assert reward.differentiable and output.scores.requires_grad
    model = AutoModelForImageTextToText.from_pretrained(vlm_folder).eval()
    processor = AutoProcessor.from_pretrained(vlm_folder)
    yes, no = (processor.tokenizer.encode(word, add_special_tokens=False)[-1] for word in ("Yes", "No"))
    for n, picture in enumerate(images_to_pil(images)):
        found = []
        for mine in load_rubric(TWO).questions(prompts[n]):
            for question in mine:
                content = [{"type": "image"}, {"type": "text", "text": question}]
                text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
                inputs = processor(text=[text], images=[picture], return_tensors="pt")
                with torch.no_grad():
                    z = model(**inputs).logits[0, -1]
                found.append((z[yes] - z[no]).sigmoid().item())
        expected = (3 * found[0] + found[1]) / 4 if n == 0 else found[0]
        assert output.scores[n].item() == pytest.approx(expected, abs=1e-4)
    single = reward(images[:1], prompts[:1]).scores
    torch.testing.assert_close(single, output.scores[:1].detach(), atol=1e-5, rtol=0)


def test_options_of_the_rubric_reward_are_checked_before_anything_is_loaded():
    with pytest.raises(ValueError, match="model: got none"):
        make_reward("rubric", rubric=TWO)
    with pytest.raises(ValueError, match="convention: got 'x'"):
        make_reward("rubric", rubric=TWO, model="m", convention="x")


# Order of candidates


def test_the_order_shown_is_a_permutation_that_depends_on_content_and_seed_alone():
    digests = [picture_digest(p) for p in grey(0.1, 0.4, 0.2, 0.9, 0.6)]
    shown = [digests[n] for n in shown_order(digests, 3)]
    turned = digests[::-1]
    assert shown == [turned[n] for n in shown_order(turned, 3)] and sorted(shown) == sorted(digests)
    assert len({tuple(shown_order(digests, seed)) for seed in range(20)}) > 10
    firsts = [shown_order(digests[:2], seed)[0] for seed in range(400)]
    assert 150 < sum(firsts) < 250  # a fair coin
    assert {frozenset(pair) for pair in shown_pairs(digests)} == {frozenset((i, j)) for i in range(5) for j in range(i)}


# Auto-rubric


@pytest.mark.parametrize("n", [2, 3, 7])
def test_the_best_rank_is_worth_1_and_the_worst_minus_a_tenth(n):
    ranks = torch.randperm(n, generator=torch.Generator().manual_seed(n)) + 1
    rewards = rank_rewards(ranks)
    assert rewards[ranks == 1].item() == 1 and rewards[ranks == n].item() == pytest.approx(-0.1)
    by_rank = rewards[ranks.argsort()]
    torch.testing.assert_close(by_rank.diff(), torch.full((n - 1,), -1.1 / (n - 1)))


@pytest.mark.parametrize("ranks", [[1], [1, 1], [0, 1], [1, 3]])
def test_ranks_that_are_no_permutation_are_refused(ranks):
    with pytest.raises(ValueError, match="expected 1 to n without ties"):
        rank_rewards(torch.tensor(ranks))


def preference(*ranks, levels=None):
    levels = levels or [0.9 - 0.1 * k for k in range(len(ranks))]
    return Preference("a lamp", tuple(grey(*levels)), ranks)


def test_judge_ranks_are_of_the_pictures_whatever_order_they_were_shown_in():
    groups = [list(grey(0.1, 0.9)), list(grey(0.5, 0.2, 0.8)), list(grey(0.9, 0.1))]
    for seed in range(4):
        found = judge_ranks(Script(bright_first), ["r"] * 3, ["p"] * 3, groups, SamplingParams(seed=seed))
        assert found == [(2, 1), (2, 3, 1), (1, 2)]


@pytest.mark.parametrize(
    "text",
    ["", "no idea", '{"rank": [1, 1]}', '{"rank": [1]}', '{"rank": [1, 3]}', '{"rank": [1.5, 2]}', '{"rank": 1}'],
)
def test_an_answer_that_is_no_permutation_is_rejected(text):
    chat = Script(lambda *_: text)
    assert judge_ranks(chat, ["r"], ["p"], [list(grey(0.1, 0.9))], SamplingParams(retries=2)) == [None]
    assert chat.calls == 3


def test_verification_asks_again_without_the_label_and_keeps_only_what_reproduces_it():
    def answer(text, levels):
        if "Someone who knew only the criteria" in text:
            return '{"rubrics": ["Darker is better."], "reason": "-"}'
        if "Write criteria" in text:
            return 'Sure: {"rubrics": ["Brighter is better."], "reason": "-"}'
        return bright_first(text, [-x for x in levels] if "Darker" in text else levels)

    chat = Script(answer)
    brighter, darker = preference(1, 2), preference(2, 1)
    kept = learn_criteria(chat, [brighter, darker], epochs=5)
    assert kept == [("Brighter is better.",), ("Darker is better.",)]
    judged = [text for text in chat.asked if "Rank the pictures by this rubric" in text]
    assert len(judged) == 3  # both, then the revised one
    assert not any(re.search(r"\[\d, \d\]|preferred|People", text) for text in judged)
    revised = next(text for text in chat.asked if "Someone who" in text)
    assert "ranked the pictures [1, 2]" in revised and "People ranked them [2, 1]" in revised


def test_revision_stops_after_the_epochs_and_drops_what_was_never_verified():
    def answer(text, levels):
        return '{"rubrics": ["Brighter."]}' if "rubrics" in text else bright_first(text, levels)

    chat = Script(answer)
    assert learn_criteria(chat, [preference(2, 1)], epochs=5) == [None]
    assert sum("Someone who" in text for text in chat.asked) == 5
    assert sum("Rank the pictures" in text for text in chat.asked) == 6
    with pytest.raises(ValueError, match="none of 1 got criteria that reproduce its ranks in 2 revisions"):
        build_rubric(chat, [preference(2, 1)], epochs=2)


def test_a_case_whose_criteria_cannot_be_read_is_dropped():
    chat = Script(lambda text, levels: '{"rubrics": []}' if "rubrics" in text else bright_first(text, levels))
    assert learn_criteria(chat, [preference(1, 2)]) == [None]


def test_build_rubric_gathers_verified_criteria_into_themes_that_survive_a_file(tmp_path):
    themes = '{"themes": [{"name": "Light", "tips": ["Brighter is better."]}, {"name": "Rest", "tips": ["Be neat."]}]}'

    def answer(text, levels):
        if "Gather them" in text:
            assert text.count("- Bright") == 2 and "into 3 themes" in text
            return themes
        return '{"rubrics": ["Bright."]}' if "rubrics" in text else bright_first(text, levels)

    items = [preference(1, 2), preference(1, 2, 3), preference(2, 1)]
    built = build_rubric(Script(answer), items, epochs=0, themes=3)
    assert [t.name for t in built.themes] == ["Light", "Rest"] and "Brighter is better." in built.text
    built.save(tmp_path / "r.yaml")
    assert load_auto_rubric(tmp_path / "r.yaml") == built
    with pytest.raises(ValueError, match="themes: got 2, expected at most 1"):
        gather(Script(lambda *_: themes), ["x"], themes=1)


def test_files_that_hold_no_auto_rubric_are_refused(tmp_path):
    with pytest.raises(ValueError, match="rubric: got 'nowhere.yaml', which is no file"):
        load_auto_rubric("nowhere.yaml")
    (tmp_path / "r.yaml").write_text("themes: [{name: a}]")
    with pytest.raises(ValueError, match="could not read .*tips"):
        load_auto_rubric(tmp_path / "r.yaml")
    with pytest.raises(ValueError, match="ranks: got 2 images ranked .1, 1."):
        preference(1, 1)


LIGHT = AutoRubric((Theme("Light", ("Brighter is better.",)),))


def test_the_auto_rubric_reward_ranks_within_groups():
    images, ids = grey(0.1, 0.5, 0.9, 0.3, 0.8, 0.4), torch.tensor([7, 2, 7, 7, 2, 5])
    reward, prompts = AutoRubricReward(LIGHT, chat=Script(bright_first)), ["a", "b", "a", "a", "b", "c"]
    result = score(reward, images, prompts, {"group_ids": ids})
    assert result.total[:5].tolist() == pytest.approx([-0.1, -0.1, 1.0, 0.45, 1.0])
    assert result.outputs["auto_rubric"].is_valid.tolist() == [True] * 5 + [False]  # a group of one has no ranking
    order = torch.tensor([3, 5, 0, 4, 1, 2])
    moved = score(reward, images[order], [prompts[n] for n in order], {"group_ids": ids[order]})
    torch.testing.assert_close(moved.total, result.total[order])


def test_a_group_whose_judge_failed_is_invalid():
    chat = Script(lambda text, levels: Reply("", error="down") if max(levels) < 0.5 else bright_first(text, levels))
    ids = torch.tensor([0, 0, 1, 1])
    output = AutoRubricReward(LIGHT, chat=chat)(grey(0.1, 0.2, 0.8, 0.9), ["p"] * 4, {"group_ids": ids})
    assert output.valid.tolist() == [False, False, True, True] and output.rationale[0] == "the judge gave no ranking"
    with pytest.raises(RewardError, match="different prompts in one group"):
        score(AutoRubricReward(LIGHT, chat=chat), grey(0.1, 0.2), ["p", "q"])
    with pytest.raises(ValueError, match="model: got none"):
        AutoRubricReward(LIGHT)


# CDRRM


@pytest.mark.parametrize("text", ["as in Image 1", "the second picture", "candidate B wins", "like the preferred one"])
def test_identifiers_of_candidates_are_found(text):
    assert IDENTIFIER.search(text)


@pytest.mark.parametrize("text", ["The image a viewer sees is sharp", "two cats", "one picture of the first order"])
def test_plain_criteria_hold_no_identifier(text):
    assert not IDENTIFIER.search(text)


PROFILED = '{"preferred": {"strengths": ["bright"], "weaknesses": []}, "other": {"weaknesses": ["dark"]}}'


def cdrrm_answer(rubric_text):
    def answer(text, levels):
        if "Describe each" in text:
            return PROFILED
        if "Distil the contrast" in text:
            return rubric_text
        return bright_first(text, levels) if "ight" in text else bright_first(text, [-x for x in levels])

    return answer


def test_the_profile_names_the_preferred_picture_and_the_rubric_is_made_from_the_contrast():
    chat = Script(cdrrm_answer('{"rubrics": ["Light is better."]}'))
    items = [preference(1, 2), preference(2, 1)]
    found = profiles(chat, items)
    assert found == [Profile(("+ bright",), ("- dark",))] * 2
    assert "prefer picture 1 to picture 2" in chat.asked[0] and "prefer picture 2 to picture 1" in chat.asked[1]
    assert synthesise(chat, items, [found[0], None]) == [("Light is better.",), None]
    assert "+ bright" in chat.asked[-1] and "- dark" in chat.asked[-1] and "a lamp" in chat.asked[-1]
    assert contrast_rubrics(chat, items) == [("Light is better.",), None]  # the second does not recover its label


def test_a_rubric_that_points_at_a_candidate_is_asked_for_again_and_then_dropped():
    chat = Script(cdrrm_answer('{"rubrics": ["Picture 1 is brighter."]}'))
    assert synthesise(chat, [preference(1, 2)], [Profile(("+ bright",), ("- dark",))]) == [None]
    assert chat.calls == 4


def test_the_judge_is_more_accurate_with_the_rubric_than_without():
    items = [preference(1, 2), preference(1, 2, levels=[0.7, 0.2]), preference(2, 1)]
    chat = Script(cdrrm_answer(""))
    assert judge_accuracy(chat, items, [["Light is better."]] * 3) == pytest.approx(2 / 3)
    assert judge_accuracy(chat, items) == pytest.approx(1 / 3)  # without it this judge prefers the dark
    with pytest.raises(ValueError, match="expected pairs"):
        profiles(chat, [preference(1, 2, 3)])


# DeltaRubric


def test_delta_scores_are_means_over_the_questions_answered_differently():
    first, second = torch.tensor([0.9, 0.8, 0.1, 0.6]), torch.tensor([0.2, 0.7, 0.3, 0.4])
    assert delta_scores(first, second) == pytest.approx((0.75, 0.3))  # the second and third drop out
    assert delta_scores(second, first) == pytest.approx((0.3, 0.75))
    weighted = delta_scores(first, second, torch.tensor([3.0, 9.0, 9.0, 1.0]))
    assert weighted == pytest.approx(((2.7 + 0.6) / 4, (0.6 + 0.4) / 4))
    assert delta_scores(first[:0], second[:0]) == delta_scores(first, first) == (0.5, 0.5)


def delta_answer(text, levels):
    if "checklist" in text:
        return '{"checklist": ["Is it bright?", "Is it a lamp?"]}'
    return levels[0] if "bright" in text else 0.9


def test_the_delta_rubric_reward_prefers_what_its_own_checklist_finds_and_ignores_the_order():
    images, ids = grey(0.1, 0.9, 0.4, 0.8), torch.tensor([0, 0, 0, 1])
    chat = Script(delta_answer)
    reward = DeltaRubricReward(chat=chat)
    output = reward(images, ["a lamp"] * 4, {"group_ids": ids})
    assert output.scores.tolist() == [0.25, 1.0, 0.25, 0.5]  # 0.1 against 0.4 answer alike: a tie
    assert output.valid.all() and "Is it bright?" in output.rationale[0]
    moved = reward(images.flip(0), ["a lamp"] * 4, {"group_ids": ids.flip(0)})
    assert torch.equal(moved.scores.flip(0), output.scores)


def test_an_empty_checklist_is_a_tie_and_an_unreadable_one_no_verdict():
    empty = DeltaRubricReward(chat=Script(lambda *_: '{"checklist": []}'))(grey(0.1, 0.9), ["p", "p"])
    assert empty.scores.tolist() == [0.5, 0.5] and empty.valid.all()
    for bad in ("nothing", '{"checklist": "x"}', '{"checklist": ["Is picture 1 better?"]}'):
        output = DeltaRubricReward(chat=Script(lambda *_, bad=bad: bad), retries=1)(grey(0.1, 0.9), ["p", "p"])
        assert not output.valid.any()


def test_the_planner_sees_prompt_and_pictures_and_no_label():
    chat = Script(delta_answer)
    pair = grey(0.1, 0.9)
    assert plan(chat, ["a lamp"], [(pair[0], pair[1])]) == [("Is it bright?", "Is it a lamp?")]
    assert plan(chat, ["a lamp"], [(pair[1], pair[0])]) is not None
    assert chat.asked[0] == chat.asked[1]  # the text is the same, whichever is the better
    assert not re.search(r"prefer|rank|label|winner|chosen", chat.asked[0], re.IGNORECASE)


def test_a_verifier_may_be_another_chat():
    planner, verifier = Script(delta_answer), Script(lambda text, levels: 1 - levels[0])
    output = DeltaRubricReward(chat=planner, verifier=verifier)(grey(0.1, 0.9), ["p", "p"])
    assert output.scores.tolist() == [1.0, 0.0]
    failing = DeltaRubricReward(chat=planner, verifier=Script(lambda *_: Reply("", error="down")))
    assert not failing(grey(0.1, 0.9), ["p", "p"]).valid.any()


# UnifiedReward-Flex


def flex_json(winner, *categories, name="Image"):
    listed = [{"name": f"{k}", "dims": [], "cat_winner": f"{name} {w}"} for k, w in zip("ABCD", categories)]
    return "```json\n" + json.dumps({"categories": listed, "winner": f"{name} {winner}"}) + "\n```"


def test_a_comparison_reads_the_winner_overall_and_of_the_first_three_categories():
    assert read_comparison(Reply(flex_json(2, 1, 2, 1, 2))) == Comparison(2, (1, 2, 1))
    assert read_comparison(Reply('{"winner": "Image 1 and Image 2 are equal"}')) == Comparison(0, ())
    assert read_comparison(Reply('{"winner": null, "categories": [{"cat_winner": "neither"}, 3]}')) == Comparison(
        0, (0,)
    )


def test_flex_scores_of_a_group_of_three():
    pairs = [(0, 1), (2, 0), (1, 2)]
    told = [Comparison(1, (1, 1, 2)), Comparison(2, (2, 0)), None]
    found = flex_scores(pairs, told, 3)
    assert found.overall.tolist() == pytest.approx([1.0, 0.25, 0.25])  # the unreadable pair is half a win to both
    nan = math.nan
    expected = torch.tensor([[1.0, 0.0, 0.0], [0.75, 0.0, 0.5], [0.0, 1.0, nan]])
    torch.testing.assert_close(found.categories, expected, equal_nan=True)
    assert found.dim_mean.tolist() == pytest.approx([1.75 / 3, 1 / 3, 0.25])
    assert found.reward.tolist() == pytest.approx([(1 + 1.75 / 3) / 2, (0.25 + 1 / 3) / 2, 0.25])
    weighted = flex_scores(pairs, told, 3, overall_weight=3, dim_weight=1, category_weights=(1, 2, 1))
    assert weighted.reward[0].item() == pytest.approx((3 * 1 + (1 + 2 * 0.75 + 0) / 4) / 4)
    assert ((found.reward >= 0) & (found.reward <= 1)).all()


def test_samples_without_categories_have_their_overall_win_rate():
    found = flex_scores([(0, 1)], [Comparison(1, ())], 2)
    assert found.reward.tolist() == [1, 0] and found.dim_mean.isnan().all()
    malformed = flex_scores([(0, 1)], [None], 2)
    assert malformed.reward.tolist() == [0.5, 0.5]


def test_decoupled_advantages_standardise_each_component_before_blending():
    overall, dims = torch.tensor([1.0, 0.0, 0.5, 0.7]), torch.tensor([0.2, 0.4, 0.9, 0.1])
    ids = torch.tensor([0, 0, 0, 0])

    def z(x):
        return (x - x.mean()) / (x.std(correction=0) + 1e-4)

    blend = decoupled_advantages(overall, dims, ids, 3, 1)
    torch.testing.assert_close(blend, (3 * z(overall) + z(dims)) / 4, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(decoupled_advantages(overall, dims * math.nan, ids), z(overall), rtol=2e-3, atol=2e-3)


def flex_answer(text, levels):
    if min(levels) < 0.05:
        return "I cannot tell."
    return flex_json(*[1 if levels[0] > levels[1] else 2] * 4)


def test_the_flex_reward_turns_with_its_pictures():
    images, ids = grey(0.2, 0.9, 0.5, 0.7, 0.6), torch.tensor([0, 0, 0, 1, 1])
    reward = UnifiedRewardFlex(chat=Script(flex_answer))
    output = reward(images, ["p"] * 5, {"group_ids": ids})
    assert output.scores.tolist() == [0.0, 1.0, 0.5, 1.0, 0.0] and output.valid.all()
    assert output.criteria["alignment"].tolist() == output.criteria["overall"].tolist() == output.scores.tolist()
    swapped = reward(images.flip(0), ["p"] * 5, {"group_ids": ids.flip(0)})
    assert torch.equal(swapped.scores.flip(0), output.scores)


def test_a_sample_that_could_never_be_compared_is_invalid_with_a_half():
    output = UnifiedRewardFlex(chat=Script(flex_answer), retries=0)(grey(0.01, 0.9, 0.5), ["p"] * 3)
    assert output.valid.tolist() == [False, True, True]
    assert output.scores.tolist() == pytest.approx([0.5, (0.75 + 1) / 2, (0.25 + 0) / 2])
    alone = UnifiedRewardFlex(chat=Script(flex_answer))(grey(0.3), ["p"])
    assert alone.scores.tolist() == [0.5] and alone.valid.all()


def test_a_judge_that_always_prefers_the_first_shown_gives_each_the_same_on_average():
    reward_of = lambda seed: UnifiedRewardFlex(chat=Script(lambda *_: flex_json(1, 1, 1, 1)), seed=seed)  # noqa: E731
    scores = torch.stack([reward_of(seed)(grey(0.1, 0.5, 0.9), ["p"] * 3).scores for seed in range(60)])
    assert (scores.mean(0) - 0.5).abs().max() < 0.15


def test_the_template_of_the_published_checkpoints_can_be_given(tmp_path):
    (tmp_path / "flex.txt").write_text("Compare for [{prompt}] as {json}.")
    chat = Script(flex_answer)
    UnifiedRewardFlex(chat=chat, template=tmp_path / "flex.txt")(grey(0.4, 0.9), ["a {lamp}"] * 2)
    assert chat.asked == ["Compare for [a {lamp}] as {json}."]
    for options, message in (
        ({"template": "no place"}, "expected text with {prompt}"),
        ({"template": "gone.txt"}, "template: got no file at 'gone.txt'"),
        ({"overall_weight": 0, "dim_weight": 0}, "not both 0"),
        ({"category_weights": (1, 1)}, "category_weights: got (1, 1), expected three numbers"),
        ({"max_tokens": 0}, "max_tokens: got 0"),
    ):
        with pytest.raises(ValueError) as error:
            UnifiedRewardFlex(chat=chat, **options)
        assert message in str(error.value)
