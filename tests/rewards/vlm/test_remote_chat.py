"""RemoteChat against a real endpoint: what it sends, reads, tries again, keeps, and how it says what went wrong."""

import base64
import io
import json
import math
import multiprocessing
import threading
import time

import numpy as np
import pytest
import torch
from chats import Endpoint, completion
from fastapi.responses import JSONResponse, Response
from live_server import LiveServer, free_port
from PIL import Image

from visalign.images import images_to_numpy
from visalign.rewards.urls import checked_url, is_loopback
from visalign.rewards.vlm.cache import DiskCache
from visalign.rewards.vlm.chat import Message, Reply, Token
from visalign.rewards.vlm.judging import make_chat
from visalign.rewards.vlm.remote_chat import RemoteChat

PICTURE = torch.rand(3, 8, 12, generator=torch.Generator().manual_seed(0))


def place(token, log_prob, *top):
    return {"token": token, "logprob": log_prob, "top_logprobs": [{"token": t, "logprob": p} for t, p in top]}


@pytest.fixture
def endpoint():
    return Endpoint()


@pytest.fixture
def url(endpoint):
    with LiveServer(endpoint.app) as server:
        yield server.url


def ask(text: str, *more) -> list[Message]:
    return [Message("user", (text, *more) if more else (text,))]


def decode(url: str) -> tuple[str, np.ndarray]:
    head, _, data = url.partition(",")
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    return head, np.asarray(picture)


# What is sent


def test_a_conversation_arrives_with_its_turns_pictures_and_options_in_place(endpoint, url, monkeypatch):
    monkeypatch.setenv("TEST_KEY", "secret")
    chat = make_chat("judge", url, key_variable="TEST_KEY", extra_body={"chat_template_kwargs": {"thinking": False}})
    turns = [Message("system", ("Be fair.",)), Message("user", ("First:", PICTURE, "Is it red?"))]
    chat([turns], max_tokens=3, temperature=0.5, top_p=0.9, seed=7, top_logprobs=0)
    [body] = endpoint.bodies
    system, user = body.pop("messages")
    assert system == {"role": "system", "content": "Be fair."}
    assert user["role"] == "user" and [part["type"] for part in user["content"]] == ["text", "image_url", "text"]
    assert [user["content"][k]["text"] for k in (0, 2)] == ["First:", "Is it red?"]
    head, pixels = decode(user["content"][1]["image_url"]["url"])
    assert head == "data:image/png;base64" and np.array_equal(pixels, images_to_numpy(PICTURE[None])[0])
    options = {"max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "seed": 7}
    assert body == {"model": "judge", "chat_template_kwargs": {"thinking": False}, **options}
    assert endpoint.headers[0]["authorization"] == "Bearer secret"


def test_jpegs_are_close_and_frames_of_a_video_come_in_order(endpoint, url):
    smooth = torch.linspace(0, 1, 16).expand(3, 16, 16)
    chat = RemoteChat("judge", url, picture_format="jpeg")
    chat([ask("Look:", smooth, torch.stack([smooth, 1 - smooth, smooth / 2]))], max_tokens=1)
    _, picture, video = endpoint.bodies[0]["messages"][0]["content"]
    head, pixels = decode(picture["image_url"]["url"])
    assert head == "data:image/jpeg;base64"
    assert np.abs(pixels.astype(float) / 255 - smooth.permute(1, 2, 0).numpy()).mean() < 0.02
    head, _, frames = video["video_url"]["url"].partition(",")
    means = [decode(f"x,{frame}")[1].mean() / 255 for frame in frames.split(",")]
    assert head == "data:video/jpeg;base64" and means == pytest.approx([0.5, 0.5, 0.25], abs=0.02)
    assert decode(f"x,{frames.split(',')[1]}")[1][0, 0].mean() > 200  # the second frame is the inverted one


def test_no_key_is_sent_unless_one_is_named(endpoint, url):
    RemoteChat("judge", url)([ask("?")], max_tokens=1)
    assert "authorization" not in endpoint.headers[0] and "logprobs" not in endpoint.bodies[0]


# What is read


def test_log_probabilities_are_read_and_tokens_that_read_the_same_add_up(endpoint, url):
    top = [("Yes", math.log(0.5)), ("No", math.log(0.2)), ("Yes", math.log(0.25))]
    endpoint.answer = lambda body, n: completion("Yes.", [place("Yes", math.log(0.5), *top), place(".", -0.5)])
    [reply] = RemoteChat("judge", url)([ask("?")], max_tokens=2, top_logprobs=20)
    assert endpoint.bodies[0]["logprobs"] is True and endpoint.bodies[0]["top_logprobs"] == 20
    assert reply.text == "Yes." and reply.error is None
    assert [token.text for token in reply.tokens] == ["Yes", "."] and reply.tokens[1] == Token(".", -0.5)
    assert reply.tokens[0].top == pytest.approx({"Yes": math.log(0.75), "No": math.log(0.2)})


def test_tokens_are_given_even_where_a_model_leaves_no_text(endpoint, url):
    endpoint.answer = lambda body, n: completion(None, [place("Yes", -0.1, ("Yes", -0.1))])
    [reply] = RemoteChat("judge", url)([ask("?")], max_tokens=1, top_logprobs=5)
    assert reply == Reply("", (Token("Yes", -0.1, {"Yes": -0.1}),))


@pytest.mark.parametrize(
    "given, top_logprobs, says",
    [
        (Response("<html>proxy</html>"), 0, "not JSON: '<html>proxy</html>'"),
        ({}, 0, "no chat completion"),
        ({"choices": []}, 0, "no chat completion"),
        ([1, 2], 0, "no chat completion"),
        ({"choices": [{"message": None}]}, 0, "no chat completion"),
        (completion(None), 0, "got no text .finish_reason 'stop'."),
        (completion("Yes"), 20, "without log-probabilities"),
        (completion("Yes", [{"token": "Yes"}]), 20, "no chat completion .KeyError: 'logprob'."),
        (completion("Yes", [{"token": "Yes", "logprob": "much"}]), 20, "no chat completion .ValueError"),
    ],
)
def test_a_malformed_answer_is_an_error_in_its_reply_and_is_not_kept(
    endpoint, url, tmp_path, given, top_logprobs, says
):
    endpoint.answer = lambda body, n: (
        given if body["messages"][0]["content"] == "bad" else completion("x", [place("x", 0)])
    )
    chat = RemoteChat("judge", url, cache=tmp_path)
    for count in (2, 3):
        replies = chat([ask("bad"), ask("good")], max_tokens=1, top_logprobs=top_logprobs)
        assert replies[1].text == "x" and replies[1].error is None
        with pytest.raises(AssertionError, match=says):
            assert replies[0].error is None, replies[0].error
        assert len(endpoint.bodies) == count  # tried once each time; the good one is kept


# Many at a time


def test_replies_are_in_order_and_requests_bounded_over_all_threads(endpoint, url):
    endpoint.delay = lambda body, n: 0.02 * (5 - n % 5)
    chat, results = RemoteChat("judge", url, concurrency=4), {}

    def work(name):
        results[name] = chat([ask(f"{name} {k}") for k in range(10)], max_tokens=1)

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in "ab":
        assert [reply.text for reply in results[name]] == [f"answer to {name} {k}" for k in range(10)]
    assert endpoint.busiest == 4


def test_a_closed_chat_opens_again(endpoint, url):
    chat = RemoteChat("judge", url)
    before = threading.active_count()
    chat([ask("?")], max_tokens=1)
    assert any(thread.name == "chat judge" for thread in threading.enumerate())
    chat.close()
    chat.close()
    assert not any(thread.name == "chat judge" for thread in threading.enumerate())
    assert chat([ask("?")], max_tokens=1)[0].error is None and threading.active_count() >= before
    chat.close()


# What goes wrong


def test_busy_servers_are_asked_again_after_pauses_that_double(endpoint, url):
    statuses = [503, 429, 500]
    endpoint.answer = lambda body, n: (
        JSONResponse({"error": "busy"}, statuses[n]) if n < len(statuses) else completion("done")
    )
    [reply] = RemoteChat("judge", url, backoff=0.2)([ask("?")], max_tokens=1)
    assert reply.text == "done" and reply.error is None
    pauses = np.diff(endpoint.times)
    for pause, least in zip(pauses, (0.2, 0.4, 0.8)):
        assert least <= pause + 0.01 and pause < 2 * least + 2  # slow machines
    assert len(pauses) == 3


def test_retries_end_and_the_reply_says_why(endpoint, url):
    endpoint.answer = lambda body, n: JSONResponse({"error": "overloaded"}, 503)
    [reply] = RemoteChat("judge", url, retries=2, backoff=0.01)([ask("?")], max_tokens=1)
    assert len(endpoint.bodies) == 3 and reply.text == "" and "overloaded" in reply.error and "HTTP 503" in reply.error


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_a_refused_request_is_not_repeated(endpoint, url, status):
    endpoint.answer = lambda body, n: JSONResponse({"error": "no such model"}, status)
    [reply] = RemoteChat("judge", url)([ask("?")], max_tokens=1)
    assert len(endpoint.bodies) == 1 and f"HTTP {status}" in reply.error and "no such model" in reply.error


def test_a_slow_answer_is_given_up_and_asked_for_again(endpoint, url):
    endpoint.delay = lambda body, n: 30.0 if n == 0 else 0.0
    started = time.monotonic()
    [reply] = RemoteChat("judge", url, timeout=1.0, backoff=0.01)([ask("?")], max_tokens=1)
    assert reply.error is None and len(endpoint.bodies) == 2 and time.monotonic() - started < 20
    endpoint.delay = lambda body, n: 30.0
    [reply] = RemoteChat("judge", url, timeout=0.2, retries=0)([ask("?")], max_tokens=1)
    assert "no answer within 0.2 s" in reply.error


def test_an_endpoint_restarted_in_the_middle_costs_no_answer(endpoint):
    endpoint.delay = lambda body, n: 60.0 if n < 2 else 0.0  # the first two are under way when it is killed
    first, results = LiveServer(endpoint.app), {}
    with first:
        chat = RemoteChat("judge", first.url, backoff=0.1, retries=9)
        questions = [ask(str(k)) for k in range(4)]
        thread = threading.Thread(target=lambda: results.update(all=chat(questions, max_tokens=1)))
        thread.start()
        while len(endpoint.bodies) < 4:
            time.sleep(0.01)
        first.stop(brutally=True)
    time.sleep(0.3)
    with LiveServer(endpoint.app, first.port):
        thread.join(60)
    assert [reply.text for reply in results["all"]] == [f"answer to {k}" for k in range(4)]


def test_an_endpoint_that_is_not_there_is_an_error_in_every_reply():
    chat = RemoteChat("judge", f"http://127.0.0.1:{free_port()}", retries=1, backoff=0.01)
    replies = chat([ask("a"), ask("b")], max_tokens=1)
    assert all(reply.text == "" and "ConnectError" in reply.error for reply in replies)


def test_what_is_no_picture_is_an_error_at_once(endpoint, url):
    with pytest.raises(ValueError, match=r"images: got shape \(1, 1, 8, 8\).*greyscale"):
        RemoteChat("judge", url)([ask("?", torch.zeros(1, 8, 8))], max_tokens=1)
    assert not endpoint.bodies


# What is kept


def test_a_question_is_asked_once_and_again_if_anything_in_it_changes(endpoint, url, tmp_path):
    endpoint.answer = lambda body, n: Response(
        json.dumps(completion(f"answer {n}", [place("Yes", -0.25, ("Yes", -0.25), ("No", -1e400))]))
    )
    turns, options = ask("Is it red?", PICTURE), dict(max_tokens=1, top_logprobs=2)
    [first] = RemoteChat("judge", url, cache=tmp_path)([turns], **options)
    [again] = RemoteChat("judge", url, cache=tmp_path)([turns], **options)  # another one, as after a restart
    assert again == first and first.tokens[0].top == {"Yes": -0.25, "No": -math.inf} and len(endpoint.bodies) == 1
    other = PICTURE.clone()
    other[2, 7, 11] = 1 - other[2, 7, 11]
    changes = [
        ("judge", {}, ask("Is it red?", other), options),
        ("judge", {}, ask("Is it blue?", PICTURE), options),
        ("judge", {}, ask("Is it red?", PICTURE.transpose(1, 2)), options),
        ("judge", {}, [Message("system", ("Is it red?", PICTURE))], options),
        ("judge", {}, [Message("user", ("Is it", " red?", PICTURE))], options),
        ("judge", {}, turns, options | {"max_tokens": 2}),
        ("judge", {}, turns, options | {"seed": 1}),
        ("judge", {"picture_format": "jpeg"}, turns, options),
        ("judge", {"extra_body": {"top_k": 1}}, turns, options),
        ("jury", {}, turns, options),
    ]
    for n, (model, chat_options, conversation, call_options) in enumerate(changes, start=1):
        [reply] = RemoteChat(model, url, cache=tmp_path, **chat_options)([conversation], **call_options)
        assert reply.text == f"answer {n}"


def test_draws_without_a_seed_are_not_kept_and_those_with_one_are(endpoint, url, tmp_path):
    chat = RemoteChat("judge", url, cache=tmp_path)
    for _ in range(2):
        chat([ask("?")], max_tokens=1, temperature=1.0)
    assert len(endpoint.bodies) == 2
    for _ in range(2):
        chat([ask("?")], max_tokens=1, temperature=1.0, seed=0)
    assert len(endpoint.bodies) == 3


def test_a_failure_is_asked_for_again_and_then_kept(endpoint, url, tmp_path):
    endpoint.answer = lambda body, n: JSONResponse({}, 503) if n == 0 else completion("well")
    chat = RemoteChat("judge", url, retries=0, cache=tmp_path)
    assert [chat([ask("?")], max_tokens=1)[0].text for _ in range(3)] == ["", "well", "well"]
    assert len(endpoint.bodies) == 2


def _write(folder, value):
    cache = DiskCache(folder)
    for _ in range(50):
        cache.put("abcdef", {"value": value * 2000})
        seen = cache.get("abcdef")
        assert seen is not None and len(set(seen["value"])) == 1, "a torn file"


def test_processes_that_write_the_same_key_never_see_half_a_file(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_write, args=(tmp_path, letter)) for letter in "abc"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert [path.name for path in tmp_path.rglob("*.*")] == ["cdef.json"]  # nothing temporary is left


def test_a_spoilt_file_counts_as_missing(tmp_path):
    cache = DiskCache(tmp_path)
    cache.put("abcdef", 1)
    (tmp_path / "ab" / "cdef.json").write_text('{"text": "Y')
    assert cache.get("abcdef") is None and cache.get("000000") is None


# Given texts


def prompt_logprobs(*tokens):
    """As vLLM gives them: nothing for the first token, then one entry by token id each."""
    entries = [{str(100 + n): {"logprob": p, "rank": 3, "decoded_token": t}} for n, (t, p) in enumerate(tokens)]
    return [None, *entries]


def forced_answer(*tokens):
    template = [("<image>", -9.0), ("assistant", -8.0), ("\n", -7.0)]
    return completion("!", prompt_logprobs=prompt_logprobs(*template, *tokens))


def test_a_given_text_is_scored_by_its_own_tokens(endpoint, url):
    endpoint.answer = lambda body, n: forced_answer(("A", -1.0), (" red", -2.0), (" circle", -0.5))
    [reply] = RemoteChat("judge", url).score_texts([ask("Describe.", PICTURE)], ["A red circle"])
    assert reply.error is None and reply.tokens == (Token("A", -1.0), Token(" red", -2.0), Token(" circle", -0.5))
    body = endpoint.bodies[0]
    assert body["messages"][-1] == {"role": "assistant", "content": "A red circle"} and body["max_tokens"] == 1
    assert body["continue_final_message"] is True and body["add_generation_prompt"] is False
    assert body["prompt_logprobs"] == 0


@pytest.mark.parametrize(
    "text, tokens",
    [
        ("caf\u00e9 noir", [("caf", -1.0), ("\ufffd", -2.0), ("\ufffd", -0.1), (" noir", -3.0)]),
        ("\u00e9t\u00e9", [("\ufffd", -1.0), ("\ufffd", -2.0), ("t", -0.1), ("\ufffd\ufffd", -3.0)]),
        ("\u7ea2\U0001f600", [("\u7ea2", -1.0), *[("\ufffd", -2.0)] * 4]),
        ("\u7ea2\u8272\u5706", [("\u7ea2", -1.0), ("\u8272", -2.0), ("\ufffd", -0.1), ("\ufffd", -3.0)]),
        ("red circle", [("red", -1.0), ("circle", -2.0)]),  # spelt without spaces, as SentencePiece pieces alone are
        ("assistant", [("assistant", -1.0)]),
    ],
)
def test_the_tokens_of_a_text_are_found_whatever_they_split(endpoint, url, text, tokens):
    endpoint.answer = lambda body, n: forced_answer(*tokens)
    [reply] = RemoteChat("judge", url).score_texts([ask("?")], [text])
    assert reply.error is None and [(token.text, token.log_prob) for token in reply.tokens] == tokens


@pytest.mark.parametrize(
    "answer, says",
    [
        (completion("!"), "without prompt_logprobs"),
        (forced_answer(("A", -1.0), (" blue", -1.0)), "expected them to end in 'Ared'"),
        (forced_answer(("A", -1.0), (" red", -1.0), ("<eos>", -1.0)), "expected them to end in 'Ared'"),
        (completion("!", prompt_logprobs=[None, {"7": {"rank": 1}}]), "cannot be read"),
        (completion("!", prompt_logprobs=prompt_logprobs(("A", -1.0), (" red", -1e400))), "not finite"),
    ],
)
def test_a_text_whose_tokens_are_not_found_is_an_error(endpoint, url, tmp_path, answer, says):
    endpoint.answer = lambda body, n: Response(json.dumps(answer))
    chat = RemoteChat("judge", url, cache=tmp_path)
    for count in (1, 2):
        [reply] = chat.score_texts([ask("?")], ["A red"])
        assert says in reply.error and not reply.tokens and len(endpoint.bodies) == count


def test_texts_must_be_as_many_as_the_conversations_and_not_empty(url):
    chat = RemoteChat("judge", url)
    with pytest.raises(ValueError, match="texts: got 1, expected 2"):
        chat.score_texts([ask("?"), ask("!")], ["A"])
    with pytest.raises(ValueError, match="texts: got an empty one"):
        chat.score_texts([ask("?")], [" "])


# Options


@pytest.mark.parametrize(
    "options, says",
    [
        ({"concurrency": 0}, "concurrency: got 0, expected >= 1"),
        ({"retries": -1}, "retries: got -1, expected >= 0"),
        ({"timeout": 0}, "timeout: got 0, expected > 0 seconds"),
        ({"backoff": -1}, "backoff: got -1"),
        ({"picture_format": "webp"}, "picture_format: got 'webp', expected one of"),
        ({"key_variable": "TEST_NO_SUCH_KEY"}, "key_variable: got 'TEST_NO_SUCH_KEY', which is not set"),
        ({"url": "localhost:8000"}, "url: got 'localhost:8000', expected 'http://host:port'"),
        ({"url": "http://me:pass@host"}, "without query or password"),
    ],
)
def test_unusable_options_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        RemoteChat("judge", **{"url": "http://127.0.0.1:1", **options})


def test_urls():
    assert checked_url("http://host:8000/", "/v1") == "http://host:8000/v1"
    assert checked_url("https://host/api/v2/", "/v1") == "https://host/api/v2"
    assert is_loopback("http://127.0.0.1:8000/v1") and is_loopback("localhost") and is_loopback("::1")
    assert not any(is_loopback(host) for host in ("0.0.0.0", "localhost.example", "http://10.0.0.1", "::"))
