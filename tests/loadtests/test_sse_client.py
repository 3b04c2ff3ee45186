"""The load client against a scripted server: chunked or not, split anywhere, errors, and the numbers it derives."""

import asyncio
import json

import pytest

from loadtests import sse_client
from loadtests.sse_client import Stream, exchange_all, make_body, summarize


def event(body: dict[str, object]) -> bytes:
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


EVENTS = [
    event({"choices": [{"delta": {"role": "assistant", "content": ""}}]}),
    event({"choices": [{"delta": {"content": "Par"}}]}),
    event({"choices": [{"delta": {"content": "is é"}}]}),
    event({"choices": [{"delta": {}, "finish_reason": "length"}]}),
    event({"choices": [], "usage": {"completion_tokens": 3}}),
    b"data: [DONE]\n\n",
]
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


def chunked(parts: list[bytes]) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in [*parts, b""])


async def exchange_with(answer: bytes, packet_bytes: int, num_streams: int = 1) -> list[Stream]:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for start in range(0, len(answer), packet_bytes):
            writer.write(answer[start : start + packet_bytes])
            await writer.drain()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        return await exchange_all(url, [sse_client.request_bytes(url, "completions", {})] * num_streams, 10)


@pytest.mark.parametrize("packet_bytes", [1, 7, 100_000])
@pytest.mark.parametrize("is_chunked", [True, False])
def test_text_chunks_are_timed_however_they_are_cut(is_chunked: bool, packet_bytes: int) -> None:
    body = b"".join(EVENTS)
    answer = HEAD + b"\r\n" + body
    if is_chunked:
        answer = HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunked([body[:100], body[100:133], body[133:]])
    (stream,) = asyncio.run(exchange_with(answer, packet_bytes))
    assert stream.error is None
    assert stream.num_tokens == 3
    assert len(stream.times) == 2
    assert stream.start <= stream.times[0] <= stream.times[1]


def test_a_refusal_is_an_error_with_its_text() -> None:
    answer = b'HTTP/1.1 429 Too Many Requests\r\nContent-Length: 4\r\n\r\n{"x"'
    streams = asyncio.run(exchange_with(answer, 100, num_streams=3))
    assert [stream.error for stream in streams] == ['{"x"'] * 3
    assert summarize(streams)["errors"] == 3


def test_a_stream_that_breaks_off_is_an_error() -> None:
    (stream,) = asyncio.run(exchange_with(HEAD + b"\r\n" + EVENTS[1], 100))
    assert stream.error == "the stream ended without usage"
    (stream,) = asyncio.run(exchange_with(HEAD + b"\r\n" + event({"error": {"message": "engine stopped"}}), 100))
    assert stream.error == "engine stopped"


def test_the_summary_of_known_times() -> None:
    streams = [Stream(10.0, [10.5, 11.0, 11.5], 3), Stream(10.0, [10.6, 11.0, 12.0], 3), Stream(10.0, [], 0, "429")]
    summary = summarize(streams)
    assert (summary["streams"], summary["errors"], summary["num_tokens"], summary["num_chunks"]) == (3, 1, 6, 6)
    assert summary["seconds"] == 2.0
    assert summary["tok_s"] == 3.0
    assert (summary["ttft_p50_ms"], summary["ttft_p99_ms"]) == (600.0, 600.0)
    assert (summary["itl_p50_ms"], summary["itl_p99_ms"]) == (500.0, 1000.0)


def test_prompts_differ_by_stream_and_repeat_by_seed() -> None:
    class Options:
        endpoint, max_tokens, prompt_words = "chat", 8, 6

    bodies = [json.dumps(make_body(Options, "m", seed)) for seed in (1, 2, 1)]  # type: ignore[arg-type]
    assert bodies[0] == bodies[2] != bodies[1]
