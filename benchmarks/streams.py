"""A steady load of streamed answers: so many clients, each asking again when its answer is complete.

Measures nothing itself. While the load runs only bytes and times are kept, so that the client takes little from the
cores that the server needs; answers are read afterwards.
"""

import asyncio
import bisect
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from loadtests.sse_client import Exchange, body_pieces, connect, events, percentile, request_bytes

Body = dict[str, Any]


@dataclass
class Answer:
    """One answer as its client got it. Times are of time.perf_counter()."""

    body: Body
    start: float
    status: int
    headers: dict[str, str]
    """Names in lower case."""
    text: str = ""
    fingerprint: str = ""
    times: list[float] = field(default_factory=list)
    """Of each chunk with text."""
    num_tokens: int = 0
    error: str | None = None

    @property
    def version(self) -> str | None:
        return self.headers.get("x-sterna-adapter-version")

    @property
    def ttft(self) -> float:
        return self.times[0] - self.start

    def gaps(self) -> list[tuple[float, float]]:
        """(when it ended, seconds) of each wait between two tokens."""
        return [(later, later - earlier) for earlier, later in itertools.pairwise(self.times)]


class StreamLoad:
    """`make_body(client, turn)`: what a client asks for the n-th time; of /v1/completions, without `stream`."""

    def __init__(self, url: str, make_body: Callable[[int, int], Body]) -> None:
        self._url = url
        self._make_body = make_body
        self._done: list[tuple[Body, float, Exchange]] = []
        self._is_over = False
        self._clients: list[asyncio.Task[None]] = []

    def start(self, num_clients: int) -> None:
        self._clients = [asyncio.create_task(self._client(index)) for index in range(num_clients)]

    async def stop(self) -> list[Answer]:
        """Let what runs end, and read everything."""
        self._is_over = True
        await asyncio.gather(*self._clients)
        return [read_answer(*one) for one in self._done]

    async def _client(self, index: int) -> None:
        for turn in itertools.count():
            if self._is_over:
                return
            self._done.append(await exchange(self._url, self._make_body(index, turn)))


async def exchange(url: str, body: Body) -> tuple[Body, float, Exchange]:
    """One request, streamed and greedy, to the end of its answer."""
    sent = {"temperature": 0, "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True, **body}
    transport, got = await connect(url)
    start = time.perf_counter()
    transport.write(request_bytes(url, "completions", sent))
    await got.is_closed
    return body, start, got


def read_answer(body: Body, start: float, got: Exchange) -> Answer:
    raw = bytes(got.raw)
    head, _, _ = raw.partition(b"\r\n\r\n")
    status_line, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    status = int(status_line.split()[1]) if status_line else 0
    answer = Answer(body, start, status, headers)
    pieces = list(body_pieces(raw, len(head) + 4, "chunked" in headers.get("transfer-encoding", "")))
    if status != 200:
        answer.error = b"".join(piece for piece, _ in pieces).decode(errors="replace")[:300] or "no answer"
        return answer
    for event, end in events(pieces):
        if "error" in event:
            answer.error = event["error"]["message"]
            return answer
        answer.fingerprint = event.get("system_fingerprint") or answer.fingerprint
        answer.num_tokens = (event.get("usage") or {}).get("completion_tokens", answer.num_tokens)
        for choice in event["choices"]:
            if choice["text"]:
                answer.text += choice["text"]
                arrival = bisect.bisect_left(got.arrivals, end, key=lambda item: item[0])
                answer.times.append(got.arrivals[arrival][1])
    if not answer.num_tokens or not any(b"[DONE]" in piece for piece, _ in pieces):
        answer.error = "the stream broke off"
    return answer


def is_in(moment: float, windows: Sequence[tuple[float, float]]) -> bool:
    return any(begin <= moment <= end for begin, end in windows)


def gap_figures(gaps: Sequence[float]) -> dict[str, float]:
    """Milliseconds."""
    return {f"p{share}_ms": round(percentile(list(gaps), share / 100) * 1e3, 1) for share in (50, 99)}
