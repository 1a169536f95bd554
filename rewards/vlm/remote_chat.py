"""Asking a vision-language model that is served elsewhere (vLLM, SGLang, any OpenAI-compatible endpoint)."""

import asyncio
import contextlib
import json
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from visalign.rewards.urls import bearer, checked_url, is_loopback, warn_of_open_token

from .cache import DiskCache
from .chat import Message, Reply, Token
from .requests import (
    PICTURE_FORMATS,
    content_key,
    forcing_options,
    messages_payload,
    read_forced,
    read_reply,
    sampling_options,
)

LONGEST_PAUSE = 60.0  # seconds; back-off grows no further
PASSING = (408, 409, 425, 429)  # statuses, besides all of 5xx, after which the same request may succeed


class _PassingFailure(Exception):
    """What may go away by itself: no connection, no answer in time, a server that is busy or starting."""


class _FinalFailure(Exception):
    """What will not: a refused or meaningless request, an answer that is none."""


@dataclass(frozen=True)
class _Question:
    """One request to make: its content, the options, how its answer is read, and where that is kept."""

    conversation: Sequence[Message]
    options: Mapping[str, Any]
    read: Callable[[Any], Reply]
    key: str | None


class RemoteChat:
    """`Chat` with a model behind an OpenAI-compatible endpoint; see `Chat` for calling it.

    Requests go out together, at most `concurrency` at a time over all threads that call, from one event loop in a
    background thread. What may pass (no connection, no answer in time, HTTP 408, 409, 425, 429, 5xx) is tried again
    after backoff * 2^k seconds, k = 0, 1, ..., at most a minute apart; after `retries` of these, and at once for
    anything else, the Reply says what was wrong. A missing answer token is left to the caller: `Token.top` holds what
    the server gave (vLLM's limit is 20 unless started with a higher `--max-logprobs`).

    Args:
        model: as the server calls it.
        url: "http://host:port", "/v1" is added if there is no path; or with the path up to "/chat/completions".
        key_variable: the environment variable that holds the API key; None: no key is sent.
        concurrency: requests under way at a time.
        timeout: seconds for one attempt, from the first byte sent to the last received.
        picture_format: "png", exact, or "jpeg" of quality 95, smaller. Frames of videos are always JPEGs.
        cache: a folder of answers by content (model, words, pixels, options, but not the URL): give each served version
            of a model its own. Failures, and draws (temperature > 0) without a seed, are not kept.
        extra_body: further fields of each request, such as {"mm_processor_kwargs": {"max_pixels": 602112}}.

    Raises:
        ValueError: an unusable option, or pictures that are no pictures. Whatever else goes wrong is in the replies.
    """

    def __init__(
        self,
        model: str,
        url: str,
        key_variable: str | None = None,
        concurrency: int = 32,
        timeout: float = 120.0,
        retries: int = 6,
        backoff: float = 1.0,
        picture_format: str = "png",
        cache: str | Path | None = None,
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        for name, value, low in (("concurrency", concurrency, 1), ("retries", retries, 0), ("backoff", backoff, 0)):
            if value < low:
                raise ValueError(f"{name}: got {value}, expected >= {low}")
        if not timeout > 0:
            raise ValueError(f"timeout: got {timeout}, expected > 0 seconds")
        if picture_format not in PICTURE_FORMATS:
            raise ValueError(f"picture_format: got {picture_format!r}, expected one of {PICTURE_FORMATS}")
        self.name = model
        self.url = checked_url(url, default_path="/v1")
        self._headers = bearer(key_variable)
        warn_of_open_token(self.url, bool(self._headers))
        self.concurrency, self.timeout, self.retries, self.backoff = concurrency, timeout, retries, backoff
        self.picture_format, self.extra_body = picture_format, dict(extra_body or {})
        self._cache = None if cache is None else DiskCache(cache)
        self._lock = threading.Lock()
        self._connection: _Connection | None = None

    def __call__(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        top_logprobs: int = 0,
    ) -> list[Reply]:
        options = sampling_options(max_tokens, temperature, top_p, seed, top_logprobs)
        repeats = temperature == 0 or seed is not None
        return self._ask(conversations, options, [lambda a: read_reply(a, top_logprobs)] * len(conversations), repeats)

    def score_texts(self, conversations: Sequence[Sequence[Message]], texts: Sequence[str]) -> list[Reply]:
        """How likely the model is to answer each conversation with its text: a Reply whose tokens spell that text.

        Needs vLLM (`prompt_logprobs`, with the last turn continued). [R]: check it against your server's version. The
        end-of-turn token is not among the tokens. Where the tokens' spelling does not lead back to the text, the Reply
        has an error.
        """
        if len(texts) != len(conversations):
            raise ValueError(f"texts: got {len(texts)}, expected {len(conversations)}, one per conversation")
        if not all(text.strip() for text in texts):
            raise ValueError("texts: got an empty one, expected at least one token to score")
        forced = [[*turns, Message("assistant", (text,))] for turns, text in zip(conversations, texts)]
        readers = [lambda answer, text=text: read_forced(answer, text) for text in texts]
        return self._ask(forced, forcing_options(), readers, repeats=True)

    def close(self) -> None:
        """Drop the connections and the background thread. Another call opens them anew."""
        with self._lock:
            connection, self._connection = self._connection, None
        if connection is not None and connection.process == os.getpid():
            connection.close()

    def _ask(
        self,
        conversations: Sequence[Sequence[Message]],
        options: Mapping[str, Any],
        readers: Sequence[Callable[[Any], Reply]],
        repeats: bool,
    ) -> list[Reply]:
        options = {**options, **self.extra_body}
        replies: dict[int, Reply] = {}
        questions: dict[int, _Question] = {}
        for n, (conversation, read) in enumerate(zip(conversations, readers)):
            key, stored = None, None
            if self._cache is not None and repeats:
                key = content_key(self.name, conversation, {**options, "picture_format": self.picture_format})
                stored = self._cache.get(key)
            if stored is not None:
                replies[n] = Reply(stored["text"], tuple(Token(**token) for token in stored["tokens"]))
            else:
                questions[n] = _Question(conversation, options, read, key)
        if questions:
            connection = self._connected()
            answers = connection.run(self._answer_all(connection, list(questions.values())))
            replies.update(zip(questions, answers))
        return [replies[n] for n in range(len(conversations))]

    def _connected(self) -> "_Connection":
        with self._lock:
            if self._connection is None or self._connection.process != os.getpid():  # threads do not survive a fork
                self._connection = _Connection(self)
                weakref.finalize(self, self._connection.abandon)
            return self._connection

    async def _answer_all(self, connection: "_Connection", questions: Sequence[_Question]) -> list[Reply]:
        return list(await asyncio.gather(*(self._answer(connection, question) for question in questions)))

    async def _answer(self, connection: "_Connection", question: _Question) -> Reply:
        async with connection.slots:
            body = await asyncio.to_thread(self._body, question)
            try:
                reply = question.read(await self._post(connection, body))
            except (_PassingFailure, _FinalFailure, ValueError) as error:
                return Reply("", error=f"{self.name} at {self.url}: {error}")
        if self._cache is not None and question.key is not None:
            await asyncio.to_thread(self._cache.put, question.key, asdict(reply))
        return reply

    def _body(self, question: _Question) -> bytes:
        messages = messages_payload(question.conversation, self.picture_format)
        return json.dumps({"model": self.name, "messages": messages, **question.options}).encode()

    async def _post(self, connection: "_Connection", body: bytes) -> Any:
        from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_exponential

        retrying = AsyncRetrying(
            retry=retry_if_exception_type(_PassingFailure),
            stop=stop_after_attempt(self.retries + 1),
            wait=wait_exponential(multiplier=self.backoff, max=LONGEST_PAUSE),
            reraise=True,
        )
        return await retrying(self._post_once, connection, body)

    async def _post_once(self, connection: "_Connection", body: bytes) -> Any:
        import httpx

        try:
            async with asyncio.timeout(self.timeout):
                response = await connection.client.post(f"{self.url}/chat/completions", content=body)
        except TimeoutError:
            raise _PassingFailure(f"no answer within {self.timeout:g} s") from None
        except httpx.TransportError as error:
            raise _PassingFailure(f"{type(error).__name__}: {error}") from error
        if response.status_code != 200:
            passing = response.status_code in PASSING or response.status_code >= 500
            message = " ".join(response.text.split())[:300]
            raise (_PassingFailure if passing else _FinalFailure)(f"HTTP {response.status_code}: {message}")
        try:
            return response.json()
        except ValueError:
            raise _FinalFailure(f"got an answer that is not JSON: {response.text[:100]!r}") from None


class _Connection:
    """The event loop in its thread, and what belongs to it."""

    def __init__(self, chat: RemoteChat) -> None:
        import httpx

        self.process = os.getpid()
        self.slots = asyncio.Semaphore(chat.concurrency)
        self.client = httpx.AsyncClient(
            headers={"content-type": "application/json", **chat._headers},
            timeout=None,  # the whole attempt has one time limit
            limits=httpx.Limits(max_connections=chat.concurrency, max_keepalive_connections=chat.concurrency),
            trust_env=not is_loopback(chat.url),  # no proxy between a machine and itself
        )
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._work, name=f"chat {chat.name}", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        self.loop.run_forever()
        self.loop.close()

    def run(self, work: Any) -> Any:
        """The result of a coroutine; whoever is interrupted while waiting takes its requests back."""
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result()
        finally:
            future.cancel()

    def abandon(self) -> None:
        """Ask the thread to end, without waiting: the garbage collector calls this anywhere, with any lock held."""
        if self.process == os.getpid() and not self.loop.is_closed():
            with contextlib.suppress(RuntimeError):  # it has just ended by itself
                self.loop.call_soon_threadsafe(lambda: self.loop.create_task(self._end()))

    async def _end(self) -> None:
        await self.client.aclose()
        self.loop.stop()

    def close(self) -> None:
        """End the thread and wait for it."""
        self.abandon()
        if self.process == os.getpid() and threading.current_thread() is not self._thread:
            self._thread.join()
