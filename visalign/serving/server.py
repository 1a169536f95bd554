"""A server that scores pictures with one reward.

    GET  /health       {"status": "ok"}, without a token
    GET  /description  what the reward is (kind, range, needs, ...) and what the server takes
    POST /score        {"images": [...], "prompts": [...], "context": {...}} as JSON, or as multipart with that JSON in
                       a part called "request" and tensors in parts of their own; see `wire` for tensors

Errors are {"error": TEXT}: 400 for a request that cannot be used, 401 without the token, 413 for one that is too large,
500 where the reward failed, 503 while shutting down.
"""

import asyncio
import contextlib
import hmac
import math
import signal
import socket
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from visalign.rewards import Reward, RewardError
from visalign.rewards.urls import is_loopback

from .batcher import Batcher, Closing
from .wire import read_request, write_output


@dataclass(frozen=True)
class Limits:
    """What a server takes and how it batches."""

    max_bytes: int = 256 * 2**20  # of a request; 16 exact pictures of 1024 x 1024 are 200 MB
    max_images: int = 1024  # in a request
    max_batch: int = 64  # pictures from several requests scored together
    linger: float = 0.005  # seconds that a request waits for others
    read_seconds: float = 300.0  # for a request's body to arrive
    connections: int = 1000  # at a time; further ones are told to come back

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_images", "max_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected >= 1")
        if self.linger < 0:
            raise ValueError(f"linger: got {self.linger}, expected >= 0 seconds")


def describe(reward: Reward, spec: str, limits: Limits) -> dict[str, Any]:
    """What a client must know of the reward. Gradients do not travel, so it is never differentiable."""
    return {
        "spec": spec,
        "name": reward.name,
        "kind": reward.kind,
        "range": [end if math.isfinite(end) else str(end) for end in reward.range],
        "needs": list(reward.needs),
        "media": getattr(reward, "media", "images"),
        "differentiable": False,
        "licence": getattr(reward, "licence", None),
        "source": getattr(reward, "source", None),
        "max_bytes": limits.max_bytes,
        "max_images": limits.max_images,
        "visalign": version("visalign"),
    }


def make_app(
    reward: Reward,
    spec: str,
    token: str | None = None,
    limits: Limits | None = None,
    hosts: Sequence[str] | None = None,
) -> FastAPI:
    """The ASGI application: `reward` under the name `spec`, for those who know `token`, or everybody if it is None.

    `hosts`: names under which it may be asked; None: any. Of a server for this machine alone they keep pages of others
    out, whose names lead here.
    """
    limits = limits or Limits()
    batcher = Batcher(reward, limits.max_batch, limits.linger)

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        batcher.start()
        yield
        await batcher.close()

    app = FastAPI(title="visalign", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.batcher = batcher
    app.add_exception_handler(HTTPException, _say_error)
    app.add_exception_handler(Exception, _say_failure)
    if hosts is not None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))

    def check_token(request: Request) -> None:
        given = request.headers.get("authorization", "")
        if token is not None and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise HTTPException(401, "this server wants its token, as 'Authorization: Bearer TOKEN'")

    @app.get("/health")
    async def health() -> dict[str, str]:
        if not batcher.alive:
            raise HTTPException(503, "the thread that scores has ended; restart the server")
        return {"status": "ok"}

    @app.get("/description")
    async def description(request: Request) -> dict[str, Any]:
        check_token(request)
        return describe(reward, spec, limits)

    @app.post("/score")
    async def score(request: Request) -> JSONResponse:
        check_token(request)
        try:
            async with asyncio.timeout(limits.read_seconds):
                document, parts = await _read_body(request, limits.max_bytes)
        except TimeoutError:
            raise HTTPException(408, f"request: got no whole body within {limits.read_seconds:g} seconds") from None
        try:
            images, prompts, context = await asyncio.to_thread(read_request, document, parts)
            if len(images) > limits.max_images:
                raise HTTPException(413, f"images: got {len(images)}, expected <= {limits.max_images}")
            output = await batcher.score(images, prompts, context)
        except Closing:
            raise HTTPException(503, "shutting down") from None
        except RewardError as error:
            raise HTTPException(500, str(error)) from error
        except ValueError as error:
            raise HTTPException(400, " ".join(str(error).split())) from error
        return JSONResponse({"spec": spec, **write_output(output)})

    return app


async def _say_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code)


async def _say_failure(_request: Request, error: Exception) -> JSONResponse:
    said = " ".join(str(error).split())[:300]
    return JSONResponse({"error": f"the server failed: {type(error).__name__}: {said}"}, 500)


async def _read_body(request: Request, max_bytes: int) -> tuple[bytes, dict[str, bytes]]:
    """The JSON of a request and its further parts; stops reading where it grows too large."""
    too_large = HTTPException(413, f"request: got more than {max_bytes} bytes, expected fewer; send fewer pictures")
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise too_large
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > max_bytes:
            raise too_large
        chunks.append(chunk)
    body = b"".join(chunks)
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        return body, {}
    request = Request(request.scope, _once(body))
    parts: dict[str, bytes] = {}
    async with request.form(max_files=100_000, max_fields=1000, max_part_size=max_bytes) as form:
        for name, value in form.multi_items():
            parts[name] = await value.read() if isinstance(value, UploadFile) else value.encode()
    if "request" not in parts:
        raise HTTPException(400, f"request: got a multipart request of {sorted(parts)[:10]}, expected a part 'request'")
    return parts.pop("request"), parts


def _once(body: bytes) -> Any:
    """An ASGI `receive` that gives a body that has been read already."""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


def open_socket(host: str, port: int, token: str | None) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        ValueError: other machines could reach it and there is no token, or the address cannot be had.
    """
    if token is None and not is_loopback(host):
        raise ValueError(f"token: got none with host {host!r}, expected one, as other machines can reach that address")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        opened = socket.socket(family, kind, protocol)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server may follow on itself at once
        opened.bind(address)
        opened.listen()  # so that an address in use shows now; whoever connects already waits until the reward is there
    except OSError as error:
        raise ValueError(f"port: could not listen at {host}:{port} ({error.strerror or error})") from error
    return opened


def serve(app: FastAPI, listening: socket.socket, grace: int = 30) -> None:
    """Serve until SIGTERM or SIGINT; requests under way then have `grace` seconds to end. Returns after a clean end."""
    import uvicorn

    config = uvicorn.Config(
        app, log_level="warning", timeout_graceful_shutdown=grace, limit_concurrency=Limits.connections
    )
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, lambda *_: None)  # uvicorn raises the signal again, once it is done with it
    try:
        uvicorn.Server(config).run(sockets=[listening])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        listening.close()
