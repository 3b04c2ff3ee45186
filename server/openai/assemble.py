"""One answer out of the chunks of a streamed one: what an unstreamed request is sent, and what the trace keeps.

The only way in which an unstreamed answer comes about, so both are equal by construction; tests/server/openai checks
it for the `openai` client's own accumulation too.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from server.openai.protocol.chunks import (
    Body,
    ChatChoice,
    CompletionChoice,
    ToolCallDelta,
    Usage,
)


class Draft:
    """A response in the making: `completion_draft()` or `chat_draft()`."""

    def __init__(self, kind: "_Kind") -> None:
        self._kind = kind
        self._head: Mapping[str, Any] | None = None
        self._choices: dict[int, dict[str, Any]] = {}
        self.usage: Usage | None = None

    @property
    def id(self) -> str | None:
        """Of the response; None before the first chunk."""
        return None if self._head is None else self._head["id"]

    def add(self, chunk: Mapping[str, Any]) -> None:
        self._head = self._head or chunk
        self.usage = chunk.get("usage") or self.usage
        for part in chunk["choices"]:
            index = part["index"]
            if index not in self._choices:
                self._choices[index] = {"index": index, **self._kind.new()}
            self._kind.add(self._choices[index], part)

    def messages(self) -> list[tuple[dict[str, Any], str | None]]:
        """Every choice so far as an assistant message, and its finish reason."""
        return [(self._kind.message(choice), choice["finish_reason"]) for choice in self._in_order()]

    def body(self) -> Body:
        """The unstreamed response."""
        head = self._head
        assert head is not None, "a backend yields at least the usage chunk"
        return {
            "id": head["id"],
            "object": self._kind.object,
            "created": head["created"],
            "model": head["model"],
            "system_fingerprint": head["system_fingerprint"],
            "choices": [self._kind.finished(choice) for choice in self._in_order()],
            "usage": self.usage,
        }

    def _in_order(self) -> list[dict[str, Any]]:
        return [self._choices[index] for index in sorted(self._choices)]


@dataclass(frozen=True, slots=True)
class _Kind:
    """What differs between the two routes."""

    object: Literal["text_completion", "chat.completion"]
    new: Callable[[], dict[str, Any]]
    add: Callable[[dict[str, Any], Any], None]
    message: Callable[[Mapping[str, Any]], dict[str, Any]]
    finished: Callable[[dict[str, Any]], dict[str, Any]]


def completion_draft() -> Draft:
    return Draft(
        _Kind(
            "text_completion",
            new=lambda: {"text": "", "logprobs": None, "finish_reason": None},
            add=_add_completion,
            message=lambda choice: {"role": "assistant", "content": choice["text"]},
            finished=dict,
        )
    )


def chat_draft() -> Draft:
    return Draft(
        _Kind(
            "chat.completion",
            new=_new_chat,
            add=_add_chat,
            message=lambda choice: _closed(choice["message"]),
            finished=lambda choice: {**choice, "message": _closed(choice["message"])},
        )
    )


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


def _new_chat() -> dict[str, Any]:
    message: dict[str, Any] = {
        "role": "assistant",
        "content": "",
        "refusal": None,
        "reasoning_content": "",
        "tool_calls": [],
    }
    return {"message": message, "logprobs": None, "finish_reason": None}


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
