"""A streamed answer, put together, equals the unstreamed one, however the engine cut its tokens into outputs."""

import asyncio
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.server.openai.harness import MODEL, serving
from tests.server.openai.scripted import Answer
from tests.server.openai.validator import events

TOOLS = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("f", "get")]
PIECES = st.sampled_from(
    [
        "<think>",
        "</think>",
        "<tool_call>",
        "</tool_call>",
        '\n{"name": "f", "arguments": {"a": "ü}{"}}\n',
        '{"name": "get", "arguments": {}}',
        '{"name": "unknown", "arguments": {}}',
        '{"name": "f", "arg',
        " ",
        "\n\n",
        "wörd",
        "😀",
        "STOP",
        "ST",
        "<tool",
        "<",
    ]
)
ANSWERS = st.lists(PIECES, max_size=12).map("".join)
CUTS = st.lists(st.integers(1, 9), max_size=60)


def assembled(chunks: list[Any]) -> dict[str, Any]:
    """As a client would: everything but the tool calls' random ids."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "calls": {}}
    tokens: list[str] = []
    reasons: list[str] = []
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        delta = choice["delta"]
        for key in ("content", "reasoning_content"):
            message[key] += delta.get(key) or ""
        for call in delta.get("tool_calls") or ():
            function = call["function"]
            name, arguments = message["calls"].get(call["index"], ("", ""))
            message["calls"][call["index"]] = (name + function.get("name", ""), arguments + function["arguments"])
        if choice["logprobs"]:
            tokens += [entry["token"] for entry in choice["logprobs"]["content"]]
        reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
    return {**message, "tokens": tokens, "reasons": reasons}


def unstreamed(body: Any) -> dict[str, Any]:
    choice = body["choices"][0]
    message = choice["message"]
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls") or ()]
    return {
        "content": message["content"] or "",
        "reasoning_content": message.get("reasoning_content", ""),
        "calls": dict(enumerate(calls)),
        "tokens": [entry["token"] for entry in (choice["logprobs"] or {"content": []})["content"]],
        "reasons": [choice["finish_reason"]],
    }


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    text=ANSWERS,
    cuts=CUTS,
    offers_tools=st.booleans(),
    parallel=st.booleans(),
    stops=st.booleans(),
    logprobs=st.booleans(),
)
@example(
    text='<tool_call>{"name": "f", "arguments": {}}</tool_call> and more',
    cuts=[45, 3],
    offers_tools=True,
    parallel=False,
    stops=False,
    logprobs=False,
)
def test_chat(text: str, cuts: list[int], offers_tools: bool, parallel: bool, stops: bool, logprobs: bool) -> None:
    body: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "logprobs": logprobs}
    if offers_tools:
        body |= {"tools": TOOLS, "parallel_tool_calls": parallel}
    if stops:
        body["stop"] = ["STOP"]

    async def both() -> tuple[Any, Any]:
        async with serving(Answer(text, cuts=[])) as h:
            whole = (await h.post("/v1/chat/completions", body)).json()
        async with serving(Answer(text, cuts=cuts)) as h:
            streamed = await h.post(
                "/v1/chat/completions", {**body, "stream": True, "stream_options": {"include_usage": True}}
            )
        return whole, events(streamed.content)[:-1]

    whole, chunks = asyncio.run(both())
    assert assembled(chunks) == unstreamed(whole)
    assert chunks[-1]["usage"] == whole["usage"]


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(text=ANSWERS, cuts=CUTS, echo=st.booleans(), stops=st.booleans())
def test_completions(text: str, cuts: list[int], echo: bool, stops: bool) -> None:
    body = {"model": MODEL, "prompt": "prömpt", "max_tokens": 500, "logprobs": 1, "echo": echo}
    if stops:
        body["stop"] = ["STOP"]

    async def both() -> tuple[Any, Any]:
        async with serving(Answer(text, cuts=[])) as h:
            whole = (await h.post("/v1/completions", body)).json()
        async with serving(Answer(text, cuts=cuts)) as h:
            streamed = await h.post("/v1/completions", {**body, "stream": True})
        return whole["choices"][0], [chunk["choices"][0] for chunk in events(streamed.content)[:-1]]

    whole, parts = asyncio.run(both())
    assert "".join(part["text"] for part in parts) == whole["text"]
    assert parts[-1]["finish_reason"] == whole["finish_reason"]
    for column in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        joined = [entry for part in parts if part["logprobs"] for entry in part["logprobs"][column]]
        assert joined == whole["logprobs"][column]
