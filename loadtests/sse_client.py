"""A light load client: N concurrent streams over raw sockets, as fast as a server can feed them.

Measures what clients see at `/v1/chat/completions` or `/v1/completions`: generated tokens per second of all streams
together, time to first token, inter-token latency. One asyncio process and the standard library only, so that it takes
little from the cores that the server needs. Answers are forced to full length (`ignore_eos`), prompts are distinct
random words from a seed. Every chunk with text counts as one token; the server's own `usage` is what is reported, and
a difference between the two is shown as `num_chunks`.

usage: python loadtests/sse_client.py --url http://127.0.0.1:8000 --streams 32 --max-tokens 128 --json
"""

import argparse
import asyncio
import bisect
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

WORDS = (
    "river", "stone", "cloud", "engine", "paper", "market", "silver", "garden", "window", "letter", "mountain",
    "bridge", "music", "winter", "copper", "road",
)  # fmt: skip


@dataclass
class Stream:
    """One request's clock readings, in seconds of time.perf_counter()."""

    start: float = 0.0
    times: list[float] = field(default_factory=list)
    num_tokens: int = 0
    error: str | None = None


def request_bytes(url: str, endpoint: str, body: dict[str, object], extra: Sequence[str] = ()) -> bytes:
    """`extra`: header lines."""
    payload = json.dumps(body).encode()
    parts = urlsplit(url)
    head = (
        f"POST {parts.path}/v1/{endpoint} HTTP/1.1\r\nHost: {parts.netloc}\r\n"
        + "".join(f"{line}\r\n" for line in extra)
        + f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + payload


def make_body(options: argparse.Namespace, model: str, seed: int) -> tuple[str, dict[str, object]]:
    generator = random.Random(seed)
    prompt = " ".join(generator.choice(WORDS) for _ in range(options.prompt_words))
    body: dict[str, object] = {
        "model": model,
        "max_tokens": options.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if options.endpoint == "completions":
        return "completions", {**body, "prompt": prompt}
    return "chat/completions", {**body, "messages": [{"role": "user", "content": prompt}]}


class Exchange(asyncio.Protocol):
    """One connection that only stores what arrives and when; reading it is left for after the load."""

    def __init__(self) -> None:
        self.raw = bytearray()
        self.arrivals: list[tuple[int, float]] = []
        """Length of `raw` after a packet, and its time."""
        self.is_closed = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        self.raw += data
        self.arrivals.append((len(self.raw), time.perf_counter()))

    def connection_lost(self, error: Exception | None) -> None:
        self.is_closed.set_result(None)


async def connect(url: str) -> tuple[asyncio.Transport, Exchange]:
    parts = urlsplit(url)
    return await asyncio.get_running_loop().create_connection(Exchange, str(parts.hostname), parts.port or 80)


async def exchange_all(url: str, payloads: list[bytes], timeout_seconds: float) -> list[Stream]:
    """Connect first, then send every request at once and read every answer to its end."""
    connections = await asyncio.gather(*(connect(url) for _ in payloads))
    starts = []
    for (transport, _), payload in zip(connections, payloads, strict=True):
        starts.append(time.perf_counter())
        transport.write(payload)
    async with asyncio.timeout(timeout_seconds):
        for _, exchange in connections:
            await exchange.is_closed
    return [read_stream(start, exchange) for start, (_, exchange) in zip(starts, connections, strict=True)]


def read_stream(start: float, exchange: Exchange) -> Stream:
    """What one connection brought. An event's time is that of the packet which completed it."""
    stream = Stream(start)
    head, _, _ = bytes(exchange.raw).partition(b"\r\n\r\n")
    body = list(body_pieces(bytes(exchange.raw), len(head) + 4, b"transfer-encoding: chunked" in head.lower()))
    if b" 200 " not in head.split(b"\r\n")[0]:
        stream.error = b"".join(piece for piece, _ in body).decode(errors="replace")[:300] or "no answer"
        return stream
    usage = None
    for event, end in events(body):
        if event.get("usage"):
            usage = event["usage"]
        if "error" in event:
            stream.error = event["error"]["message"]
        for choice in event.get("choices", ()):
            if choice.get("text") or (choice.get("delta") or {}).get("content"):
                arrival = bisect.bisect_left(exchange.arrivals, end, key=lambda item: item[0])
                stream.times.append(exchange.arrivals[arrival][1])
    if usage is None:
        stream.error = stream.error or "the stream ended without usage"
    else:
        stream.num_tokens = usage["completion_tokens"]
    return stream


def body_pieces(raw: bytes, position: int, is_chunked: bool) -> Iterator[tuple[bytes, int]]:
    """The body in pieces, each with the offset in `raw` where it ends."""
    if not is_chunked:
        yield raw[position:], len(raw)
        return
    while position < len(raw):
        size = raw[position : raw.index(b"\r\n", position)]
        start = position + len(size) + 2
        end = start + int(size, 16)
        if end == start:
            return
        yield raw[start:end], end
        position = end + 2


def events(pieces: list[tuple[bytes, int]]) -> Iterator[tuple[dict[str, Any], int]]:
    """The JSON of every server-sent event and the offset of the piece that completed it."""
    rest = b""
    for piece, end in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data: {"):
                yield json.loads(line[6:]), end


def header_lines(options: argparse.Namespace) -> list[str]:
    """Sterna keeps what has this purpose out of training and live metrics; other servers pass over it."""
    lines = [f"X-Sterna-Purpose: {options.purpose}"]
    if options.api_key is not None:
        lines.append(f"Authorization: Bearer {options.api_key}")
    return lines


async def served_model(url: str, extra: Sequence[str] = ()) -> str:
    parts = urlsplit(url)
    transport, exchange = await connect(url)
    lines = [f"GET {parts.path}/v1/models HTTP/1.1", f"Host: {parts.netloc}", *extra, "Connection: close", "", ""]
    transport.write("\r\n".join(lines).encode())
    await exchange.is_closed
    body = json.loads(exchange.raw.partition(b"\r\n\r\n")[2])
    if "error" in body:
        raise SystemExit(f"sse_client: {body['error']['message']}")
    return str(body["data"][0]["id"])


def percentile(values: list[float], share: float) -> float:
    """Nearest rank; 0 for no values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def summarize(streams: list[Stream]) -> dict[str, object]:
    """Rates and latencies of the streams that were answered."""
    done = [stream for stream in streams if stream.error is None and stream.times]
    gaps = [later - earlier for stream in done for earlier, later in zip(stream.times, stream.times[1:], strict=False)]
    first = [stream.times[0] - stream.start for stream in done]
    num_tokens = sum(stream.num_tokens for stream in done)
    seconds = max((stream.times[-1] for stream in done), default=0.0) - min(
        (stream.start for stream in done), default=0.0
    )
    # Decode alone: between the moment when the last stream got its first token and the first stream's last one.
    steady_from = max((stream.times[0] for stream in done), default=0.0)
    steady_to = min((stream.times[-1] for stream in done), default=0.0)
    steady = sum(steady_from < moment <= steady_to for stream in done for moment in stream.times)
    return {
        "streams": len(streams),
        "errors": len(streams) - len(done),
        "num_tokens": num_tokens,
        "num_chunks": sum(len(stream.times) for stream in done),
        "seconds": round(seconds, 3),
        "tok_s": round(num_tokens / seconds, 1) if seconds else 0.0,
        "steady_chunks_s": round(steady / (steady_to - steady_from), 1) if steady_to > steady_from else 0.0,
        "ttft_p50_ms": round(percentile(first, 0.5) * 1e3, 2),
        "ttft_p99_ms": round(percentile(first, 0.99) * 1e3, 2),
        "itl_p50_ms": round(percentile(gaps, 0.5) * 1e3, 2),
        "itl_p99_ms": round(percentile(gaps, 0.99) * 1e3, 2),
        "itl_mean_ms": round(statistics.fmean(gaps) * 1e3, 2) if gaps else 0.0,
    }


async def run_load(options: argparse.Namespace) -> list[Stream]:
    extra = header_lines(options)
    model = options.model or await served_model(options.url, extra)
    payloads = []
    for number in range(options.streams):
        endpoint, body = make_body(options, model, options.prompts_seed * 10_000 + number)
        payloads.append(request_bytes(options.url, endpoint, body, extra))
    return await exchange_all(options.url, payloads, options.timeout_seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--endpoint", choices=("chat", "completions"), default="chat")
    parser.add_argument("--model", help="the served name [the first of /v1/models]")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--prompt-words", type=int, default=6)
    parser.add_argument("--prompts-seed", type=int, default=0)
    parser.add_argument("--timeout-seconds", type=float, default=600.0)
    parser.add_argument("--api-key", help="sent as a bearer token")
    parser.add_argument(
        "--purpose",
        choices=("evaluation", "user"),
        default="evaluation",
        help="what Sterna takes the load for; evaluation needs the scope train once keys exist [evaluation]",
    )
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    options = parser.parse_args()
    options.url = options.url.rstrip("/")
    streams = asyncio.run(run_load(options))
    result = summarize(streams)
    if options.json:
        print(json.dumps(result))
    else:
        print("\n".join(f"{key:<16} {value}" for key, value in result.items()))
    for error in {stream.error for stream in streams if stream.error}:
        print(f"sse_client: {error}", file=sys.stderr)
    return 1 if result["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
