"""Rewriting prompts: what is read in an answer, failures that leave the prompt as it is, the gate, the key points."""

import itertools
import statistics

import pytest
import torch
from chats import Endpoint, Scripted, completion
from fastapi.responses import JSONResponse
from live_server import LiveServer
from search_toys import half, toy_chain, vp_schedule
from test_search_refine import Obedient, obedient
from tiny_vlm import TEMPLATE, make_tokenizer

from visalign.rewards.vlm.chat import Message, Reply
from visalign.search.best_of_n import best_of_n
from visalign.search.prompts.key_points import (
    KEY_POINT_GROUPS,
    KEY_POINTS,
    STRUCTURAL,
    key_point_holds,
    key_point_score,
)
from visalign.search.prompts.rewriting import (
    SYSTEM,
    Rewriter,
    choose_words,
    enhance,
    make_rewriter,
    read_rewrite,
    reword,
)
from visalign.search.prompts.text_chat import TextChat

STEPS = 6


# What is read


@pytest.mark.parametrize(
    "text, expected",
    [
        ("<think>hm</think><answer> A red cat.\nOn grass. </answer>", "A red cat.\nOn grass."),
        ("<think>say <answer>no</answer></think>\n<answer>yes</answer>", "yes"),
        ("<answer>draft</answer> better: <answer>final</answer>", "final"),
        ("<think>hm\nhm</think>\n A red cat.", "A red cat."),
        ("the template opened it</think>A red cat.", "A red cat."),
        ("A red cat.", "A red cat."),
        ("<think>and so on, without end", "original"),
        ("<think>hm</think><answer>A red cat, cut o", "original"),
        ("<answer>  </answer>", "original"),
        ("<think>only thoughts</think>", "original"),
        ("", "original"),
    ],
)
def test_the_answer_is_read_and_what_is_none_leaves_the_original(text, expected):
    assert read_rewrite(text, "original") == expected


# The rewriter


def test_prompts_are_asked_for_together_and_each_gets_its_own_answer():
    chat = Scripted(lambda c, o: f"<answer>fine {c[1].parts[0]}</answer>")
    rewriter = Rewriter(chat=chat, temperature=0.7, top_p=0.9, max_tokens=256, seed=4)
    assert rewriter.rewrite(["a cat", "a dog"]) == ["fine a cat", "fine a dog"] and rewriter("a fox") == "fine a fox"
    (system, user), options = chat.asked[0]
    assert system == Message("system", (SYSTEM,)) and user == Message("user", ("a cat",))
    assert options == {"max_tokens": 256, "temperature": 0.7, "top_p": 0.9, "seed": 4}
    lengths = [len(f"<answer>fine {prompt}</answer>") for prompt in ("a cat", "a dog", "a fox")]
    assert rewriter.tokens == sum(-(-n // 4) for n in lengths) and not rewriter.problems


def test_the_instruction_names_what_must_be_kept_and_can_be_replaced(tmp_path):
    kept = ("subjects", "actions", "counts", "style", "layout", "relations", "attributes", "text", *KEY_POINTS)
    assert all(word in SYSTEM for word in kept)
    (tmp_path / "theirs.txt").write_text("Reword.")
    chat = Scripted(lambda c, o: c[0].parts[0])
    assert Rewriter(chat=chat, system=tmp_path / "theirs.txt")("a cat") == "Reword."
    assert Rewriter(chat=chat, system="Say it well.")("a cat") == "Say it well."


def test_a_rewriter_that_fails_leaves_the_prompt_and_says_why():
    rewriter = Rewriter(chat=Scripted(lambda c, o: Reply("", error="gone")))
    assert rewriter("a cat") == "a cat" and rewriter.problems == ["no answer: gone"] and rewriter.tokens == 0


def test_a_served_rewriter_does_not_think_and_is_asked_again_while_it_is_busy():
    endpoint = Endpoint()
    endpoint.answer = lambda body, n: JSONResponse({}, 503) if n == 0 else completion("<answer>A cat.</answer>")
    with LiveServer(endpoint.app) as server:
        options = {"backoff": 0.01, "retries": 1}
        rewriter = make_rewriter("enhancer", url=server.url, chat_options=options | {"extra_body": {"top_k": 1}})
        assert rewriter("a cat") == "A cat." and len(endpoint.bodies) == 2
        body = endpoint.bodies[1]
        assert body["chat_template_kwargs"] == {"enable_thinking": False} and body["top_k"] == 1
        assert body["model"] == "enhancer" and body["temperature"] == 0 and body["max_tokens"] == 512
        endpoint.answer = lambda body, n: JSONResponse({"error": "no such field"}, 400)
        assert rewriter("a cat") == "a cat" and "HTTP 400" in rewriter.problems[0]
        Rewriter("enhancer", server.url, thinking=None, chat_options=options)("a cat")
        assert "chat_template_kwargs" not in endpoint.bodies[-1]


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    folder, tokenizer = tmp_path_factory.mktemp("llama"), make_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace(
        "<|im_start|>assistant\n", "<|im_start|>assistant\n{% if enable_thinking %}<think>{% endif %}"
    )
    torch.manual_seed(0)
    size = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = LlamaConfig(**size, vocab_size=len(tokenizer), eos_token_id=None, pad_token_id=tokenizer.pad_token_id)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_text_model_that_runs_here_answers_alike_alone_and_among_others(tiny_llama):
    chat = TextChat(tiny_llama)
    turns = [[Message("system", ("Yes",)), Message("user", (text,))] for text in ("No", "Yes no yes")]
    greedy = chat(turns, max_tokens=8)
    assert all(reply.error is None for reply in greedy) and chat(turns[1:], max_tokens=8) == greedy[1:]
    drawn = {seed: chat(turns, max_tokens=8, temperature=1.0, seed=seed) for seed in range(3)}
    assert chat(turns[:1], max_tokens=8, temperature=1.0, seed=1) == drawn[1][:1]
    assert len(set(map(str, drawn.values()))) == 3
    [picture] = chat([[Message("user", (torch.zeros(3, 8, 8),))]], max_tokens=1)
    assert "expected words only" in picture.error
    with pytest.raises(ValueError, match="top_logprobs: got 5"):
        chat(turns, max_tokens=1, top_logprobs=5)
    rewriter = Rewriter(tiny_llama, max_tokens=8, system="Yes")
    assert rewriter("No") == (greedy[0].text.strip() or "No") and rewriter.tokens > 0
    assert rewriter.chat.thinking is False and Rewriter(tiny_llama, thinking=True).chat.thinking is True


def test_thinking_is_what_the_chat_template_is_told(tiny_llama, monkeypatch):
    seen = []
    for thinking in (False, True, None):
        chat = TextChat(tiny_llama, thinking=thinking)
        monkeypatch.setattr(chat.model, "generate", lambda input_ids, **_: seen.append(input_ids) or input_ids)
        chat([[Message("user", ("No",))]], max_tokens=1)
    thought = ["<think>" in chat.tokenizer.decode(ids[0]) for ids in seen]
    assert thought == [False, True, False]


@pytest.mark.parametrize(
    "options, says",
    [
        ({"max_tokens": 0}, "max_tokens: got 0"),
        ({"temperature": -1}, "temperature: got -1"),
        ({"top_p": 0}, "top_p: got 0, expected 0 < top_p <= 1"),
        ({"system": "no_such_file.txt"}, "template: got no file"),
        ({"chat": 3}, "chat: got int, expected a Chat"),
        ({"chat": None, "model": "no/such-model"}, "could not load 'no/such-model' .looked on this machine only"),
    ],
)
def test_unusable_options_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        Rewriter(**{"chat": Scripted(str), **options})


def test_a_rewriter_is_a_function_a_path_or_a_model():
    assert make_rewriter(str.upper)("a cat") == "A CAT" and make_rewriter("string:capwords")("a cat") == "A Cat"
    assert make_rewriter("x", chat=Scripted(lambda c, o: "fine"))("a cat") == "fine"
    for given, options, says in [
        (None, {}, "rewrite: got None, expected a function"),
        (3, {}, "rewrite: got 3"),
        (str.upper, {"seed": 1}, "rewrite_options: got .'seed'., expected none"),
        ("string:capwords", {"seed": 1}, "rewrite_options: got .'seed'., expected none"),
    ]:
        with pytest.raises(ValueError, match=says):
            make_rewriter(given, **options)


# In searches


def test_any_search_draws_with_the_rewritten_words_and_is_scored_by_the_prompt():
    seen = set()

    def reward(images, prompts, context=None):
        seen.update(prompts)
        return half(images, prompts)

    plain, reworded = obedient(max_nfe=5 * STEPS), obedient(max_nfe=5 * STEPS, reward=reward)
    assert reword(reworded, lambda prompt: f" {prompt} 3 ").rewritten == "toy 3"
    before, after = (list(best_of_n(chain))[-1].state.rewards for chain in (plain, reworded))
    assert after == pytest.approx([r + 1.5 for r in before], abs=1e-12) and seen == {"toy"}
    assert reword(plain, lambda prompt: " ").words == "toy" == plain.words


def test_a_rewrite_stays_only_where_its_pictures_are_better_by_the_margin():
    for shift, margin, kept in ((1, 0, True), (-1, 0, False), (0, 0, False), (1, 0.5, False), (1, 0.49, True)):
        chain = obedient()
        found = choose_words(chain, lambda prompt, to=shift: f"{prompt} {to}", samples=4, margin=margin)
        expected = f"toy {shift}" if kept else "toy"
        assert chain.words == found.words == expected and chain.ledger.nfe == 8 * STEPS
        old, new = found.rewards["toy"], found.rewards[f"toy {shift}"]
        assert [b - a for a, b in zip(old, new)] == pytest.approx([shift / 2] * 4, abs=1e-12)  # the same noise
        assert chain.best.reward == max(old + new)


def test_the_gate_goes_by_the_mean_of_all_samples():
    chain = toy_chain(model=Lucky(vp_schedule()))
    found = choose_words(chain, lambda prompt: "lucky", samples=8)
    old, new = (statistics.fmean(rewards) for rewards in found.rewards.values())
    assert max(found.rewards["lucky"]) > max(found.rewards["toy"]) and new < old and chain.words == "toy"


class Lucky(Obedient):
    """Told "lucky", it spoils all samples but the one that is best, which it makes better."""

    def decode(self, latents, prompts):
        images = super().decode(latents, prompts)
        return images if prompts[0] == "toy" else images + torch.where(images == images.max(), 1.0, -5.0)

    def predict(self, latents, step_index, prompts):
        return super().predict(latents, step_index, ["toy"] * len(prompts))


def test_without_a_rewrite_or_room_nothing_is_compared():
    for rewrite, budget in ((lambda prompt: prompt, 99), (lambda prompt: "", 99), (lambda prompt: "toy 1", 11)):
        chain = obedient(max_nfe=budget)
        assert choose_words(chain, rewrite, samples=4).words == "toy" == chain.words and chain.ledger.nfe == 0
    chain = obedient(max_nfe=5 * STEPS)
    assert len(choose_words(chain, lambda prompt: "toy 1", samples=4).rewards["toy 1"]) == 2  # fewer where fewer fit


@pytest.mark.parametrize("budget, batch", [(6, 16), (11, 16), (12, 16), (100, 16), (100, 3)])
def test_enhancing_spends_what_is_left_on_the_better_words(budget, batch):
    rewriter = Rewriter(chat=Scripted(lambda c, o: "toy 1"))
    chain = obedient(max_nfe=budget, batch_size=batch)
    events = list(enhance(chain, rewrite=rewriter, samples=2))
    bests, rewards = [event.best.reward for event in events], [r for event in events for r in event.rewards]
    plain = list(best_of_n(obedient(max_nfe=600)))[-1].state.rewards
    pairs = min(2, budget // 12)
    expected = plain[:pairs] + [r + 0.5 for r in plain[:pairs]]
    expected += [r + 0.5 * bool(pairs) for r in plain[pairs : budget // 6 - pairs]]
    assert rewards == pytest.approx(expected, abs=1e-12) and chain.ledger.nfe == len(expected) * 6 <= budget
    assert bests == sorted(bests) and bests[-1] == max(rewards) and chain.words == "toy"
    assert chain.ledger.tokens == rewriter.tokens == 2
    for options, says in (({"samples": 0}, "samples: got 0"), ({"margin": -1}, "margin: got -1"), ({}, "got None")):
        with pytest.raises(ValueError, match=says):
            next(enhance(obedient(), **{"rewrite": rewriter if options else None, **options}))


# Key points


def test_there_are_24_key_points_in_six_groups_of_which_four_are_also_about_structure():
    assert [len(points) for points in KEY_POINT_GROUPS.values()] == [3, 5, 6, 6, 2, 2]
    assert len(set(KEY_POINTS)) == 24 and set(KEY_POINT_GROUPS["action and interaction"]) > STRUCTURAL
    for point, consistent, intact in itertools.product(KEY_POINTS, (True, False), (True, False)):
        assert key_point_holds(point, consistent, intact) == (consistent and (intact or point not in STRUCTURAL))


def test_groups_count_alike_however_many_of_their_points_apply():
    held = {"counting": 1, "size": 0, "material": 0, "negation": 1, "text layout": None}
    assert key_point_score(held) == pytest.approx((1 / 3 + 1) / 2)
    assert key_point_score(held, by_group=False) == pytest.approx(2 / 4)
    assert key_point_score(dict.fromkeys(KEY_POINTS, True)) == 1 and key_point_score({"state": 0.25}) == 0.25
    for wrong, says in (
        ({"colour": 1}, "held: got 'colour'"),
        ({"size": 2}, "held: got 2 for 'size', expected 0 .. 1"),
        ({"size": None}, "no point that applies"),
        ({}, "no point that applies"),
    ):
        with pytest.raises(ValueError, match=says):
            key_point_score(wrong)
    with pytest.raises(ValueError, match="point: got 'colour'"):
        key_point_holds("colour", True)
