"""The server of rewards and its client, over a real connection: same scores, limits, batching, coming and going."""

import asyncio
import base64
import contextlib
import io
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings

import httpx
import numpy as np
import pytest
import torch
from live_server import LiveServer, free_port
from PIL import Image
from tiny_clip import save_tiny_clip

from visalign.commands.cli import main
from visalign.images import images_to_numpy
from visalign.rewards import (
    CombinedReward,
    Member,
    RewardError,
    RewardOutput,
    as_reward,
    make_reward,
    parse_spec,
    score,
)
from visalign.rewards.remote import RemoteReward
from visalign.rewards.urls import warn_of_open_token
from visalign.serving.batcher import Batcher
from visalign.serving.server import Limits, describe, make_app, open_socket
from visalign.serving.wire import (
    npy_to_tensor,
    pack,
    read_output,
    read_request,
    tensor_to_npy,
    unpack,
    write_output,
)
from visalign.training.loop.scoring import AsyncScorer

IMAGES = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
PROMPTS = [f"prompt {n}" for n in range(6)]


def brightness(images, prompts):
    return images.flatten(1).mean(1)


class Recorder:
    """Scores brightness, and remembers what it was called with."""

    name, differentiable, kind, range, needs = "recorder", True, "pointwise", (0.0, math.inf), ("prompts",)

    def __init__(self, kind: str = "pointwise", pause: float = 0.0) -> None:
        self.kind, self.pause, self.calls = kind, pause, []

    def __call__(self, images, prompts, context=None):
        self.calls.append((images, list(prompts), context))
        time.sleep(self.pause)
        if "bad" in prompts:
            raise RuntimeError("a bad prompt")
        return images.flatten(1).mean(1)


def serving(reward, spec="test", token=None, port=0, **limits) -> LiveServer:
    return LiveServer(make_app(as_reward(reward), spec, token, Limits(**limits)), port)


def png(image: torch.Tensor) -> str:
    buffer = io.BytesIO()
    Image.fromarray(images_to_numpy(image[None])[0]).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


# The same scores


def test_remote_scores_are_local_scores(tmp_path):
    local = make_reward("clip", model=str(save_tiny_clip(tmp_path)))
    with serving(local, "clip") as server:
        remote = make_reward(f"remote:{server.url}")
        assert (remote.name, remote.kind, remote.range, remote.needs) == ("clip", local.kind, local.range, local.needs)
        assert remote.differentiable is False
        here, there = (score(reward, IMAGES, PROMPTS).total for reward in (local, remote))
        torch.testing.assert_close(there, here, atol=1e-6, rtol=0)
        half = make_reward(f"remote:{server.url}:0.5+jpeg_compressibility:0.1")
        expected = 0.5 * here + 0.1 * score(make_reward("jpeg_compressibility"), IMAGES, PROMPTS).total
        torch.testing.assert_close(score(half, IMAGES, PROMPTS).total, expected, atol=1e-6, rtol=1e-6)
        rounded = RemoteReward(server.url, pixels="uint8")
        eight_bits = (IMAGES * 255).round() / 255
        torch.testing.assert_close(
            score(rounded, IMAGES, PROMPTS).total, score(local, eight_bits, PROMPTS).total, atol=1e-6, rtol=0
        )


def test_pictures_prompts_and_context_arrive_unchanged():
    recorder, videos = Recorder("groupwise"), torch.rand(2, 3, 3, 4, 4)
    recorder.media, recorder.needs = "both", ("prompts", "references", "mask")
    context = {
        "references": [[IMAGES[0], IMAGES[1, :, :4]], []],
        "metadata": [{"include": [{"class": "cat", "count": 2}], "x": None}, {"\u00fc": True}],
        "group_ids": torch.tensor([3, 3]),
        "fps": 8.0,
        "mask": np.array([[True], [False]]),
    }
    prompts = ["two\nlines, \u201cquotes\u201d, \U0001f600", " " * 3]
    with serving(recorder) as server:
        score(RemoteReward(server.url), videos, prompts, context)
    [(images, given, arrived)] = recorder.calls
    assert torch.equal(images, videos) and given == prompts
    assert arrived["metadata"] == context["metadata"] and arrived["fps"] == 8.0
    assert torch.equal(arrived["group_ids"], context["group_ids"]) and arrived["group_ids"].dtype == torch.int64
    assert [len(pictures) for pictures in arrived["references"]] == [2, 0]
    assert torch.equal(arrived["references"][0][1], IMAGES[1, :, :4])
    assert arrived["mask"].dtype == torch.bool and arrived["mask"].tolist() == [[True], [False]]


def test_everything_in_an_output_comes_back():
    output = RewardOutput(
        torch.tensor([0.1, math.nan, 1e-30]),
        {"colour": torch.tensor([1 / 3, math.nan, math.inf])},
        ["because", None, "\u00e9"],
        torch.tensor([True, False, True]),
        torch.tensor([0.0, math.nan, 2.5]),
        {"left": "behind"},
    )
    reward = Recorder()
    reward.__class__ = type("Full", (Recorder,), {"__call__": lambda self, images, prompts, context=None: output})
    with serving(reward) as server:
        there = score(RemoteReward(server.url), IMAGES[:3], PROMPTS[:3])
    here = score(reward, IMAGES[:3], PROMPTS[:3])
    torch.testing.assert_close(there.total, here.total, atol=0, rtol=0)
    one, other = there.outputs["recorder"], here.outputs["recorder"]
    assert one.rationale == other.rationale and torch.equal(one.is_valid, other.is_valid) and not one.extra
    torch.testing.assert_close(one.criteria["colour"], other.criteria["colour"], atol=0, rtol=0, equal_nan=True)
    torch.testing.assert_close(one.uncertainty, other.uncertainty, atol=0, rtol=0, equal_nan=True)


def test_a_weighted_sum_is_served_with_its_parts():
    reward = CombinedReward([Member("a", 0.5, as_reward(brightness)), Member("b", -1.0, as_reward(brightness))])
    with serving(reward) as server:
        result = score(RemoteReward(server.url), IMAGES, PROMPTS)
    torch.testing.assert_close(result.total, -0.5 * brightness(IMAGES, PROMPTS))
    assert set(next(iter(result.outputs.values())).criteria) >= {"a", "b"}


def test_what_a_member_of_a_sum_could_not_score_is_served_as_unscored():
    def flawed(images):
        values = images.mean(dim=(1, 2, 3))
        return RewardOutput(
            values, valid=values != values[1], rationale=[None, "too plain", *[None] * (len(values) - 2)]
        )

    members = [Member("flawed", 1.0, as_reward(flawed)), Member("b", 1.0, as_reward(brightness))]
    with serving(CombinedReward(members)) as server:
        result = score(RemoteReward(server.url), IMAGES, PROMPTS)
    assert result.valid.tolist() == [n != 1 for n in range(len(IMAGES))]


def test_scoring_by_hand_with_json_and_multipart():
    eight_bits, expected = IMAGES[:2], (IMAGES[:2] * 255).round().div(255).flatten(1).mean(1).tolist()
    with serving(brightness) as server:
        request = {"images": [{"$data": png(image)} for image in eight_bits], "prompts": ["a", "b"]}
        assert httpx.post(f"{server.url}/score", json=request).json()["scores"] == pytest.approx(expected, abs=1e-6)
        npy = base64.b64encode(tensor_to_npy(IMAGES[:2])).decode()
        answer = httpx.post(f"{server.url}/score", json={"images": {"$data": npy}, "prompts": ["a", "b"]}).json()
        assert answer["scores"] == pytest.approx(brightness(IMAGES[:2], None).tolist(), abs=1e-6)
        document = json.dumps({"images": [{"$part": "x"}, {"$part": "y"}], "prompts": ["a", "b"]})
        files = {name: base64.b64decode(png(image)) for name, image in zip("xy", eight_bits)}
        answer = httpx.post(f"{server.url}/score", data={"request": document}, files=files).json()
        assert answer["scores"] == pytest.approx(expected, abs=1e-6)
        description = httpx.get(f"{server.url}/description").json()
        assert description["name"] == "brightness" and description["range"] == ["-inf", "inf"]


# What is refused


@pytest.mark.parametrize(
    "request_, status, says",
    [
        (b"{", 400, "request: got no JSON"),
        ({"images": []}, 400, "expected 'images', 'prompts'"),
        ({"images": [], "prompts": [], "weights": 1}, 400, "expected 'images', 'prompts'"),
        ({"images": [], "prompts": []}, 400, "images: got list"),
        ({"images": "x", "prompts": []}, 400, "images: got str"),
        ({"images": {"$data": "%%%"}, "prompts": []}, 400, "$data: got no base64 text"),
        ({"images": {"$data": 7}, "prompts": []}, 400, "$data: got no base64 text"),
        ({"images": {"$data": "aGVsbG8="}, "prompts": []}, 400, "no readable .npy, PNG or JPEG file"),
        ({"images": {"$part": "t9"}, "prompts": []}, 400, "part: got 't9', expected one of []"),
        ({"images": [{"$data": png(IMAGES[0])}, {"$data": png(IMAGES[0, :, :8])}], "prompts": []}, 400, "of shapes"),
        ({"images": [{"$data": png(IMAGES[0])}], "prompts": []}, 400, "prompts: got 0, expected 1"),
        ({"images": [{"$data": png(IMAGES[0])}], "prompts": "x"}, 400, "prompts: got str"),
        ({"images": [{"$data": png(IMAGES[0])}], "prompts": [3]}, 400, "other things than strings"),
        ({"images": [{"$data": png(IMAGES[0])}], "prompts": ["x"], "context": []}, 400, "context: got list"),
        ({"images": [{"$data": png(IMAGES[0])}] * 9, "prompts": ["x"] * 9}, 413, "images: got 9, expected <= 8"),
        (b"x" * 100_001, 413, "request: got more than 100000 bytes"),
    ],
)
def test_requests_that_cannot_be_used_are_refused_with_the_reason(request_, status, says):
    with serving(brightness, max_bytes=100_000, max_images=8) as server:
        body = request_ if isinstance(request_, bytes) else json.dumps(request_).encode()
        response = httpx.post(f"{server.url}/score", content=body, timeout=60)
        assert response.status_code == status and says in response.json()["error"]
        assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}


def test_a_request_that_grows_too_large_is_refused_though_it_announced_nothing():
    with serving(brightness, max_bytes=100_000) as server:
        chunks = (b"x" * 10_000 for _ in range(50))
        with contextlib.suppress(httpx.TransportError):  # refused before all was sent
            assert httpx.post(f"{server.url}/score", content=chunks, timeout=60).status_code == 413
        assert score(RemoteReward(server.url), IMAGES[:1], ["x"]).total.isfinite().all()


def test_a_npy_file_can_neither_run_code_nor_claim_memory_it_does_not_fill():
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="npy: got object"):
        npy_to_tensor(buffer.getvalue())
    claim = b"(10000000000,), }"
    huge = tensor_to_npy(torch.zeros(10)).replace(b"(10,), }".ljust(len(claim)), claim, 1)
    assert claim in huge
    with pytest.raises(ValueError, match="npy: got .* bytes of data, expected"):
        npy_to_tensor(huge)
    with pytest.raises(ValueError, match="npy: got no readable"):
        npy_to_tensor(b"\x93NUMPY")
    with pytest.raises(ValueError, match="npy: got 36 bytes of data, expected 40"):
        npy_to_tensor(tensor_to_npy(torch.zeros(10))[:-4])


def test_tensors_of_every_kind_survive_the_way():
    for dtype in (torch.float16, torch.float32, torch.float64, torch.uint8, torch.int32, torch.int64, torch.bool):
        tensor = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype)
        for given in (tensor, tensor.T, tensor[:, :0], tensor[0, 1]):
            back = npy_to_tensor(tensor_to_npy(given))
            assert back.dtype == dtype and torch.equal(back, given)
    assert npy_to_tensor(tensor_to_npy(torch.ones(2, dtype=torch.bfloat16))).dtype == torch.float32
    parts = {}
    packed = pack({"a": [1, {"b": torch.arange(3)}], "c": (None, "x")}, parts)
    back = unpack(json.loads(json.dumps(packed)), parts)
    assert back["a"][1]["b"].tolist() == [0, 1, 2] and back["c"] == [None, "x"]


@pytest.mark.parametrize(
    "context, says",
    [
        ({"judge": object()}, "context.judge: got object, which cannot be sent"),
        ({"metadata": [{3: "x"}]}, r"context.metadata\[0\]: got the key 3"),
        ({"metadata": [{"$part": "x"}]}, r"context.metadata\[0\]: got the key '\$part'"),
    ],
)
def test_a_context_that_cannot_be_sent_is_an_error_here(context, says):
    with serving(brightness) as server, pytest.raises(RewardError, match=says):
        score(RemoteReward(server.url), IMAGES[:1], ["x"], context)


def test_a_server_with_a_token_wants_it_for_all_but_its_health(monkeypatch):
    monkeypatch.delenv("VISALIGN_TOKEN", raising=False)
    with serving(brightness, token="s3cret") as server:
        assert httpx.get(f"{server.url}/health").status_code == 200
        for path, method in (("/description", "GET"), ("/score", "POST")):
            for headers in ({}, {"authorization": "Bearer other"}, {"authorization": "s3cret"}):
                answer = httpx.request(method, server.url + path, headers=headers)
                assert answer.status_code == 401 and "wants its token" in answer.json()["error"]
        with pytest.raises(RewardError, match="wants its token: set the environment variable VISALIGN_TOKEN"):
            RemoteReward(server.url)
        monkeypatch.setenv("VISALIGN_TOKEN", "s3cret")
        assert score(RemoteReward(server.url), IMAGES, PROMPTS).total.shape == (6,)


def test_other_machines_are_only_let_in_with_a_token(monkeypatch, capsys):
    with pytest.raises(ValueError, match="token: got none with host '0.0.0.0', expected one"):
        open_socket("0.0.0.0", 0, None)
    with open_socket("127.0.0.1", 0, None) as taken, pytest.raises(ValueError, match="port: could not listen at"):
        open_socket("127.0.0.1", taken.getsockname()[1], None)
    monkeypatch.delenv("VISALIGN_TOKEN", raising=False)
    for arguments, says in [
        (["--host", "0.0.0.0", "--reward", "gold", "--port", "0"], "token: got none"),
        (["--reward", "golf"], "did you mean 'gold'"),
        (["--reward", "gold", "--option", "strict"], "option: got 'strict', expected NAME=VALUE"),
        (["--reward", "gold", "--option", "strikt=true"], "did you mean 'strict'"),
    ]:
        with pytest.raises(SystemExit):
            main(["serve", *arguments])
        assert says in capsys.readouterr().err


# Batching and limits


def test_requests_that_come_together_are_scored_together():
    recorder = Recorder(pause=0.05)
    with serving(recorder, linger=0.1, max_batch=8) as server:
        remote, results = RemoteReward(server.url), {}

        def ask(n):
            results[n] = score(remote, IMAGES[n % 6][None], [f"{n}"]).total

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(float(results[n]) == pytest.approx(float(IMAGES[n % 6].mean()), abs=1e-6) for n in range(24))
    sizes = [len(prompts) for _, prompts, _ in recorder.calls]
    assert sum(sizes) == 24 and max(sizes) <= 8 and len(sizes) < 12, sizes


def test_a_request_that_fails_does_not_spoil_those_it_came_with():
    recorder = Recorder()
    with serving(recorder, linger=0.5, max_batch=64) as server:
        remote, results = RemoteReward(server.url), {}

        def ask(n):
            try:
                results[n] = remote(IMAGES[n][None], ["bad" if n == 2 else "good"]).scores
            except RewardError as error:
                results[n] = error

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert max(len(prompts) for _, prompts, _ in recorder.calls) > 1
    assert isinstance(results[2], RewardError) and "a bad prompt" in str(results[2])
    assert all(float(results[n]) == pytest.approx(float(IMAGES[n].mean()), abs=1e-6) for n in (0, 1, 3))


@pytest.mark.parametrize("reward", [Recorder("groupwise"), Recorder()])
def test_groups_and_requests_with_a_context_are_never_mixed(reward):
    context = None if reward.kind == "groupwise" else {"fps": 1}
    with serving(reward, linger=0.2) as server:
        remote = RemoteReward(server.url)
        threads = [threading.Thread(target=remote, args=(IMAGES[n : n + 2], ["x", "y"], context)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [len(prompts) for _, prompts, _ in reward.calls] == [2] * 4


def test_a_request_with_a_context_does_not_join_one_without():
    recorder = Recorder()
    with serving(recorder, linger=1.0) as server:
        remote = RemoteReward(server.url)
        plain = threading.Thread(target=remote, args=(IMAGES[:2], ["plain"] * 2))
        plain.start()
        time.sleep(0.2)
        remote(IMAGES[2:4], ["special"] * 2, {"fps": 1})
        plain.join()
    assert [(prompts, context) for _, prompts, context in recorder.calls] == [
        (["plain"] * 2, None),
        (["special"] * 2, {"fps": 1}),
    ]


def test_a_batch_beyond_the_servers_limits_goes_in_parts_but_a_group_does_not():
    picture = IMAGES[0].numel() * 4
    recorder = Recorder()
    context = {"metadata": [{"n": n} for n in range(6)], "fps": 2}
    with serving(recorder, max_bytes=4 * picture, linger=0) as server:
        result = score(RemoteReward(server.url), IMAGES, PROMPTS, context)
    torch.testing.assert_close(result.total, brightness(IMAGES, PROMPTS))
    assert [prompts for _, prompts, _ in recorder.calls] == [PROMPTS[:3], PROMPTS[3:]]
    assert [c["metadata"][0] for _, _, c in recorder.calls] == [{"n": 0}, {"n": 3}]
    with serving(recorder, max_images=4) as server:
        assert score(RemoteReward(server.url), IMAGES, PROMPTS).total.shape == (6,)
    refused = pytest.raises(RewardError, match="HTTP 413: request: got more than")
    with serving(Recorder("groupwise"), max_bytes=4 * picture) as server, refused:
        score(RemoteReward(server.url), IMAGES, PROMPTS)


# Coming and going


def test_a_server_told_to_stop_first_answers_what_it_was_asked():
    recorder, results = Recorder(pause=1.0), []
    with serving(recorder) as server:
        remote = RemoteReward(server.url, wait=0)
        thread = threading.Thread(target=lambda: results.append(remote(IMAGES, PROMPTS).scores))
        thread.start()
        while not recorder.calls:
            time.sleep(0.01)
        server.stop()
        thread.join(60)
    torch.testing.assert_close(results[0], brightness(IMAGES, PROMPTS))


def test_a_client_waits_for_a_server_that_is_not_there_yet():
    port, made = free_port(), []
    thread = threading.Thread(target=lambda: made.append(RemoteReward(f"http://127.0.0.1:{port}", wait=60)))
    thread.start()
    time.sleep(0.5)
    with serving(brightness, port=port):
        thread.join(60)
        assert score(made[0], IMAGES, PROMPTS).total.shape == (6,)


def test_a_server_that_is_starting_behind_a_proxy_is_waited_for():
    app, refused = make_app(as_reward(brightness), "test"), []

    async def proxy(scope, receive, send):
        if scope["type"] != "http" or len(refused) == 2:
            return await app(scope, receive, send)
        refused.append(scope["path"])
        await send({"type": "http.response.start", "status": 503, "headers": []})
        await send({"type": "http.response.body", "body": b"starting"})

    with LiveServer(proxy) as server:
        assert score(RemoteReward(server.url, wait=60), IMAGES, PROMPTS).total.shape == (6,)
    assert len(refused) == 2


def test_a_server_gone_for_good_is_a_clear_error():
    server = serving(brightness)
    with server:
        remote = RemoteReward(server.url, wait=1.0)
    started = time.monotonic()
    with pytest.raises(
        RewardError, match=r"reward 'brightness': the server at .* not there for 1 seconds \(ConnectErr"
    ):
        score(remote, IMAGES, PROMPTS)
    assert 1.0 <= time.monotonic() - started < 20


def test_closing_the_client_ends_its_waiting():
    server = serving(brightness)
    with server:
        remote = RemoteReward(server.url, wait=600)
    timer = threading.Timer(0.3, remote.close)
    timer.start()
    with pytest.raises(RewardError, match="closed while waiting"):
        score(remote, IMAGES, PROMPTS)


def test_a_server_that_comes_back_with_another_reward_is_an_error():
    first = serving(brightness, "clip")
    with first:
        remote = RemoteReward(first.url)
    with serving(brightness, "aesthetic", port=first.port), pytest.raises(RewardError, match="now serves 'aesthetic'"):
        score(remote, IMAGES, PROMPTS)


def test_a_failing_reward_is_an_error_at_once_with_its_reason():
    recorder = Recorder()
    failure = pytest.raises(RewardError, match="HTTP 500: reward 'recorder'.*RuntimeError: a bad prompt")
    with serving(recorder) as server, failure:
        score(RemoteReward(server.url), IMAGES[:1], ["bad"], {"fps": 1})
    assert len(recorder.calls) == 1  # not tried again: it would fail again


def test_a_token_that_goes_to_another_machine_in_the_clear_is_warned_of():
    for url, sent, warned in (
        ("http://192.0.2.7:80", True, True),
        ("http://192.0.2.7:80", False, False),
        ("https://192.0.2.7:80", True, False),
        ("http://127.0.0.1:80", True, False),
    ):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            warn_of_open_token(url, sent)
        assert bool(said) == warned


def test_whatever_goes_wrong_within_a_batch_the_next_request_is_answered(monkeypatch):
    def broken(*_):
        raise MemoryError("no room for the batch")

    with serving(brightness, linger=0.2) as server:
        remote = RemoteReward(server.url, wait=0)
        with monkeypatch.context() as patch:
            patch.setattr(Batcher, "_score_all", broken)
            with pytest.raises(RewardError, match="the server failed: MemoryError: no room for the batch"):
                remote(IMAGES, PROMPTS)
        torch.testing.assert_close(remote(IMAGES, PROMPTS).scores, brightness(IMAGES, PROMPTS))
        assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}


def test_requests_that_cannot_be_joined_are_scored_by_themselves(monkeypatch):
    real, joined = torch.cat, []

    def cat(tensors, *more):
        if len(tensors) > 1 and tensors[0].ndim == 4:
            joined.append(len(tensors))
            raise RuntimeError("cannot join these")
        return real(tensors, *more)

    with serving(Recorder(pause=0.2), linger=0.2) as server:
        remote, results = RemoteReward(server.url, wait=0), {}
        monkeypatch.setattr("visalign.serving.batcher.torch.cat", cat)
        threads = [
            threading.Thread(target=lambda n=n: results.update({n: remote(IMAGES[n : n + 1], ["a"]).scores}))
            for n in range(4)
        ]
        [thread.start() for thread in threads]
        [thread.join(30) for thread in threads]
    assert joined and all(results[n].item() == pytest.approx(IMAGES[n].mean().item()) for n in range(4))


def test_a_server_whose_worker_has_ended_says_so():
    app = make_app(as_reward(brightness), "test")
    with LiveServer(app) as server:
        app.state.batcher._worker.cancel()
        time.sleep(0.2)
        answer = httpx.get(f"{server.url}/health")
    assert answer.status_code == 503 and "restart the server" in answer.json()["error"]


@pytest.mark.parametrize("busy", [429, 503])
def test_a_busy_server_is_asked_again_after_the_pause_it_wants(busy):
    times = []

    async def app(scope, receive, send):
        if scope["type"] != "http":
            return
        times.append(time.monotonic())
        body = json.dumps(describe(as_reward(brightness), "test", Limits())).encode()
        status, headers = (busy, [(b"retry-after", b"1")]) if len(times) == 1 else (200, [])
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    with LiveServer(app) as server:
        assert RemoteReward(server.url, wait=30).name == "brightness"
    assert len(times) == 2 and times[1] - times[0] >= 0.95


def test_an_answer_that_drips_in_ends_at_the_timeout():
    async def app(scope, receive, send):
        if scope["type"] != "http":
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(100):
            await send({"type": "http.response.body", "body": b" ", "more_body": True})
            await asyncio.sleep(0.1)
        await send({"type": "http.response.body", "body": b"{}"})

    started = time.monotonic()
    with LiveServer(app) as server, pytest.raises(RewardError, match="no whole answer within 1 seconds"):
        RemoteReward(server.url, wait=0, timeout=1.0)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"max_images": 0}, "max_bytes, max_images: got .* 0, expected >= 1"),
        ({"range": ["nan", "1"]}, "range: got"),
        ({"range": [1, 0]}, "range: got"),
        ({"kind": "odd"}, "kind 'odd'"),
    ],
)
def test_a_description_that_makes_no_sense_is_refused(change, says):
    async def app(scope, receive, send):
        if scope["type"] != "http":
            return
        body = json.dumps({**describe(as_reward(brightness), "test", Limits()), **change}).encode()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    with LiveServer(app) as server, pytest.raises(RewardError, match=says):
        RemoteReward(server.url, wait=0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rationale": 5}, "rationale: got '5'"),
        ({"rationale": [5]}, "rationale: got"),
        ({"scores": {"0": 1.0}}, "scores: got dict"),
        ({"criteria": {"a": 3}}, "a: got int"),
        ({"criteria": []}, "criteria: got list"),
        ({"valid": True}, "valid: got bool"),
    ],
)
def test_an_answer_with_a_field_of_another_kind_names_it(change, says):
    good = write_output(RewardOutput(torch.ones(2)))
    read_output(json.loads(json.dumps(good)))
    with pytest.raises(ValueError, match=says):
        read_output({**good, **change})


def with_data(data: bytes) -> str:
    return json.dumps({"images": {"$data": base64.b64encode(data).decode()}, "prompts": ["a"]})


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ('{"images": ' + "[" * 900 + "]" * 900 + ', "prompts": []}', "images|nested too deep"),
        ("[" * 200_000, "no JSON|nested"),
        (with_data(tensor_to_npy(torch.tensor(0.5))), "a single number"),
        (with_data(b"\x93NUMPY\x01\x00\x10\x00" + b"{" * 16), "npy"),
    ],
)
def test_odd_bodies_are_answered_in_json(body, says):
    with serving(brightness) as server:
        answer = httpx.post(f"{server.url}/score", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and re.search(says, answer.json()["error"])


def test_one_picture_named_many_times_is_counted_as_often():
    part = tensor_to_npy(torch.zeros(3, 512, 512))
    document = {"images": [{"$part": "x"}] * 900, "prompts": ["a"] * 900}
    with pytest.raises(ValueError, match="more than 268,435,456 values in all"):
        read_request(json.dumps(document).encode(), {"x": part})


def test_a_server_for_this_machine_alone_answers_to_its_own_names():
    app = make_app(as_reward(brightness), "test", hosts=["localhost", "127.0.0.1"])
    with LiveServer(app) as server:
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert httpx.get(f"{server.url}/health", headers={"host": "evil.example"}).status_code == 400


def test_a_body_that_does_not_arrive_is_given_up():
    with serving(brightness, read_seconds=0.3) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as open_:
            open_.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            open_.settimeout(10)
            assert b"408" in open_.recv(200)


def test_what_is_no_visalign_server_is_said_to_be_none():
    async def other(scope, receive, send):
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"<html>hello</html>"})

    with LiveServer(other) as server, pytest.raises(RewardError, match="expected a visalign server's answer"):
        RemoteReward(server.url)


@contextlib.contextmanager
def server_process(folder, port: int):
    """`visalign serve` in a process of its own."""
    command = [sys.executable, "-c", "from visalign.commands.cli import main; main()", "serve", "--port", str(port)]
    command += ["--reward", f"{folder / 'reward.py'}:brightness"]
    environment = {name: value for name, value in os.environ.items() if name != "VISALIGN_TOKEN"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        yield process
    finally:
        process.kill()
        process.wait(30)


def test_a_server_killed_and_restarted_in_mid_run_only_costs_time(world_files):
    port, totals = free_port(), []

    def run():
        for n in range(60):
            totals.append(score(remote, IMAGES[n % 6][None], ["x"]).total)
            time.sleep(0.01)

    thread = threading.Thread(target=run, daemon=True)
    with server_process(world_files, port) as server:
        remote = make_reward(f"remote:http://127.0.0.1:{port}", wait=240)
        assert server.stdout.readline().strip().endswith(f"reward.py:brightness at http://127.0.0.1:{port}")
        thread.start()
        while len(totals) < 5:
            time.sleep(0.01)
    assert len(totals) < 60  # killed
    with server_process(world_files, port) as server:
        thread.join(240)
        assert torch.cat(totals).tolist() == pytest.approx([float(IMAGES[n % 6].mean()) for n in range(60)], abs=1e-6)
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0  # a clean end


# Specs


@pytest.mark.parametrize(
    "spec, url, weight",
    [
        ("remote:http://host:8000", "http://host:8000", 1.0),
        ("remote:http://host:8000:0.5", "http://host:8000", 0.5),
        ("remote:http://host:8000:2", "http://host:8000", 2.0),
        ("remote:https://host/rewards/clip:0.25", "https://host/rewards/clip", 0.25),
        ("remote:http://host:0.5", "http://host", 0.5),
        ("remote:http://[::1]:80:-1", "http://[::1]:80", -1.0),
    ],
)
def test_a_remote_spec_is_a_url_and_perhaps_a_weight(spec, url, weight):
    [term] = parse_spec(spec)
    assert (term.name, term.options["url"], term.weight) == ("remote", url, weight)
    other, term = parse_spec(f"jpeg_compressibility:0.1 + {spec}", **{})
    assert (term.label, term.options["url"], term.weight, other.weight) == ("remote", url, weight, 0.1)


@pytest.mark.parametrize(
    "spec, options, says",
    [
        ("remote:host:8000", {}, "expected 'remote:http://host:port'"),
        ("remote:http://", {}, "expected 'remote:http://host:port'"),
        ("remote:http://host:8000:much", {}, "expected 'remote:http://host:port'"),
        ("remote", {}, "missing a required argument: 'url'"),
        ("remote:http://host:8000", {"pixels": "int8"}, "pixels: got 'int8', expected one of"),
        ("remote:http://host:8000", {"wait": -1}, "wait: got -1, expected >= 0"),
        ("remote:http://host:8000", {"timeout": 0}, "timeout: got 0, expected > 0"),
        ("remote:http://host:8000", {"wate": 1}, "did you mean 'wait'"),
    ],
)
def test_a_remote_spec_that_cannot_work_is_refused_without_asking_anybody(spec, options, says):
    with pytest.raises(ValueError, match=says):
        parse_spec(spec, **options)


# Scoring while sampling goes on


def scores_of(images, prompts, context=None):
    return score(brightness, images, prompts, context).total


def test_scores_are_those_of_a_direct_call_batch_by_batch():
    seen = []

    def counting(images, prompts, context):
        seen.append(prompts)
        return scores_of(images, prompts) + len(seen)  # depends on the order of the calls

    with AsyncScorer(counting, "counting", pending=2) as scorer:
        futures = [scorer.submit(IMAGES[n : n + 2], PROMPTS[n : n + 2]) for n in range(5)]
        results = [future.result() for future in futures]
    assert seen == [PROMPTS[n : n + 2] for n in range(5)]
    for n, result in enumerate(results):
        assert torch.equal(result, scores_of(IMAGES[n : n + 2], PROMPTS[n : n + 2]) + (n + 1))


def test_sampling_goes_on_while_a_batch_is_scored_until_too_many_wait():
    release, asked = threading.Event(), []

    def slow(images, prompts, context):
        asked.append((prompts, context, torch.is_grad_enabled(), torch.get_num_threads()))
        assert release.wait(60)
        return scores_of(images, prompts)

    with AsyncScorer(slow, "slow", pending=3) as scorer:
        futures = [scorer.submit(IMAGES[:2], PROMPTS[:2], {"fps": 1}) for _ in range(3)]
        assert not any(future.done() for future in futures)
        fourth = threading.Thread(target=lambda: futures.append(scorer.submit(IMAGES[:2], PROMPTS[:2])))
        fourth.start()
        fourth.join(0.3)
        assert fourth.is_alive() and len(futures) == 3  # no room
        release.set()
        fourth.join(60)
        assert all(torch.equal(future.result(60), scores_of(IMAGES[:2], PROMPTS[:2])) for future in futures)
    assert asked[0] == (PROMPTS[:2], {"fps": 1}, False, torch.get_num_threads()) and len(asked) == 4


def test_several_batches_are_under_way_with_several_threads():
    together = threading.Barrier(3, timeout=60)

    def meeting(images, prompts, context):
        together.wait()
        return scores_of(images, prompts)

    with AsyncScorer(meeting, "meeting", threads=3) as scorer:
        futures = [scorer.submit(IMAGES[n : n + 1], PROMPTS[n : n + 1]) for n in range(3)]
        assert torch.equal(torch.cat([future.result() for future in futures]), scores_of(IMAGES[:3], PROMPTS[:3]))


def test_a_failure_names_the_reward_in_its_future_and_at_the_next_batch():
    def failing(images, prompts, context):
        if "bad" in prompts:
            raise RuntimeError("out of memory")
        return scores_of(images, prompts)

    with AsyncScorer(failing, "aesthetic") as scorer:
        good, bad = scorer.submit(IMAGES[:1], ["good"]), scorer.submit(IMAGES[:1], ["bad"])
        assert good.result().shape == (1,)
        with pytest.raises(RewardError, match="reward 'aesthetic': raised RuntimeError: out of memory"):
            bad.result()
        for _ in range(9):  # more than there is room for: a refused batch takes none
            with pytest.raises(RewardError, match="reward 'aesthetic'"):
                scorer.submit(IMAGES[:1], ["good"])


def test_closing_drops_what_waits_and_ends_what_waits_for_a_server():
    server = serving(brightness)
    with server:
        remote = RemoteReward(server.url, wait=600)
    scorer = AsyncScorer(lambda i, p, c: score(remote, i, p).total, "remote", stop=remote.close)
    futures = [scorer.submit(IMAGES[:1], ["x"]) for _ in range(3)]
    time.sleep(0.2)
    scorer.close()
    scorer.close()
    with pytest.raises(RewardError, match="closed while waiting"):
        futures[0].result()
    assert futures[1].cancelled() and futures[2].cancelled()
    with pytest.raises(ValueError, match="after it was closed"):
        scorer.submit(IMAGES[:1], ["x"])
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("score remote")]


def test_what_an_output_holds_is_what_comes_back():
    output = RewardOutput(torch.tensor([1.5, -math.inf]), valid=None)
    back = read_output(json.loads(json.dumps(write_output(output))))
    assert back.scores.tolist() == [1.5, -math.inf] and back.valid is None and back.criteria == {}
