"""The body of an upstream's answer, as JSON objects: server-sent events, or one JSON object where it does not stream.

Events are read as the WHATWG's specification has them (LF, CRLF or CR; comments; data of several lines), and three
habits of servers are allowed for: the last event may lack its blank line, an `error` event may come in mid-stream, and
`[DONE]` may be missing. Which of the two kinds a body is shows in its first character, because content types lie.
Not here: what the objects mean (upstream_chunks.py), connections (upstream_http.py).
"""

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from pydantic_core import from_json

from server.backends.upstream_errors import read_refusal, refusal_error
from server.errors import ServerUnavailableError

MAX_EVENT_BYTES = 64 * 2**20
"""Of one event or one unstreamed answer. The longest answers of today's models have some 100 KB."""
REST_SECONDS = 0.2
"""How long the end of the body is waited for after [DONE], so that the connection can be used again. The end nearly
always comes in the same packet; closing instead costs the next request a handshake."""


class End(Enum):
    """What comes after the objects, where the upstream said that it was done."""

    DONE = "[DONE]"


DONE: Final = End.DONE


@dataclass(frozen=True, slots=True)
class Event:
    name: str
    data: str


class EventReader:
    """Bytes in, complete events out."""

    def __init__(self) -> None:
        self._rest = b""
        self._name = ""
        self._data: list[bytes] = []
        self._size = 0

    def feed(self, part: bytes) -> list[Event]:
        """Raises ServerUnavailableError for an event that is too long."""
        buffer = self._rest + part
        # A CR at the end may be half of a CRLF: it waits for what comes.
        held = buffer[-1:] if buffer.endswith(b"\r") else b""
        *lines, rest = re.split(rb"\r\n|\n|\r", buffer[: len(buffer) - len(held)])
        self._rest = rest + held
        events = self._read(lines)
        if self._size + len(self._rest) > MAX_EVENT_BYTES:
            raise ServerUnavailableError(f"The upstream sent an event of more than {MAX_EVENT_BYTES} bytes.")
        return events

    def close(self) -> list[Event]:
        """The event that the body's end cut off from its blank line, if there is one."""
        rest, self._rest = self._rest, b""
        return self._read([rest.rstrip(b"\r"), b""])

    def _read(self, lines: list[bytes]) -> list[Event]:
        events = []
        for line in lines:
            if not line:
                if self._data:
                    events.append(Event(self._name, b"\n".join(self._data).decode("utf-8", "replace")))
                self._name, self._data, self._size = "", [], 0
                continue
            field, _, value = line.removeprefix(b"\xef\xbb\xbf").partition(b":")
            value = value.removeprefix(b" ")
            if field == b"data":
                self._data.append(value)
                self._size += len(value)
            elif field == b"event":
                self._name = value.decode("utf-8", "replace")
        return events


async def read_objects(
    parts: AsyncIterator[bytes], *, secrets: Sequence[str] = ()
) -> AsyncGenerator[dict[str, Any] | End, None]:
    """The objects of a body, then DONE unless it just ended.

    Raises what an error object in it says, with `secrets` taken out.
    """
    start = b""
    async for part in parts:
        start = (start + part).lstrip()
        if start:
            break
    if start.startswith(b"{"):
        yield _checked(await _whole(start, parts), "", secrets)
        yield DONE
        return
    reader = EventReader()
    pending = reader.feed(start)
    while True:
        for event in pending:
            if event.data.strip() == DONE.value:
                await _drain(parts)
                yield DONE
                return
            if event.data.strip():
                yield _checked(event.data, event.name, secrets)
        more = await anext(parts, None)
        if more is None:
            break
        pending = reader.feed(more)
    for event in reader.close():
        yield DONE if event.data.strip() == DONE.value else _checked(event.data, event.name, secrets)


async def _whole(start: bytes, parts: AsyncIterator[bytes]) -> bytes:
    body = bytearray(start)
    async for part in parts:
        body += part
        if len(body) > MAX_EVENT_BYTES:
            raise ServerUnavailableError(f"The upstream sent an answer of more than {MAX_EVENT_BYTES} bytes.")
    return bytes(body)


async def _drain(parts: AsyncIterator[bytes]) -> None:
    try:
        async with asyncio.timeout(REST_SECONDS):
            async for _ in parts:
                pass
    except TimeoutError:
        pass  # the connection is closed instead of kept


def _checked(text: str | bytes, event_name: str, secrets: Sequence[str]) -> dict[str, Any]:
    """Raises ServerUnavailableError for what is no JSON object, and what an error object stands for."""
    try:
        value = from_json(text, allow_inf_nan=False)
    except ValueError as error:
        if event_name == "error":
            raise refusal_error(None, read_refusal(text, secrets)) from None
        raise ServerUnavailableError(f"The upstream sent what is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise ServerUnavailableError(f"The upstream sent {type(value).__name__} where an object belongs.")
    if value.get("error") or event_name == "error" or value.get("object") == "error":
        raise refusal_error(None, read_refusal(value, secrets))
    return value
