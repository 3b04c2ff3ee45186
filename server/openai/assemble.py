"""One body out of the chunks of a streamed answer: the only way in which an unstreamed answer comes about.

So both are equal by construction; tests/server/openai checks it for the `openai` client's own accumulation too.
"""

from collections.abc import AsyncIterator
from typing import Any

from server.openai.protocol.chunks import (
    Body,
    ChatChoice,
    ChatChunk,
    CompletionChoice,
    CompletionChunk,
    ToolCallDelta,
    Usage,
)


async def assemble_completion(chunks: AsyncIterator[CompletionChunk]) -> Body:
    """A `text_completion` object."""
    choices: dict[int, dict[str, Any]] = {}
    head: CompletionChunk | None = None
    usage: Usage | None = None
    async for chunk in chunks:
        head = head or chunk
        usage = chunk.get("usage") or usage
        for part in chunk["choices"]:
            _add_completion(choices.setdefault(part["index"], _new_completion(part["index"])), part)
    assert head is not None, "a backend yields at least the usage chunk"
    return _body(head, "text_completion", choices, usage)


async def assemble_chat(chunks: AsyncIterator[ChatChunk]) -> Body:
    """A `chat.completion` object."""
    choices: dict[int, dict[str, Any]] = {}
    head: ChatChunk | None = None
    usage: Usage | None = None
    async for chunk in chunks:
        head = head or chunk
        usage = chunk.get("usage") or usage
        for part in chunk["choices"]:
            _add_chat(choices.setdefault(part["index"], _new_chat(part["index"])), part)
    assert head is not None, "a backend yields at least the usage chunk"
    for choice in choices.values():
        _close_message(choice["message"])
    return _body(head, "chat.completion", choices, usage)


def _body(head: Any, kind: str, choices: dict[int, dict[str, Any]], usage: Usage | None) -> Body:
    return {
        "id": head["id"],
        "object": kind,
        "created": head["created"],
        "model": head["model"],
        "system_fingerprint": head["system_fingerprint"],
        "choices": [choices[index] for index in sorted(choices)],
        "usage": usage,
    }


def _new_completion(index: int) -> dict[str, Any]:
    return {"index": index, "text": "", "logprobs": None, "finish_reason": None}


def _add_completion(choice: dict[str, Any], part: CompletionChoice) -> None:
    choice["text"] += part["text"]
    if part["finish_reason"] is not None:
        choice["finish_reason"] = part["finish_reason"]
    logprobs = part["logprobs"]
    if logprobs is None:
        return
    if choice["logprobs"] is None:
        choice["logprobs"] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for key, column in choice["logprobs"].items():
        column.extend(logprobs[key])  # type: ignore[literal-required]


def _new_chat(index: int) -> dict[str, Any]:
    message: dict[str, Any] = {
        "role": "assistant",
        "content": "",
        "refusal": None,
        "reasoning_content": "",
        "tool_calls": [],
    }
    return {"index": index, "message": message, "logprobs": None, "finish_reason": None}


def _add_chat(choice: dict[str, Any], part: ChatChoice) -> None:
    message, delta = choice["message"], part["delta"]
    message["content"] += delta.get("content") or ""
    message["reasoning_content"] += delta.get("reasoning_content") or ""
    for call in delta.get("tool_calls") or ():
        _add_call(message["tool_calls"], call)
    if part["finish_reason"] is not None:
        choice["finish_reason"] = part["finish_reason"]
    if part["logprobs"] is not None:
        if choice["logprobs"] is None:
            choice["logprobs"] = {"content": [], "refusal": None}
        choice["logprobs"]["content"].extend(part["logprobs"]["content"])


def _add_call(calls: list[dict[str, Any]], delta: ToolCallDelta) -> None:
    function = delta["function"]
    if delta["index"] == len(calls):
        calls.append({"id": delta["id"], "type": "function", "function": {"name": function["name"], "arguments": ""}})
    calls[delta["index"]]["function"]["arguments"] += function.get("arguments", "")


def _close_message(message: dict[str, Any]) -> None:
    """Absent parts are absent, and a message that only calls tools has null content, as OpenAI has it."""
    if not message["reasoning_content"]:
        del message["reasoning_content"]
    if not message["tool_calls"]:
        del message["tool_calls"]
    elif not message["content"]:
        message["content"] = None
