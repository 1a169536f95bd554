import math

import pytest
import torch
from tiny_vlm import save_tiny_vlm

from visalign.rewards import RewardError, make_reward, parse_spec, score
from visalign.rewards.audit.probes import make_probes, probe
from visalign.rewards.probability.paco import cells, grid_of, main_prompt
from visalign.rewards.probability.rewarddance import pick_references
from visalign.rewards.probability.vlm_yes import CRITERIA
from visalign.rewards.vlm.chat import Message, Reply, Token
from visalign.rewards.vlm.yes_token import YesNo, read_reply, with_question

PROMPTS = ['a "red" circle {0}', "two blue squares", "a 1x2 grid of cats. Left: cat", "green"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(save_tiny_vlm(tmp_path_factory.mktemp("vlm"), "qwen2_5_vl"))


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(4, 3, 56, 84, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def context() -> dict:
    generator = torch.Generator().manual_seed(1)
    return {"references": [list(torch.rand(1 + n % 2, 3, 56, 56, generator=generator)) for n in range(4)]}


@pytest.fixture(
    scope="module", params=["vlm_yes", "vqascore", "prompt_echo", "rewarddance", "paco_consistency", "paco_edit"]
)
def reward(request, folder):
    return make_reward(request.param, model=folder)


# All of them


def test_a_batch_scores_as_its_samples_do_one_by_one(reward, images, context):
    if reward.name == "paco_consistency":
        images, context = images[2:], {"references": context["references"][2:]}
    prompts = PROMPTS[-len(images) :]
    batch = score(reward, images, prompts, context)
    singles = [
        score(reward, images[n : n + 1], prompts[n : n + 1], {"references": context["references"][n : n + 1]}).total
        for n in range(len(images))
    ]
    torch.testing.assert_close(batch.total, torch.cat(singles), rtol=0, atol=2e-5)
    low, high = reward.range
    assert ((batch.total >= low) & (batch.total <= high)).all() and not batch.failed
    assert reward.kind == "pointwise" and reward.checkpoints is not None and reward.source and reward.licence


def test_gradients_reach_the_candidates_and_nothing_else(reward, images, context):
    candidates = images.clone().requires_grad_()
    references = [[r.clone().requires_grad_() for r in own] for own in context["references"]]
    prompts = ["a 1x2 grid"] * 4
    output = reward(candidates, prompts, {"references": references})
    scores = output if isinstance(output, torch.Tensor) else output.scores
    scores.sum().backward()
    assert reward.differentiable and (candidates.grad.abs().amax(dim=(1, 2, 3)) > 0).all()
    assert all(r.grad is None for own in references for r in own)


def test_bad_options_are_refused_before_anything_is_loaded(reward):
    with pytest.raises(ValueError, match="option: got 'dtpye', expected one of .*did you mean 'dtype'"):
        parse_spec(reward.name, model="nowhere", dtpye="float32")
    with pytest.raises(ValueError, match="dtype: got 'half', expected one of"):
        parse_spec(reward.name, model="nowhere", dtype="half")
    with pytest.raises(ValueError, match="model: got 3, expected a hub id"):
        parse_spec(reward.name, model=3)
    if reward.name != "prompt_echo":
        with pytest.raises(ValueError, match="option: got 'dtype', expected one of"):
            parse_spec(reward.name, model="m", url="http://localhost:1", dtype="float32")


# vlm_yes, vqascore


def test_vlm_yes_is_the_mean_over_its_questions(folder, images):
    reward = make_reward("vlm_yes", model=folder, criteria={"a": 'Is it "{prompt}"?', "b": "Is it sharp?"})
    said = reward(images, PROMPTS)
    by_hand = [
        YesNo(reward.judge.vlm)([[Message("user", (x, q))] for x in images]).probability
        for q in ("Is it sharp?", "Is it sharp?")
    ][0]
    torch.testing.assert_close(said.criteria["b"], by_hand, rtol=0, atol=1e-5)
    torch.testing.assert_close(said.scores, (said.criteria["a"] + said.criteria["b"]) / 2)
    assert not torch.allclose(said.criteria["a"], said.criteria["b"])
    assert list(make_reward("vlm_yes", model=folder).criteria) == list(CRITERIA)
    with pytest.raises(ValueError, match="criteria: got \\[\\], expected at least one question"):
        parse_spec("vlm_yes", model=folder, criteria=[])


def test_log_odds_and_probability_are_the_same_verdict(folder, images):
    question = ["Is it good?"]
    odds = make_reward("vlm_yes", model=folder, criteria=question, output="log_odds")
    p = make_reward("vlm_yes", model=folder, criteria=question)
    torch.testing.assert_close(odds(images, PROMPTS).scores.sigmoid(), p(images, PROMPTS).scores)
    assert odds.range == (-math.inf, math.inf) and p.range == (0.0, 1.0)


def test_vqascore_is_a_share_of_the_whole_vocabulary(folder, images):
    reward = make_reward("vqascore", model=folder)
    vlm = reward.judge.vlm
    prompts = [
        vlm.prompt([Message("user", (x, f'Does this figure show "{p}"? Please answer Yes or No.'))])
        for x, p in zip(images, PROMPTS)
    ]
    p = vlm.head(vlm.hidden(prompts)[:, 0]).softmax(dim=-1)
    torch.testing.assert_close(p.sum(dim=-1), torch.ones(4))
    torch.testing.assert_close(reward(images, PROMPTS).scores, p[:, vlm.tokenizer.encode("Yes")[0]])
    assert 'circle {0}"' in prompts[0].text
    with pytest.raises(ValueError, match="question: got 'Yes\\?', expected {prompt} in it"):
        parse_spec("vqascore", model=folder, question="Yes?")


# Endpoints: what their log-probabilities are read as

TOP = {"Yes": math.log(0.5), " yes": math.log(0.1), "No": math.log(0.2), "NO": math.log(0.05), "It": math.log(0.01)}


def reply(top: dict[str, float]) -> Reply:
    likeliest = max(top, key=top.get)
    return Reply(likeliest, (Token(likeliest, top[likeliest], top),))


@pytest.mark.parametrize(
    "drop, binary, canonical, full",
    [
        ((), 0.5 / 0.7, 0.6 / 0.85, 0.5),
        (("No", "NO"), 1.0, 1.0, 0.5),
        (("Yes", " yes"), 0.0, 0.0, 0.0),
        (("Yes",), 0.0, 0.1 / 0.35, 0.0),
    ],
)
def test_an_endpoints_answer_is_read_by_each_convention(drop, binary, canonical, full):
    top = {token: p for token, p in TOP.items() if token not in drop}
    for convention, expected in (("binary", binary), ("canonical", canonical), ("full", full)):
        probability, log_odds, error = read_reply(reply(top), "Yes", "No", convention)
        assert error is None and probability == pytest.approx(expected, abs=1e-12) and math.isfinite(log_odds)
    if not drop:
        assert read_reply(reply(top), "Yes", "No", "binary")[1] == pytest.approx(math.log(0.5 / 0.2))
    if drop == ("No", "NO"):  # bounded by the least likely token that came back
        assert read_reply(reply(top), "Yes", "No", "binary")[1] == pytest.approx(math.log(0.5 / 0.01))


def logs(shares):
    return {token: math.log(share) for token, share in shares.items()}


@pytest.mark.parametrize("convention", ["binary", "full", "canonical"])
def test_a_served_word_may_come_with_blanks_and_where_neither_comes_there_is_no_score(convention):
    probability, log_odds, error = read_reply(
        reply(logs({" Yes": 0.6, "Yes": 0.1, " No": 0.2})), "Yes", "No", convention
    )
    assert error is None and probability == pytest.approx(0.7 if convention == "full" else 0.7 / 0.9)
    assert log_odds == pytest.approx(math.log(0.7 / 0.2))
    for first in ("<think>", "The", "Y"):
        probability, log_odds, error = read_reply(reply(logs({first: 0.9, "picture": 0.1})), "Yes", "No", convention)
        assert (probability, log_odds) == (0, 0)
        assert error.startswith("neither 'Yes' nor 'No' is among") and error.endswith(f"begins {first!r})")


def test_a_failed_or_empty_answer_is_an_error():
    assert read_reply(Reply("", error="HTTP 500"), "Yes", "No", "binary")[2] == "HTTP 500"
    assert "no log-probabilities" in read_reply(Reply("Yes"), "Yes", "No", "binary")[2]


def test_questions_join_the_users_turn():
    turns = [Message("system", ("s",)), Message("user", ("a",))]
    assert with_question(turns, "q?") == [turns[0], Message("user", ("a", "q?"))]
    assert with_question(turns[:1], "q?") == [turns[0], Message("user", ("q?",))]


# prompt_echo


def test_prompt_echo_is_the_negative_loss_on_the_prompt(folder, images):
    reward = make_reward("prompt_echo", model=folder)
    vlm = reward.vlm
    for n in (0, 1):
        asked = vlm.prompt([Message("user", (images[n], "Describe this image in detail"))])
        label = vlm.tokenizer.encode(PROMPTS[n])
        inputs = vlm.inputs([asked.followed_by(label)])
        labels = inputs["input_ids"].clone()
        labels[:, : -len(label)] = -100
        with torch.no_grad():
            loss = vlm.model(**inputs, labels=labels).loss
        torch.testing.assert_close(reward(images[n : n + 1], PROMPTS[n : n + 1])[0], -loss, rtol=0, atol=2e-5)
    total = make_reward("prompt_echo", model=folder, reduction="sum")(images[:1], PROMPTS[:1])
    length = len(vlm.tokenizer.encode(PROMPTS[0]))
    torch.testing.assert_close(total, length * reward(images[:1], PROMPTS[:1]))


def test_the_last_prompt_token_touches_the_last_term_only(folder, images):
    vlm = make_reward("prompt_echo", model=folder).vlm
    from visalign.rewards.vlm.yes_token import token_log_probs

    asked = [vlm.prompt([Message("user", (images[0], "q"))])] * 2
    terms = token_log_probs(vlm, asked, [[70, 71, 72], [70, 71, 99]])
    torch.testing.assert_close(terms[0, :2], terms[1, :2])
    assert abs(terms[0, 2] - terms[1, 2]) > 1e-3


def test_a_model_blind_to_the_picture_gives_no_advantage(folder, images, monkeypatch):
    reward = make_reward("prompt_echo", model=folder)
    seen = reward(images, ["one prompt"] * 4)
    assert seen.std() > 1e-4
    vlm = reward.vlm
    monkeypatch.setattr(
        vlm.base.visual.merger.mlp[2].weight, "data", torch.zeros_like(vlm.base.visual.merger.mlp[2].weight)
    )
    monkeypatch.setattr(
        vlm.base.visual.merger.mlp[2].bias, "data", torch.zeros_like(vlm.base.visual.merger.mlp[2].bias)
    )
    vlm._seen.clear()
    blind = reward(images, ["one prompt"] * 4)
    torch.testing.assert_close(blind, blind.mean().expand(4), rtol=0, atol=1e-5)


def test_prompt_echo_options(folder, images):
    echo = make_reward("prompt_echo", model=folder)(images, PROMPTS)
    gain = make_reward("prompt_echo", model=folder, minus_text=True)(images, PROMPTS)
    difference = echo - gain  # the likelihood without the picture: one number a prompt
    same = make_reward("prompt_echo", model=folder, minus_text=True)(images, PROMPTS[:1] * 4)
    again = make_reward("prompt_echo", model=folder)(images, PROMPTS[:1] * 4) - same
    torch.testing.assert_close(again, difference[:1].expand(4), rtol=0, atol=2e-5)
    assert not torch.allclose(make_reward("prompt_echo", model=folder, end_of_turn=True)(images, PROMPTS), echo)
    with pytest.raises(ValueError, match="prompts: got an empty one at 1, expected some words"):
        make_reward("prompt_echo", model=folder)(images[:2], ["a", ""])
    with pytest.raises(ValueError, match="url: got an endpoint, expected none"):
        parse_spec("prompt_echo", model="m", url="http://localhost:1")
    with pytest.raises(ValueError, match="reduction: got 'max', expected 'mean' or 'sum'"):
        parse_spec("prompt_echo", model="m", reduction="max")


# rewarddance


def test_rewarddance_is_the_mean_over_references_and_swapping_cancels_position(folder, images, context):
    plain = make_reward("rewarddance", model=folder)
    swapped = make_reward("rewarddance", model=folder, swap=True)
    references = [own[:1] for own in context["references"]]
    one = plain(images, PROMPTS, {"references": references}).scores
    twice = plain(images, PROMPTS, {"references": [own * 2 for own in references]}).scores
    torch.testing.assert_close(one, twice, rtol=0, atol=1e-5)
    two = context["references"][1]
    each = [plain(images[:1], PROMPTS[:1], {"references": [[r]]}).scores for r in two]
    both = plain(images[:1], PROMPTS[:1], {"references": [two]}).scores
    torch.testing.assert_close(both, (each[0] + each[1]) / 2, rtol=0, atol=1e-5)
    itself = swapped(images, PROMPTS, {"references": [[x] for x in images]})
    torch.testing.assert_close(itself.scores, torch.full((4,), 0.5), rtol=0, atol=1e-5)
    forward = swapped(images[:1], PROMPTS[:1], {"references": [[images[1]]]})
    backward = swapped(images[1:2], PROMPTS[:1], {"references": [[images[0]]]})
    torch.testing.assert_close(forward.scores + backward.scores, torch.ones(1))
    assert "position_bias" in forward.criteria


def test_rewarddance_keeps_references_and_says_who_has_none(folder, images):
    reward = make_reward("rewarddance", model=folder)
    with pytest.raises(RewardError, match="sample 0.*got no reference picture"):
        reward(images, PROMPTS)
    for prompt in PROMPTS:
        reward.references.put(prompt, images[1:3])
    stored = reward(images, PROMPTS).scores
    given = reward(images, PROMPTS, {"references": [list(images[1:3])] * 4}).scores
    assert torch.equal(stored, given) and len(reward.references) == 4


def test_references_are_picked_by_pairwise_wins(images):
    class ByBrightness:
        def better(self, first, second, prompts):
            odds = torch.tensor([float(b.mean() - a.mean()) + 5 for a, b in zip(first, second)])  # a bias that cancels
            return type("Said", (), {"log_odds": odds})()

    candidates = torch.stack([torch.full((3, 8, 8), level) for level in (0.3, 0.9, 0.1, 0.5)])
    assert pick_references(ByBrightness(), candidates, "p", top=2)[:, 0, 0, 0].tolist() == pytest.approx([0.9, 0.5])
    with pytest.raises(ValueError, match="top: got 5, expected 1 to 4"):
        pick_references(ByBrightness(), candidates, "p", top=5)


# paco


def test_grids_and_main_prompts_are_read_from_the_prompt():
    assert (
        grid_of("a 2x3 grid of 4x4 boards") == (2, 3) and grid_of("2 ⨉ 1, wide") == (2, 1) and grid_of("no") == (1, 1)
    )
    assert main_prompt("A fox, 2x2 grid. Cell 1: it runs. Cell 2: it sits.") == "A fox, 2x2 grid."
    assert main_prompt("A fox. [TOP LEFT]: it runs") == "A fox." and main_prompt("A fox runs") == "A fox runs"
    x = torch.arange(3 * 5 * 7.0).view(3, 5, 7)
    parts = cells(x, 2, 3)
    assert len(parts) == 6 and all(p.shape == (3, 2, 2) for p in parts)
    assert torch.equal(parts[1], x[:, :2, 2:4]) and torch.equal(parts[3], x[:, 2:4, :2])
    with pytest.raises(ValueError, match="got a grid of 9x1 for \\(5, 7\\) pixels"):
        cells(x, 9, 1)


def test_paco_consistency_is_the_mean_over_all_pairs_criteria_and_dimensions(folder):
    image = torch.rand(1, 3, 56, 56, generator=torch.Generator().manual_seed(2))
    reward = make_reward("paco_consistency", model=folder, template="{main_prompt} {criterion}?")
    said = {}
    judge = reward.judge
    parts = cells(image[0], 2, 2)
    for criterion in ("a", "b", "c"):
        pairs = [(parts[i], parts[j]) for i in range(4) for j in range(i + 1, 4)]
        assert len(pairs) == 6
        answers = judge([[Message("user", (x, y, f"a 2x2 grid {criterion}?"))] for x, y in pairs])
        said[criterion] = answers.probability.mean()
    metadata = [{"criteria": {"style": ["a", "b"], "logic": ["c"]}}]
    found = reward(image, ["a 2x2 grid"], {"metadata": metadata}).scores[0]
    torch.testing.assert_close(found, ((said["a"] + said["b"]) / 2 + said["c"]) / 2, rtol=0, atol=1e-5)
    assert reward(image, ["no pairs here"]).scores.tolist() == [0.0]
    swapped = make_reward("paco_consistency", model=folder, swap=True)(image, ["a 1x2 grid"])
    mirrored = make_reward("paco_consistency", model=folder, swap=True)(
        torch.cat([image[..., 28:], image[..., :28]], dim=3), ["a 1x2 grid"]
    )
    torch.testing.assert_close(swapped.scores, mirrored.scores, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        swapped.criteria["position_bias"], -mirrored.criteria["position_bias"], rtol=0, atol=1e-5
    )


def test_paco_edit_is_the_geometric_mean_of_two_answers(folder, images, context):
    said = make_reward("paco_edit", model=folder)(images, PROMPTS, context)
    expected = (said.criteria["preserved"] * said.criteria["followed"]).sqrt()
    torch.testing.assert_close(said.scores, expected)
    assert not torch.allclose(said.criteria["preserved"], said.criteria["followed"])
    with pytest.raises(RewardError, match="got no source picture"):
        make_reward("paco_edit", model=folder)(images, PROMPTS, {"references": [[]] * 4})


def test_the_published_paco_checkpoint_wants_its_own_words(tmp_path):
    with pytest.raises(ValueError, match="template: got none for 'X-GenGroup/PaCo-Reward-7B'.*consistency_scorer.py"):
        parse_spec("paco_consistency", model="X-GenGroup/PaCo-Reward-7B")
    (tmp_path / "words.txt").write_text("theme {main_prompt}?")
    parse_spec("paco_consistency", model="X-GenGroup/PaCo-Reward-7B", template=str(tmp_path / "words.txt"))


# probes


def test_a_sound_reward_passes_the_probes_and_a_hackable_one_does_not(images):
    real = images

    def likeness(images: torch.Tensor) -> torch.Tensor:
        return -(images - real).abs().flatten(1).mean(dim=1)

    def brightness(images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=(1, 2, 3))

    report = probe(brightness, images, PROMPTS)
    assert report.fooled["blank"] == 1.0 and not report.passes() and "blank" in str(report)
    sound = probe(likeness, images, PROMPTS)
    assert sound.passes() and sound.real.median() == 0 and sound.probes["blank"].max() < sound.real.median()


def test_probes_are_what_they_are_called(images):
    made = make_probes(images, PROMPTS, ("YES",))
    assert all(p.shape == images.shape and p.min() >= 0 and p.max() <= 1 for p in made.values())
    assert set(made) == {"blank", "solid", "noise", "blurred", "shifted", "tiled", "word 'YES'", "prompt text"}
    assert (made["blank"] == 1).all() and made["solid"].flatten(2).std(dim=2).max() < 1e-6
    assert torch.equal(made["shifted"][..., 1:], images[..., :-1])
    half = made["tiled"]
    torch.testing.assert_close(half[..., :28, :42], half[..., 28:, 42:])
    written = made["word 'YES'"][0, 0] < 0.5
    assert 0.02 < written.float().mean() < 0.5 and written[:, :40].any() and written[:, 44:].any()
    assert made["blurred"].std() < 0.5 * images.std()
