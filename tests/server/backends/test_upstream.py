"""What the upstream backend sends, to which URLs, with which key and ids."""

import asyncio
import logging

import pytest

from server.backends.upstream import UpstreamBackend
from server.backends.upstream_http import UpstreamHttp
from server.errors import ConfigError, UpstreamError
from server.openai.body import validate
from server.openai.protocol.tokens import DetokenizeRequest, TokenizeRequest
from tests.server.backends.fake_upstream import HEAD, HELLO, USAGE, Reply, as_json, delta, sse, upstream
from tests.server.backends.upstream_driver import BODY, KEY, TOOL, chat, complete
from tests.server.openai.harness import async_test


@async_test
async def test_the_request_goes_on_as_the_client_gave_it() -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    given = {**BODY, "tools": [TOOL], "response_format": schema, "temperature": 0.5, "top_k": 3, "n": 1, "user": "u"}
    async with upstream(sse(*HELLO)) as fake:
        backend = UpstreamBackend(fake.url + "/v1/", KEY + "\n")
        await chat(backend, {**given, "seed": None, "stop": None})
        await chat(backend, {**given, "stream": True, "stream_options": {"include_obfuscation": False}})
        await backend.aclose()
    first, second = fake.asked
    assert (first.method, first.path) == ("POST", "/v1/chat/completions")
    assert first.headers["authorization"] == f"Bearer {KEY}"
    assert first.headers["accept-encoding"] == "identity"
    assert first.headers["content-type"] == "application/json"
    assert first.body == {**given, "stream": True, "stream_options": {"include_usage": True}}
    assert second.body["stream_options"] == {"include_obfuscation": False, "include_usage": True}
    assert fake.num_connections == 1


@async_test
async def test_tool_call_ids_go_back_as_the_upstream_made_them() -> None:
    called = delta({"tool_calls": [{"index": 0, "id": "call_0", "function": {"name": "f", "arguments": "{}"}}]})
    async with upstream(sse(called), sse(*HELLO)) as fake:
        backend = UpstreamBackend(fake.url)
        chunks = await chat(backend, {**BODY, "tools": [TOOL]})
        [told] = [call for chunk in chunks for one in chunk["choices"] for call in one["delta"].get("tool_calls", ())]
        spoken = {"role": "assistant", "tool_calls": [{key: told[key] for key in ("id", "type", "function")}]}
        result = {"role": "tool", "tool_call_id": told["id"], "content": "1"}
        await chat(backend, {**BODY, "messages": [*BODY["messages"], spoken, result]})
        await backend.aclose()
    assert told["id"] != "call_0"
    _, spoken, result = fake.asked[1].body["messages"]
    assert (spoken["tool_calls"][0]["id"], result["tool_call_id"]) == ("call_0", "call_0")
    assert "authorization" not in fake.asked[0].headers


@async_test
async def test_the_best_of_several_is_not_streamed() -> None:
    whole = {**HEAD, "choices": [{"index": 0, "text": "best", "finish_reason": "stop"}], "usage": USAGE}
    async with upstream(as_json(whole)) as fake:
        backend = UpstreamBackend(fake.url)
        chunks = await complete(backend, best_of=3)
        await backend.aclose()
    assert fake.asked[0].body == {"model": "teacher", "prompt": "x", "best_of": 3}
    assert [one["text"] for chunk in chunks for one in chunk["choices"]] == ["best", ""]


@pytest.mark.parametrize(
    "refusal",
    [
        as_json({"error": {"message": "Unknown field", "param": "stream_options"}}, 400),
        as_json({"detail": [{"type": "extra_forbidden", "loc": ["body", "stream_options"]}]}, 422),
    ],
)
@async_test
async def test_a_server_that_will_not_count_is_asked_without(refusal: Reply) -> None:
    async with upstream(refusal, sse(*HELLO[:-1])) as fake:
        backend = UpstreamBackend(fake.url)
        first, second = await chat(backend, BODY), await chat(backend, BODY)
        await backend.aclose()
    assert [("stream_options" in asked.body) for asked in fake.asked] == [True, False, False]
    assert first[-1]["usage"] is second[-1]["usage"] is None


@async_test
async def test_tokens_are_the_upstreams() -> None:
    listed = {"count": 1, "max_model_len": 8, "tokens": [5], "token_strs": None}
    async with upstream(as_json(listed), as_json({"prompt": "x"}), as_json({"detail": "Not Found"}, 404)) as fake:
        backend = UpstreamBackend(fake.url)
        assert await backend.tokenize(validate({"prompt": "x"}, TokenizeRequest)) == listed
        assert await backend.detokenize(validate({"tokens": [5]}, DetokenizeRequest)) == {"prompt": "x"}
        with pytest.raises(UpstreamError, match="Not Found") as caught:
            await backend.tokenize(validate({"messages": BODY["messages"]}, TokenizeRequest))
        await backend.aclose()
    assert caught.value.status == 404
    assert [(asked.path, asked.body) for asked in fake.asked] == [
        ("/tokenize", {"prompt": "x"}),
        ("/detokenize", {"tokens": [5]}),
        ("/tokenize", {"messages": BODY["messages"]}),
    ]


@pytest.mark.parametrize(
    ("url", "chat_url", "tokenize_url"),
    [
        ("http://h:1", "http://h:1/v1/chat", "http://h:1/tokenize"),
        ("http://h:1/", "http://h:1/v1/chat", "http://h:1/tokenize"),
        ("https://h/v1", "https://h/v1/chat", "https://h/tokenize"),
        ("https://h/api/v1/", "https://h/api/v1/chat", "https://h/api/tokenize"),
        ("https://h/v1beta/openai", "https://h/v1beta/openai/chat", "https://h/v1beta/openai/tokenize"),
        ("https://h/openai/v1?api-version=1", "https://h/openai/v1/chat?api-version=1", "https://h/openai/tokenize?api-version=1"),
    ],
)  # fmt: skip
def test_base_urls(url: str, chat_url: str, tokenize_url: str) -> None:
    http = UpstreamHttp(url, None)
    assert str(http._url(http._base, "/chat")) == chat_url
    assert str(http._url(http._root, "/tokenize")) == tokenize_url


@pytest.mark.parametrize("key", ["a b", "naïve", "two\nlines"])
def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(ConfigError, match="upstream_api_key") as caught:
        UpstreamBackend("http://h", key)
    assert key not in str(caught.value)


@async_test
async def test_no_log_line_has_a_secret(caplog: pytest.LogCaptureFixture) -> None:
    async with upstream(sse(*HELLO)) as fake:
        keyed = UpstreamBackend(fake.url, KEY)
        named = UpstreamBackend(fake.url.replace("//", "//user:hidden-password@"))
        with caplog.at_level(logging.DEBUG):
            await chat(keyed, BODY)
            await chat(named, BODY)
            await asyncio.gather(keyed.aclose(), named.aclose())
    assert fake.asked[0].headers["authorization"] == f"Bearer {KEY}"
    assert fake.asked[1].headers["authorization"].startswith("Basic ")
    assert "HTTP Request: POST" in caplog.text
    assert KEY not in caplog.text
    assert "hidden-password" not in caplog.text


def test_secrets_are_the_key_and_the_urls_password() -> None:
    backend = UpstreamBackend("http://user:pass@h:1/v1", KEY)
    assert backend.secrets == (KEY, "pass")
    assert backend.name == "h:1"
    with pytest.raises(ConfigError, match="not a URL"):
        UpstreamBackend("http://h:port/")
