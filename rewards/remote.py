"""A reward that runs elsewhere, behind `visalign serve`."""

import json
import math
import os
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from visalign.images import check_images, check_videos, is_video

from .base import CONTEXT, KINDS, Context, RewardError, RewardOutput, check_prompts, register_reward
from .urls import checked_url, is_loopback, warn_of_open_token

PIXELS = ("float32", "uint8")
GONE = (429, 502, 503, 504)  # what stands before a server, or the server itself, says while it is away
LONGEST_PAUSE = 5.0  # seconds between attempts


@register_reward("remote")
class RemoteReward:
    """The reward that a visalign server at `url` gives; kind, range, needs and media are what the server says.

    Scores are those of the reward run here (to 1e-6, with exact pixels). No gradient. Calls may come from several
    threads; the server batches them. Samples of a pointwise reward are sent in as many requests as the server's limits
    ask for.

    Args:
        url: "http://host:port" of `visalign serve`.
        wait: seconds to go on trying while the server cannot be reached, from the first failure on; also at the start.
        timeout: seconds for one request. A server that needs longer counts as away.
        pixels: "float32" sends pictures exactly; "uint8" rounds them to 8 bits, for a quarter of the traffic.
        token_variable: the environment variable that holds the server's token, if it is set.

    Raises:
        RewardError: the server stayed away for `wait` seconds, refused, failed, or serves another reward than before.
    """

    name = "remote"  # these until the server has told
    differentiable = False
    remote = True  # somebody else's machine does the work: worth asking while something else goes on here
    media = "both"
    licence = "that of the served reward"

    def __init__(
        self,
        url: str,
        wait: float = 600.0,
        timeout: float = 600.0,
        pixels: str = "float32",
        token_variable: str = "VISALIGN_TOKEN",
    ) -> None:
        import httpx

        self.preflight({"url": url, "wait": wait, "timeout": timeout, "pixels": pixels})
        self.url, self.wait, self.timeout, self.pixels = checked_url(url), wait, timeout, pixels
        token = os.environ.get(token_variable)
        self._token_variable = token_variable
        warn_of_open_token(self.url, bool(token))
        self._closed = threading.Event()
        self._client = httpx.Client(
            headers={"authorization": f"Bearer {token}"} if token else {},
            timeout=httpx.Timeout(timeout, connect=min(timeout, 10.0)),
            limits=httpx.Limits(max_connections=None),
            trust_env=not is_loopback(self.url),  # no proxy between a machine and itself
        )
        info = self._request("GET", "/description")
        try:
            self.name, self.kind, self.media = (
                str(info["name"]),
                str(info["kind"]),
                str(info["media"]),
            )
            low, high = (float(end) for end in info["range"])
            self.range: tuple[float, float] = (low, high)
            if not low <= high:
                raise ValueError(f"range: got {info['range']}, expected two numbers, the lower first")
            self.needs = tuple(str(need) for need in info["needs"])
            self._spec, self._max_bytes, self._max_images = (
                info["spec"],
                int(info["max_bytes"]),
                int(info["max_images"]),
            )
            if min(self._max_bytes, self._max_images) < 1:
                raise ValueError(f"max_bytes, max_images: got {self._max_bytes}, {self._max_images}, expected >= 1")
        except (KeyError, TypeError, ValueError) as error:
            raise self._error(f"gave no description of a reward ({type(error).__name__}: {error})") from error
        if self.kind not in KINDS:
            raise self._error(f"serves a reward of kind {self.kind!r}, expected one of {KINDS}")

    @staticmethod
    def preflight(options: Mapping[str, Any]) -> None:
        """Raise ValueError for options that cannot work, without asking the server."""
        checked_url(options["url"])
        if options.get("pixels", "float32") not in PIXELS:
            raise ValueError(f"pixels: got {options['pixels']!r}, expected one of {PIXELS}")
        if not options.get("timeout", 1) > 0:
            raise ValueError(f"timeout: got {options['timeout']}, expected > 0 seconds")
        if not options.get("wait", 1) >= 0:
            raise ValueError(f"wait: got {options['wait']}, expected >= 0 seconds")

    def __call__(self, images: Tensor, prompts: Sequence[str], context: Context | None = None) -> RewardOutput:
        """images: (N, 3, H, W), or videos (N, F, 3, H, W), in [0, 1]. Returns (N,), float32 on the CPU."""
        (check_videos if is_video(images) else check_images)(images)
        check_prompts(images, prompts)
        size = self._chunk_size(images, context)
        outputs = []
        for start in range(0, len(images), size):
            rows = slice(start, start + size)
            part = context if size >= len(images) else {k: _rows(k, v, rows) for k, v in (context or {}).items()}
            outputs.append(self._score(images[rows], prompts[rows], part))
        return outputs[0] if len(outputs) == 1 else _join(outputs, [len(output.scores) for output in outputs])

    def close(self) -> None:
        """Stop waiting for the server: calls under way, in other threads, end with an error at their next attempt."""
        self._closed.set()

    def _chunk_size(self, images: Tensor, context: Context | None) -> int:
        """Samples to a request: all of them, where they depend on each other or on what cannot be shared out."""
        if self.kind != "pointwise" or any(name not in CONTEXT for name in context or {}):
            return len(images)
        sample = images[0].numel() * (1 if self.pixels == "uint8" else 4)
        references = (context or {}).get("references", ())
        sample += max((sum(p.numel() * p.element_size() for p in pictures) for pictures in references), default=0)
        return max(1, min(self._max_images, int(0.9 * self._max_bytes) // sample))

    def _score(self, images: Tensor, prompts: Sequence[str], context: Context | None) -> RewardOutput:
        from visalign.serving.wire import pack, read_output

        images = images.detach().float()
        if self.pixels == "uint8":
            images = (images * 255).round().clamp(0, 255).to(torch.uint8)
        parts: dict[str, bytes] = {}
        try:
            request: dict[str, Any] = {"images": pack(images, parts), "prompts": list(prompts)}
            if context:
                request["context"] = pack(context, parts, "context")
        except ValueError as error:
            raise self._error(str(error)) from error
        files = {"request": ("request", json.dumps(request).encode(), "application/json")}
        files |= {name: (name, data, "application/octet-stream") for name, data in parts.items()}
        answer = self._request("POST", "/score", files)
        if answer.get("spec") != self._spec:
            raise self._error(f"now serves {answer.get('spec')!r}, expected {self._spec!r}, as when the run began")
        try:
            return read_output(answer)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise self._error(f"gave an answer that cannot be read ({type(error).__name__}: {error})") from error

    def _request(self, method: str, path: str, files: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The server's answer, if need be after waiting for the server."""
        import httpx

        away_since, pause = None, 0.25
        while True:
            try:
                response = self._answer(method, path, files)
                problem = f"HTTP {response.status_code}"
                dying = response.status_code >= 500 and not _is_ours(response)  # of a server, or a proxy before it
                if response.status_code not in GONE and not dying:
                    return self._read(response)
                pause = max(pause, _asked_pause(response))
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
            away_since = away_since or time.monotonic()  # when it was first missed: scoring may have taken long
            left = self.wait - (time.monotonic() - away_since)
            if left <= 0 or self._closed.wait(min(pause, left)):
                why = "closed while waiting" if self._closed.is_set() else f"not there for {self.wait:g} seconds"
                raise self._error(f"{why} ({problem}); is `visalign serve` running there?")
            pause = min(2 * pause, LONGEST_PAUSE)

    def _answer(self, method: str, path: str, files: Mapping[str, Any] | None) -> Any:
        """A whole answer; the timeout is that of the whole, also where bytes go on dripping in."""
        import httpx

        deadline, chunks = time.monotonic() + self.timeout, []
        with self._client.stream(method, self.url + path, files=files) as response:
            for chunk in response.iter_bytes():
                chunks.append(chunk)
                if time.monotonic() > deadline:
                    raise httpx.ReadTimeout(f"no whole answer within {self.timeout:g} seconds")
        head = {k: v for k, v in response.headers.items() if k not in ("content-encoding", "content-length")}
        return httpx.Response(response.status_code, headers=head, content=b"".join(chunks))

    def _read(self, response: Any) -> dict[str, Any]:
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise self._error(f"HTTP {response.status_code}: got no JSON object, expected a visalign server's answer")
        if response.status_code == 401:
            raise self._error(f"wants its token: set the environment variable {self._token_variable}")
        if response.status_code != 200:
            raise self._error(f"HTTP {response.status_code}: {answer.get('error', answer)}")
        return answer

    def _error(self, problem: str) -> RewardError:
        return RewardError(self.name, f"the server at {self.url}: {problem}")


def _is_ours(response: Any) -> bool:
    """Whether an error was said by a visalign server: it says them all in JSON."""
    return "json" in response.headers.get("content-type", "")


def _asked_pause(response: Any) -> float:
    """Seconds that a busy server asks to wait for (Retry-After), at most a minute; 0 where it does not."""
    given = response.headers.get("retry-after", "")
    return min(float(given), 60.0) if given.isdecimal() else 0.0


def _rows(name: str, value: Any, rows: slice) -> Any:
    return value if name == "fps" else value[rows]


def _join(outputs: Sequence[RewardOutput], sizes: Sequence[int]) -> RewardOutput:
    """The outputs of parts of a batch as one; where only some have a field, the others say nothing in it."""
    nothing = [torch.full((size,), math.nan) for size in sizes]
    names = dict.fromkeys(name for output in outputs for name in output.criteria)
    reasons = [list(o.rationale or [None] * size) for o, size in zip(outputs, sizes)]
    doubts = [nothing[n] if o.uncertainty is None else o.uncertainty for n, o in enumerate(outputs)]
    return RewardOutput(
        torch.cat([output.scores for output in outputs]),
        {name: torch.cat([o.criteria.get(name, nothing[n]) for n, o in enumerate(outputs)]) for name in names},
        sum(reasons, []) if any(o.rationale is not None for o in outputs) else None,
        torch.cat([output.is_valid for output in outputs]),
        torch.cat(doubts) if any(o.uncertainty is not None for o in outputs) else None,
    )
