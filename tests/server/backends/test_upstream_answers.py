"""What the upstream backend makes of answers, refusals and faults, before the first chunk and after it."""

import json
import re
from typing import Any

import pytest

from server.backends.upstream import UpstreamBackend
from server.errors import ServerUnavailableError
from server.metrics import Metrics
from server.openai.body import validate
from server.openai.errors import wire_error
from server.openai.protocol.chat import ChatRequest
from tests.server.backends.fake_upstream import HEAD, HELLO, USAGE, Reply, as_json, delta, sse, upstream
from tests.server.backends.upstream_driver import BODY, KEY, chat, failure, new_call
from tests.server.openai.harness import async_test


@async_test
async def test_chunks_end_with_usage_and_the_call_is_told() -> None:
    metrics = Metrics()
    call = new_call(metrics)
    async with upstream(sse(*HELLO)) as fake:
        backend = UpstreamBackend(fake.url)
        chunks = await chat(backend, BODY, call)
        await backend.aclose()
    assert chunks[-1]["usage"]["completion_tokens"] == 4
    assert chunks[-1]["choices"] == []
    assert {chunk["model"] for chunk in chunks} == {"teacher"}
    assert (call.model, call.num_prompt_tokens, call.prompt_token_ids) == ("teacher-2026-01-01", 11, None)
    text = metrics.render()[0].decode()
    assert 'sterna_generation_tokens_total{model="upstream"} 4.0' in text
    assert 'sterna_prompt_tokens_total{model="upstream"} 11.0' in text
    assert 'finished_reason="stop"' in text
    assert 'sterna_time_to_first_token_seconds_count{model="upstream"} 1.0' in text


@async_test
async def test_a_server_that_does_not_stream_is_understood() -> None:
    spoken = {"index": 0, "message": {"role": "assistant", "content": "Hello!"}, "finish_reason": "stop"}
    async with upstream(as_json({**HEAD, "choices": [spoken], "usage": USAGE})) as fake:
        backend = UpstreamBackend(fake.url)
        chunks = await chat(backend, BODY)
        await backend.aclose()
    assert chunks[1]["choices"][0]["delta"] == {"content": "Hello!"}
    assert chunks[-1]["usage"]["prompt_tokens"] == 11


FULL_REFUSAL = {"message": "too long", "type": "invalid_request_error", "param": "messages", "code": "ctx"}
QUOTA = {"message": "quota", "code": "insufficient_quota"}
INVALID = "invalid_request_error"


@pytest.mark.parametrize(
    ("status", "body", "message", "rest"),
    [
        (400, {"error": FULL_REFUSAL}, "too long", (INVALID, "messages", "ctx")),
        (404, {"error": {"message": "no such model", "code": 404}}, "no such model", (INVALID, None, None)),
        (400, {"object": "error", "message": "bad", "type": "BadRequest"}, "bad", ("BadRequest", None, None)),
        (404, {"error": "model 'x' not found"}, "model 'x' not found", (INVALID, None, None)),
        (422, {"detail": [{"loc": ["n"]}]}, '[{"loc": ["n"]}]', (INVALID, None, None)),
        (413, "<html>Too  Large</html>", "<html>Too Large</html>", (INVALID, None, None)),
        (405, "", "it gave no reason", (INVALID, None, None)),
        (429, {"error": QUOTA}, "quota", ("rate_limit_error", None, "insufficient_quota")),
    ],
)
@async_test
async def test_refusals_of_the_request_pass(status: int, body: Any, message: str, rest: tuple[str | None, ...]) -> None:
    text = body if isinstance(body, str) else json.dumps(body)
    async with upstream(Reply([text], status, {"Retry-After": "7"})) as fake:
        wire = wire_error(await failure(fake))
    assert (wire.status, wire.message) == (status, message)
    assert (wire.type, wire.param, wire.code) == rest
    assert wire.headers == {"Retry-After": "7"}


@pytest.mark.parametrize("status", [401, 402, 403])
@async_test
async def test_what_is_between_us_and_the_upstream_is_not_the_clients_fault(
    status: int, caplog: pytest.LogCaptureFixture
) -> None:
    async with upstream(as_json({"error": {"message": f"Incorrect API key provided: {KEY}"}}, status)) as fake:
        wire = wire_error(await failure(fake))
    assert wire.status == 502
    assert "upstream_api_key" in wire.message
    assert "Incorrect API key provided: [redacted]" in caplog.text
    assert KEY not in caplog.text + wire.message


@async_test
async def test_a_refusal_that_quotes_our_key_is_redacted() -> None:
    async with upstream(as_json({"error": {"message": f"unknown header Bearer {KEY}"}}, 400)) as fake:
        assert str(await failure(fake)) == "unknown header Bearer [redacted]"


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (as_json({"error": {"message": "out of memory"}}, 500), r"failed \(HTTP 500\): out of memory"),
        (Reply(["x" * 100_000], 503), r"failed \(HTTP 503\): x+…"),
        (Reply([], 307, {"Location": "https://elsewhere/"}), "redirects"),
        (Reply(["<html>Welcome!</html>"]), "without a single choice"),
        (Reply([]), "without a single choice"),
        (Reply(["data: {"], ends="broken"), "broke off"),
        (sse(delta({"content": "x"}), done=False), "before it was complete"),
        (sse({"error": {"message": "overloaded"}}), "overloaded"),
    ],
)
@async_test
async def test_failures_are_503(reply: Reply, message: str) -> None:
    async with upstream(reply) as fake:
        error = await failure(fake)
    assert isinstance(error, ServerUnavailableError)
    wire = wire_error(error)
    assert wire.status == 503
    assert re.search(message, wire.message)
    assert KEY not in wire.message


@async_test
async def test_nobody_there() -> None:
    async with upstream(sse(*HELLO)) as fake:
        pass
    error = await failure(fake)
    assert isinstance(error, ServerUnavailableError)
    assert "cannot be reached" in str(error)
    assert fake.asked == []


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (sse(*HELLO[:2], {"error": {"message": "worker died", "code": 500}}, done=False), "worker died"),
        (sse(*HELLO[:2], done=False), "before it was complete"),
        (Reply(sse(*HELLO[:2], done=False).parts, ends="broken"), "broke off"),
        (Reply([*sse(*HELLO[:2], done=False).parts, "data: {x}\n\n"]), "not valid JSON"),
    ],
)
@async_test
async def test_what_fails_in_mid_stream_fails_after_the_chunks(reply: Reply, message: str) -> None:
    metrics = Metrics()
    chunks: list[Any] = []
    async with upstream(reply) as fake:
        backend = UpstreamBackend(fake.url)

        async def read() -> None:
            async for chunk in backend.chat(validate(BODY, ChatRequest), new_call(metrics)):
                chunks.append(chunk)

        with pytest.raises(ServerUnavailableError, match=message):
            await read()
        await backend.aclose()
    assert [one["delta"].get("content") for chunk in chunks for one in chunk["choices"]] == ["", "Hel"]
    assert 'finished_reason="error"' in metrics.render()[0].decode()
