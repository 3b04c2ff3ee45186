"""One answer out of the chunks of a streamed one: what an unstreamed request is sent, and what the trace keeps.

The only way in which an unstreamed answer comes about, so both are equal by construction; tests/server/openai checks
it for the `openai` client's own accumulation too.
"""

from collections.abc import Mapping
from typing import Any, Literal, Protocol

from server.openai.protocol.chunks import (
    Body,
    ChatChoice,
    CompletionChoice,
    ToolCallDelta,
    Usage,
)


class Draft(Protocol):
    """ChatDraft or CompletionDraft."""

    @property
    def id(self) -> str | None:
        """Of the response; None before the first chunk."""

    @property
    def usage(self) -> Usage | None: ...

    def add(self, chunk: Mapping[str, Any]) -> None: ...

    def messages(self) -> list[tuple[dict[str, Any], str | None]]:
        """Every choice so far as an assistant message, and its finish reason."""

    def body(self) -> Body:
        """The unstreamed response."""


class CompletionDraft:
    """A `text_completion` object in the making."""

    def __init__(self) -> None:
        self._head: Mapping[str, Any] | None = None
        self._choices: dict[int, dict[str, Any]] = {}
        self.usage: Usage | None = None

    @property
    def id(self) -> str | None:
        return None if self._head is None else self._head["id"]

    def add(self, chunk: Mapping[str, Any]) -> None:
        self._head = self._head or chunk
        self.usage = chunk.get("usage") or self.usage
        for part in chunk["choices"]:
            _add_completion(self._choices.setdefault(part["index"], _new_completion(part["index"])), part)

    def messages(self) -> list[tuple[dict[str, Any], str | None]]:
        return [
            ({"role": "assistant", "content": choice["text"]}, choice["finish_reason"])
            for _, choice in sorted(self._choices.items())
        ]

    def body(self) -> Body:
        return _body(
            self._head, "text_completion", [self._choices[index] for index in sorted(self._choices)], self.usage
        )


class ChatDraft:
    """A `chat.completion` object in the making."""

    def __init__(self) -> None:
        self._head: Mapping[str, Any] | None = None
        self._choices: dict[int, dict[str, Any]] = {}
        self.usage: Usage | None = None

    @property
    def id(self) -> str | None:
        return None if self._head is None else self._head["id"]

    def add(self, chunk: Mapping[str, Any]) -> None:
        self._head = self._head or chunk
        self.usage = chunk.get("usage") or self.usage
        for part in chunk["choices"]:
            _add_chat(self._choices.setdefault(part["index"], _new_chat(part["index"])), part)

    def messages(self) -> list[tuple[dict[str, Any], str | None]]:
        return [(_closed(choice["message"]), choice["finish_reason"]) for _, choice in sorted(self._choices.items())]

    def body(self) -> Body:
        choices = [{**choice, "message": _closed(choice["message"])} for _, choice in sorted(self._choices.items())]
        return _body(self._head, "chat.completion", choices, self.usage)


def _body(
    head: Mapping[str, Any] | None,
    kind: Literal["text_completion", "chat.completion"],
    choices: list[dict[str, Any]],
    usage: Usage | None,
) -> Body:
    assert head is not None, "a backend yields at least the usage chunk"
    return {
        "id": head["id"],
        "object": kind,
        "created": head["created"],
        "model": head["model"],
        "system_fingerprint": head["system_fingerprint"],
        "choices": choices,
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
    if refusal := delta.get("refusal"):
        message["refusal"] = (message["refusal"] or "") + refusal
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


def _closed(message: Mapping[str, Any]) -> dict[str, Any]:
    """Absent parts are absent, and a message that only calls tools or refuses has null content, as OpenAI has it."""
    closed = {key: value for key, value in message.items() if value or key not in ("reasoning_content", "tool_calls")}
    if ("tool_calls" in closed or closed["refusal"]) and not closed["content"]:
        closed["content"] = None
    return closed
