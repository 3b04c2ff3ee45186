"""The sidecar's own port: /health, /metrics, and rounds on request.

    GET  /rounds[?adapter=tools]                     the rounds, newest first
    POST /rounds {"adapter": "tools", "parent": 7}   begin one as soon as may be; `parent`: a warm start from tools@7

A request is in the database before it is answered, so the next sidecar takes it where this one dies. Whoever may ask
the server for its adapters may ask here: the caller's API key is shown to the server. Not here: what a round is
(finetune/rounds), and when it begins (loop.py).
"""

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from finetune.rounds.errors import UnknownAdapterError
from finetune.rounds.report import round_body
from finetune.rounds.store import RoundStore
from finetune.sidecar.metrics import SidecarMetrics
from server.adapters.version import check_adapter_name
from server.errors import AdapterError, ConfigError, ServerUnavailableError

MAX_BODY_BYTES = 65_536
MAX_VERSION = 2**31 - 1
MayAsk = Callable[[str | None], tuple[int, str] | None]
"""Given the Authorization header: None, or the status and the reason why not."""


def build_app(
    store: RoundStore,
    metrics: SidecarMetrics,
    *,
    request_round: Callable[[str, int | None], None],
    may_ask: MayAsk,
) -> Starlette:
    """`request_round` raises UnknownAdapterError."""

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def show_metrics(request: Request) -> Response:
        body, content_type = metrics.render()
        return Response(body, headers={"content-type": content_type})

    async def list_rounds(request: Request) -> Response:
        refused = await asyncio.to_thread(may_ask, request.headers.get("authorization"))
        if refused is not None:
            return _error(*refused)
        found = await asyncio.to_thread(store.list, request.query_params.get("adapter"))
        return JSONResponse({"object": "list", "data": [round_body(round) for round in found]})

    async def begin_round(request: Request) -> Response:
        refused = await asyncio.to_thread(may_ask, request.headers.get("authorization"))
        if refused is not None:
            return _error(*refused)
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":  # what a foreign web page cannot send without being asked about it first
            return _error(415, "the body must be sent as Content-Type: application/json")
        try:
            adapter, parent = _read(await _body(request))
        except (ValueError, AdapterError) as error:
            return _error(400, str(error))
        try:
            await asyncio.to_thread(request_round, adapter, parent)
        except UnknownAdapterError as error:
            return _error(404, str(error))
        return JSONResponse({"object": "round.request", "adapter": adapter, "parent": parent}, 202)

    routes = [
        Route("/health", health),
        Route("/metrics", show_metrics),
        Route("/rounds", list_rounds, methods=["GET"]),
        Route("/rounds", begin_round, methods=["POST"]),
    ]
    return Starlette(routes=routes, exception_handlers={ServerUnavailableError: _unavailable})


async def _unavailable(request: Request, error: Exception) -> Response:
    return _error(503, str(error))


async def _body(request: Request) -> bytes:
    """Raises ValueError."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise ValueError(f"the body exceeds {MAX_BODY_BYTES} bytes")
    return bytes(body)


def _read(body: bytes) -> tuple[str, int | None]:
    """Raises ValueError, AdapterError."""
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        raise ValueError("the body must be JSON") from None
    if not isinstance(given, dict) or not isinstance(given.get("adapter"), str):
        raise ValueError("the body must be an object with 'adapter', an adapter's name")
    unknown = sorted(set(given) - {"adapter", "parent"})
    if unknown:
        raise ValueError(f"unknown key '{unknown[0][:40]}'; known are adapter, parent")
    parent = given.get("parent")
    if parent is not None and (
        not isinstance(parent, int) or isinstance(parent, bool) or not 1 <= parent <= MAX_VERSION
    ):
        raise ValueError(f"'parent' is a version's number, not {json.dumps(parent)[:40]}")
    return check_adapter_name(given["adapter"]), parent


def _error(status: int, message: str) -> Response:
    return JSONResponse({"error": {"message": message}}, status)


@contextmanager
def serving(app: Any, host: str, port: int) -> Iterator[str]:
    """The app on a thread; gives its URL. Raises ConfigError when the port is taken."""
    try:
        listener = socket.create_server((host, port))
    except OSError as error:
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror}") from error
    server = uvicorn.Server(
        uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", ws="none", timeout_graceful_shutdown=1)
    )
    # Not `run`, which would take over the process's signals.
    thread = threading.Thread(target=asyncio.run, args=(server._serve(sockets=[listener]),), daemon=True)
    thread.start()
    try:
        yield f"http://{host}:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()
