"""Sends an answer: a JSON body, or server-sent events. Both stop the work when the client hangs up.

A failure before the first chunk becomes an HTTP status; after it, an `error` event and no `[DONE]`. The chunks are
encoded here, once, with one write each. Not starlette's StreamingResponse, which runs a task group for every response
and only notices a client that left by writing to it.
"""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import AbstractContextManager
from typing import Any, Generic, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.errors import SternaError
from server.openai.answer import Answer
from server.openai.errors import wire_error
from server.openai.protocol.chunks import ChatChunk, CompletionChunk

logger = logging.getLogger(__name__)

Chunk = TypeVar("Chunk", ChatChunk, CompletionChunk)

# ASCII only: some SSE readers split lines at U+2028, and the escaped form is the faster path of the C encoder.
encode_json: Callable[[Any], str] = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
_DONE = b"data: [DONE]\n\n"
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect events into buffers
]


def json_response(body: Mapping[str, Any], status: int = 200) -> Response:
    return Response(encode_json(body), status, media_type="application/json")


class AnswerResponse(Response, Generic[Chunk]):
    """One generation's answer. `under_way` counts it."""

    def __init__(
        self,
        answer: Answer[Chunk],
        under_way: Callable[[], AbstractContextManager[None]],
        *,
        stream: bool,
        include_usage: bool,
    ) -> None:
        super().__init__()
        self._answer: Answer[Chunk] = answer
        self._chunks: AsyncGenerator[Chunk, None] = answer.chunks()
        self._under_way = under_way
        self._stream = stream
        self._include_usage = include_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = self._send_events(send) if self._stream else self._send_body(scope, receive, send)
        with self._under_way():
            try:
                await _until_disconnect(receive, work)
            finally:
                await self._chunks.aclose()

    async def _send_body(self, scope: Scope, receive: Receive, send: Send) -> None:
        async for _ in self._chunks:
            pass  # the draft has it
        response = json_response(self._answer.draft.body())
        response.headers.update(self._answer.headers)
        await response(scope, receive, send)

    async def _send_events(self, send: Send) -> None:
        has_begun = False
        try:
            async for chunk in self._chunks:
                if not has_begun:
                    has_begun = True
                    headers = [*_STREAM_HEADERS, *_encoded(self._answer.headers)]
                    await send({"type": "http.response.start", "status": 200, "headers": headers})
                if self._include_usage:
                    chunk.setdefault("usage", None)
                elif not chunk["choices"]:
                    continue  # the usage chunk, which nobody asked for
                await _send_part(send, f"data: {encode_json(chunk)}\n\n".encode("ascii"))
            await _send_part(send, _DONE)
        except SternaError as error:
            if not has_begun:
                raise
            await _send_failure(send, error)
        except Exception as error:  # top of this request's work: the client must learn of it
            if not has_begun:
                raise
            logger.exception("a stream failed after its first chunk")
            await _send_failure(send, error)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _encoded(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]


async def _send_part(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})


async def _send_failure(send: Send, error: Exception) -> None:
    await _send_part(send, b"data: " + wire_error(error).body() + b"\n\n")


async def _until_disconnect(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Run `work`; cancel it when the client hangs up. Costs one task a request, nothing a token."""
    worker = asyncio.create_task(work)
    watcher = asyncio.create_task(_wait_for_disconnect(receive))
    try:
        await asyncio.wait((worker, watcher), return_when=asyncio.FIRST_COMPLETED)
        if worker.done():
            worker.result()
        else:
            watcher.result()
    finally:
        for task in (worker, watcher):
            task.cancel()
        await asyncio.gather(worker, watcher, return_exceptions=True)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
