"""An upstream that answers from a script, byte for byte, on the test's own event loop; and what it was asked.

A plain asyncio server and not an ASGI one: a test chooses how the body is cut, how a connection breaks, and sees when
its client leaves.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class Reply:
    """`ends` "broken": the connection is cut after the parts; "hanging": nothing more comes until the client leaves."""

    parts: Sequence[bytes | str] = ()
    status: int = 200
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "text/event-stream"})
    ends: Literal["whole", "broken", "hanging"] = "whole"


@dataclass
class Asked:
    method: str
    path: str
    headers: dict[str, str]
    body: Any


class FakeUpstream:
    """`replies` are taken one by one, the last one again and again; a callable makes one from what was asked."""

    def __init__(self, *replies: Reply | Callable[[Asked], Reply]) -> None:
        self.replies = list(replies)
        self.asked: list[Asked] = []
        self.num_connections = 0
        self.parts_sent = asyncio.Event()
        self.client_left = asyncio.Event()
        self.url = ""
        self._open: dict[asyncio.Task[Any], asyncio.StreamWriter] = {}

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._open[task] = writer
        try:
            while (asked := await _read(reader)) is not None:
                self.asked.append(asked)
                reply = self.replies[0] if len(self.replies) == 1 else self.replies.pop(0)
                if not await self._answer(reply(asked) if callable(reply) else reply, reader, writer):
                    return
        except ConnectionError:
            self.client_left.set()
        finally:
            writer.close()
            del self._open[task]

    async def close(self) -> None:
        """Cuts every connection. (A handler cancelled by the loop's end would be reported as an error.)"""
        for writer in self._open.values():
            writer.close()
        await asyncio.gather(*self._open)

    async def _answer(self, reply: Reply, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection is kept."""
        headers = {**reply.headers, "Transfer-Encoding": "chunked"}
        lines = [f"HTTP/1.1 {reply.status} X", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        writer.write("\r\n".join(lines).encode())
        for part in reply.parts:
            data = part.encode() if isinstance(part, str) else part
            writer.write(b"%x\r\n%b\r\n" % (len(data), data))
            await writer.drain()
        self.parts_sent.set()
        if reply.ends == "hanging":
            if await reader.read(1) == b"":
                self.client_left.set()
            return False
        if reply.ends == "broken":
            return False
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True


async def _read(reader: asyncio.StreamReader) -> Asked | None:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.strip().split("\r\n")
    method, path, _ = first.split(" ")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Asked(method, path, headers, json.loads(body) if body else None)


@asynccontextmanager
async def upstream(*replies: Reply | Callable[[Asked], Reply]) -> AsyncIterator[FakeUpstream]:
    fake = FakeUpstream(*replies)
    server = await asyncio.start_server(fake._serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()[:2]
    fake.url = f"http://{host}:{port}"
    try:
        yield fake
    finally:
        server.close()
        await fake.close()


def sse(*values: Any, done: bool = True) -> Reply:
    """A stream of these objects, a part each."""
    parts = [f"data: {json.dumps(value)}\n\n" for value in values]
    return Reply([*parts, "data: [DONE]\n\n"] if done else parts)


def as_json(value: Any, status: int = 200, **headers: str) -> Reply:
    return Reply([json.dumps(value)], status, {"Content-Type": "application/json", **headers})


def delta(part: dict[str, Any], *, index: int = 0, end: str | None = None) -> dict[str, Any]:
    """A chunk of a chat answer as OpenAI sends it."""
    return {**HEAD, "choices": [{"index": index, "delta": part, "logprobs": None, "finish_reason": end}]}


HEAD = {
    "id": "chatcmpl-AbC123",
    "object": "chat.completion.chunk",
    "created": 1_700_000_000,
    "model": "teacher-2026-01-01",
    "system_fingerprint": "fp_1",
}
USAGE = {
    "prompt_tokens": 11,
    "completion_tokens": 4,
    "total_tokens": 15,
    "prompt_tokens_details": {"cached_tokens": 8, "audio_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 2},
}
USAGE_CHUNK = {**HEAD, "choices": [], "usage": USAGE}
HELLO = (
    delta({"role": "assistant", "content": "", "refusal": None}),
    delta({"content": "Hel"}),
    delta({"content": "lo!"}),
    delta({}, end="stop"),
    USAGE_CHUNK,
)
