"""Adapter files over HTTP, in and out, a block at a time: never whole in memory, and no disk waited for on the loop.

An upload lands in a directory of the store's own disk that is gone after the request. A download is sent from a file
that has no name any more, so nothing is left behind whatever becomes of the client or of this process.
"""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.engine.lora import MAX_CONFIG_BYTES
from server.errors import ServerUnavailableError
from server.openai.errors import HttpError

ZIP_TYPE = "application/zip"
BLOCK_BYTES = 1 << 20
"""Large enough that a hop to a thread is nothing beside it."""
EXTRA_BYTES = 4 * MAX_CONFIG_BYTES
"""A zip file has, beside the weights, the configuration, the manifest, perhaps a README, and its own directory."""


async def receive_zip(http: Request, target: Path, *, max_version_bytes: int) -> None:
    """Write the request's body to `target`. Raises HttpError (400, 413, 415)."""
    content_type = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != ZIP_TYPE:
        raise HttpError(415, f"Send the zip file as 'Content-Type: {ZIP_TYPE}', not {content_type[:80]!r}.")
    limit = max_version_bytes + EXTRA_BYTES
    declared = http.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(limit)
    size = 0
    try:
        with target.open("xb") as file:
            async for block in _blocks(http):
                size += len(block)
                if size > limit:
                    raise _too_large(limit)
                await asyncio.to_thread(file.write, block)
    except OSError as error:
        raise ServerUnavailableError(f"the upload could not be kept: {error.strerror}") from error
    if not size:
        raise HttpError(400, "The body is empty; it must be a zip file with an adapter.")


async def _blocks(http: Request) -> AsyncIterator[bytes]:
    """The body in pieces of about BLOCK_BYTES."""
    parts, size = [], 0
    try:
        async for part in http.stream():
            parts.append(part)
            size += len(part)
            if size >= BLOCK_BYTES:
                yield b"".join(parts)
                parts, size = [], 0
    except ClientDisconnect:
        raise HttpError(400, "The client closed the connection before the body was complete.") from None
    yield b"".join(parts)


def _too_large(limit: int) -> HttpError:
    return HttpError(413, f"The zip file exceeds {limit} bytes.", code="request_too_large")


class FileResponse(Response):
    """Sends an open file and closes it. (Starlette's opens a path, which would have to outlive the request.)"""

    def __init__(self, file: IO[bytes], num_bytes: int, name: str) -> None:
        super().__init__(
            media_type=ZIP_TYPE if name.endswith(".zip") else "application/octet-stream",
            headers={"content-length": str(num_bytes), "content-disposition": f'attachment; filename="{name}"'},
        )
        self._file = file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._file:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            while block := await asyncio.to_thread(self._file.read, BLOCK_BYTES):
                await send({"type": "http.response.body", "body": block, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
