"""Bad input: always a 4xx in OpenAI's shape that names the field, never a 500."""

from typing import Any

import openai
import pytest

from tests.server.openai.harness import MODEL, async_test, serving
from tests.server.openai.scripted import Answer

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "f"}}


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [USER], **fields}


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "hi", **fields}


def schema(value: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}


BAD_CHAT = [
    ({}, "model", "missing_required_parameter"),
    ({"model": MODEL}, "messages", "missing_required_parameter"),
    (chat(messages=[]), "messages", "array_below_min_length"),
    (chat(messages=["hi"]), "messages[0]", "invalid_type"),
    (chat(messages=[{"content": "hi"}]), "messages[0].role", "missing_required_parameter"),
    (chat(messages=[{"role": "robot", "content": "hi"}]), "messages[0].role", "invalid_value"),
    (chat(messages=[{"role": "function", "name": "f", "content": ""}]), "messages[0].role", "unsupported_value"),
    (chat(messages=[USER, {"role": "user", "content": 5}]), "messages[1].content", "invalid_type"),
    (chat(messages=[{"role": "user", "content": None}]), "messages[0].content", "invalid_type"),
    (chat(messages=[{"role": "assistant"}]), "messages[0]", "invalid_value"),
    (chat(messages=[{"role": "tool", "content": "x"}]), "messages[0].tool_call_id", "missing_required_parameter"),
    (
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        "messages[0].content[0]",
        "unsupported_value",
    ),
    (chat(messages=[{**USER, "colour": 1}]), "messages[0].colour", "unknown_parameter"),
    (chat(colour=1), "colour", "unknown_parameter"),
    (chat(n="2"), "n", "invalid_type"),
    (chat(n=True), "n", "invalid_type"),
    (chat(n=0), "n", "integer_below_min_value"),
    (chat(n=129), "n", "integer_above_max_value"),
    (chat(max_tokens=0), "max_tokens", "integer_below_min_value"),
    (chat(max_completion_tokens=-1), "max_completion_tokens", "integer_below_min_value"),
    (chat(max_tokens=1, max_completion_tokens=2), "max_tokens", "invalid_value"),
    (chat(max_tokens=2, min_tokens=3), "min_tokens", "invalid_value"),
    (chat(max_tokens=10**6), "messages", "context_length_exceeded"),
    (chat(messages=[{"role": "user", "content": "x" * 3000}]), "messages", "context_length_exceeded"),
    (chat(temperature=2.5), "temperature", "decimal_above_max_value"),
    (chat(temperature=False), "temperature", "invalid_type"),
    (chat(top_p=-0.5), "top_p", "decimal_below_min_value"),
    (chat(presence_penalty=3), "presence_penalty", "integer_above_max_value"),
    (chat(stop=["a"] * 5), "stop", "array_above_max_length"),
    (chat(stop=""), "stop", "string_below_min_length"),
    (chat(stop=[1]), "stop", "invalid_type"),
    (chat(seed=2**63), "seed", "integer_above_max_value"),
    (chat(seed=1.5), "seed", "invalid_type"),
    (chat(logit_bias={"x": 1}), "logit_bias", "invalid_value"),
    (chat(logit_bias={"5": 101}), "logit_bias", "invalid_value"),
    (chat(logit_bias={"99999": 1}), "logit_bias", None),
    (chat(stop_token_ids=[99999]), "stop_token_ids", None),
    (chat(stream_options={"include_usage": True}), "stream_options", "invalid_value"),
    (chat(top_logprobs=2), "top_logprobs", "invalid_value"),
    (chat(logprobs=True, top_logprobs=21), "top_logprobs", "integer_above_max_value"),
    (chat(logprobs=1), "logprobs", "invalid_type"),
    (chat(tools=[TOOL, TOOL]), "tools", "invalid_value"),
    (chat(tools=[{"type": "custom", "custom": {}}]), "tools[0]", "unsupported_value"),
    (chat(tools=[{"type": "function", "function": {"name": "a b"}}]), "tools[0].function.name", "invalid_value"),
    (chat(tool_choice="required"), "tools", "invalid_value"),
    (chat(tool_choice="always"), "tool_choice", "invalid_value"),
    (
        chat(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "g"}}),
        "tool_choice",
        "invalid_value",
    ),
    (chat(functions=[{"name": "f"}]), "functions", "unsupported_parameter"),
    (chat(audio={"voice": "x", "format": "wav"}), "audio", "unsupported_parameter"),
    (chat(modalities=["audio"]), "modalities[0]", "invalid_value"),
    (chat(prediction={"type": "content", "content": "x"}), "prediction", "unsupported_parameter"),
    (chat(service_tier="priority"), "service_tier", "invalid_value"),
    (chat(response_format={"type": "xml"}), "response_format.type", "invalid_value"),
    (chat(response_format={"type": "json_schema"}), "response_format.json_schema", "missing_required_parameter"),
    (chat(response_format=schema({"type": "nonsense"})), "response_format.json_schema.schema", None),
    (
        chat(response_format=schema({"type": "string", "pattern": "(("})),
        "response_format.json_schema.schema",
        None,
    ),
    (
        chat(response_format=schema({"type": "array", "uniqueItems": True})),
        "response_format.json_schema.schema",
        None,
    ),
    (chat(continue_final_message=True), "messages", "invalid_value"),
    (chat(continue_final_message=True, add_generation_prompt=True), "continue_final_message", "invalid_value"),
]

BAD_COMPLETIONS = [
    ({"model": MODEL}, "prompt", "missing_required_parameter"),
    (completion(prompt=5), "prompt", "invalid_type"),
    (completion(prompt=[]), "prompt", "empty_array"),
    (completion(prompt=""), "prompt", "empty_string"),
    (completion(prompt=["a", ""]), "prompt[1]", "empty_string"),
    (completion(prompt=["a", 1]), "prompt", "invalid_value"),
    (completion(prompt=[1, True]), "prompt", "invalid_value"),
    (completion(prompt=[1, -1]), "prompt", "invalid_value"),
    (completion(prompt=[[1], []]), "prompt", "empty_array"),
    (completion(prompt=[1, 100_000]), "prompt[1]", None),
    (completion(prompt=[[1], [2, 100_000]]), "prompt[1][1]", None),
    (completion(prompt="x" * 3000), "prompt", "context_length_exceeded"),
    (completion(max_tokens=0), "max_tokens", "invalid_value"),
    (completion(max_tokens=-1), "max_tokens", "integer_below_min_value"),
    (completion(suffix="x"), "suffix", "unsupported_parameter"),
    (completion(logprobs=6), "logprobs", "integer_above_max_value"),
    (completion(logprobs=True), "logprobs", "invalid_type"),
    (completion(n=3, best_of=2), "best_of", "invalid_value"),
    (completion(best_of=2, stream=True), "best_of", "invalid_value"),
    (completion(prompt=["a"] * 1000), "n", None),
    (completion(messages=[USER]), "messages", "unknown_parameter"),
]


@pytest.mark.parametrize(
    ("path", "body", "param", "code"),
    [(CHAT, *case) for case in BAD_CHAT] + [(COMPLETIONS, *case) for case in BAD_COMPLETIONS],
)
@async_test
async def test_bad_fields(path: str, body: Any, param: str, code: str | None) -> None:
    async with serving() as h:
        response = await h.post(path, body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert (error["param"], error["code"]) == (param, code)
    assert param.partition("[")[0].rpartition(".")[2] in error["message"]
    assert h.engine.submitted == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nope",
        b'{"model": NaN}',
        b'{"model": "tiny", "prompt": "a", "temperature": Infinity}',
        b'{"model": "tiny", "prompt": "a", "temperature": 1e999}',
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b"[" * 100_000,
        b'{"seed": ' + b"9" * 5000 + b"}",
        b"\xff\xfe",
        b"[]",
        b'"text"',
        b"null",
    ],
)
@async_test
async def test_bad_json(body: bytes) -> None:
    async with serving() as h:
        response = await h.http.post(COMPLETIONS, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400


@async_test
async def test_wrong_content_type_method_path_and_size() -> None:
    async with serving() as h:
        form = await h.http.post(COMPLETIONS, data={"prompt": "a"})
        method = await h.http.get(CHAT)
        path = await h.http.post("/v1/embeddings", json={})
        large = await h.http.post(
            COMPLETIONS, content=b" " * (16 * 2**20 + 1), headers={"content-type": "application/json"}
        )
    assert [form.status_code, method.status_code, path.status_code, large.status_code] == [415, 405, 404, 413]
    assert method.headers["allow"] == "POST"


@async_test
async def test_unknown_model_is_404() -> None:
    async with serving() as h:
        for body, path in ((chat(model="x"), CHAT), (completion(model="x"), COMPLETIONS)):
            response = await h.post(path, body)
            assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
        for path, field in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": []})):
            response = await h.post(path, {"model": "x", **field})
            assert response.status_code == 404
        with pytest.raises(openai.NotFoundError):
            await h.client.models.retrieve("x")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (COMPLETIONS, completion(prompt="x" * 100_000), "prompt"),
        (CHAT, chat(messages=[{"role": "user", "content": "x" * 100_000}]), "messages"),
        (CHAT, chat(tools=[{"type": "function", "function": {"name": "f", "description": "x" * 100_000}}]), "messages"),
    ],
)
@async_test
async def test_a_text_that_cannot_fit_is_refused_without_tokenizing_it(path: str, body: Any, param: str) -> None:
    def tokenized(*args: Any, **kwargs: Any) -> list[int]:
        raise AssertionError("megabytes would take seconds")

    async with serving() as h:
        h.engine.tokenizer._encode = tokenized  # type: ignore[method-assign]
        response = await h.post(path, body)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, param, "context_length_exceeded")


@pytest.mark.parametrize("stream", [False, True])
@async_test
async def test_full_queue_is_429_with_retry_after_streamed_or_not(stream: bool) -> None:
    async with serving() as h:
        h.engine.is_full = True
        response = await h.post(CHAT, chat(stream=stream))
        with pytest.raises(openai.RateLimitError):
            await h.client.chat.completions.create(**chat(stream=stream))
    assert response.status_code == 429
    assert response.headers["retry-after"] == "7"


@async_test
async def test_a_queue_that_fills_between_choices_frees_the_first() -> None:
    async with serving() as h:
        submit = h.engine.submit

        def submit_once(*args: Any, **kwargs: Any) -> Any:
            stream = submit(*args, **kwargs)
            h.engine.is_full = True
            return stream

        h.engine.submit = submit_once  # type: ignore[method-assign]
        response = await h.post(CHAT, chat(n=2))
    assert response.status_code == 429
    assert [one.is_cancelled for one in h.engine.submitted] == [True]


@async_test
async def test_failure_before_the_first_token_is_a_status() -> None:
    async with serving(Answer("", finish_reason="error", error="out of memory")) as h:
        response = await h.post(CHAT, chat(stream=True))
    assert response.status_code == 503
    assert response.json()["error"]["message"] == "out of memory"


@async_test
async def test_failure_after_the_first_token_is_an_event_without_done() -> None:
    async with serving(Answer("abc", finish_reason="error", error="it broke")) as h:
        response = await h.post(CHAT, chat(stream=True))
        assert response.status_code == 200
        assert "[DONE]" not in response.text
        with pytest.raises(openai.APIError, match="it broke"):
            async for _ in await h.client.chat.completions.create(**chat(stream=True)):
                pass
        unstreamed = await h.post(CHAT, chat())
    assert unstreamed.status_code == 503


@pytest.mark.parametrize("stream", [False, True])
@async_test
async def test_our_own_bug_is_a_logged_500_without_details(stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    def broken(*args: Any, **kwargs: Any) -> Answer:
        raise AssertionError("secret detail")

    async with serving() as h:
        h.engine.submit = broken  # type: ignore[method-assign, assignment]
        response = await h.post(CHAT, chat(stream=stream))
    assert response.status_code == 500
    assert "secret" not in response.text
    assert "secret detail" in caplog.text


@async_test
async def test_tokenize_errors_name_the_field() -> None:
    async with serving() as h:
        both = await h.post("/tokenize", {"prompt": "a", "messages": [USER]})
        ids = await h.post("/detokenize", {"tokens": [1, 100_000]})
    assert both.json()["error"]["param"] == "prompt"
    assert ids.json()["error"]["param"] == "tokens[1]"
