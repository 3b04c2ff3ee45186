"""An upstream's answer in our wire's shapes: its objects in, choices of our chunks out, for chat and for completions.

Whatever the upstream left out or added, what comes out is as the native backend would have sent it: a role first, then
deltas, one end for each choice, all under the head of the first object. The ends are kept until the upstream is done,
so that an answer that breaks off has none. Unknown fields are dropped; values of the wrong type are an error (503), as
an answer that cannot be read must not be logged as if it could.
"""

import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from server.backends.upstream_calls import ToolCalls
from server.backends.upstream_fields import (
    Reason,
    read_chat_logprobs,
    read_completion_logprobs,
    read_content,
    read_reason,
    read_text,
    read_usage,
    unreadable,
)
from server.errors import ServerUnavailableError
from server.openai.protocol.chunks import (
    ChatChoice,
    ChatDelta,
    ChatHead,
    CompletionChoice,
    CompletionHead,
    Usage,
)


class UpstreamAnswer(Protocol):
    """ChatAnswer or CompletionAnswer."""

    stem: "Stem"

    @property
    def head(self) -> Mapping[str, Any]: ...

    def push(self, value: Mapping[str, Any]) -> Iterator[Any]: ...

    def finish(self) -> Iterator[Any]: ...


class Stem:
    """What both kinds share: id, time, usage and finish reasons."""

    def __init__(self, id_prefix: str) -> None:
        self.id: str | None = None
        self.created = int(time.time())
        self.fingerprint: str | None = None
        self.model: str | None = None
        """What answers, in the upstream's words: often the exact version of what was asked for."""
        self.usage: Usage | None = None
        """The last one that was sent: some count along. None: the upstream never said."""
        self.reasons: dict[int, Reason | None] = {}
        """Of every choice that was seen; None until it ends."""
        self._id_prefix = id_prefix

    def read(self, value: Mapping[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
        """The choices of one object by index, their ends noted."""
        if self.id is None:
            given_id, created = value.get("id"), value.get("created")
            self.id = given_id if isinstance(given_id, str) and given_id else self._id_prefix + uuid.uuid4().hex
            self.created = created if isinstance(created, int) and created > 0 else self.created
        if self.model is None and isinstance(value.get("model"), str):
            self.model = value["model"]
        fingerprint = value.get("system_fingerprint")
        if self.fingerprint is None and isinstance(fingerprint, str):
            self.fingerprint = fingerprint
        self.usage = read_usage(value.get("usage")) or self.usage
        choices = value.get("choices")
        if choices is not None and not isinstance(choices, list):
            raise unreadable("choices", choices)
        for position, choice in enumerate(choices or ()):
            if not isinstance(choice, dict):
                raise unreadable("choices", choice)
            index = choice.get("index")
            index = index if isinstance(index, int) and index >= 0 else position
            self.reasons[index] = read_reason(choice.get("finish_reason")) or self.reasons.get(index)
            yield index, choice

    def end(self, *, is_done: bool) -> None:
        """Raises ServerUnavailableError for an answer that is not whole. `is_done`: the upstream said that it was."""
        if not self.reasons:
            raise ServerUnavailableError("The upstream answered without a single choice.")
        if not is_done and None in self.reasons.values():
            raise ServerUnavailableError("The upstream ended its answer before it was complete.")


class ChatAnswer:
    def __init__(self, model: str) -> None:
        self.stem = Stem("chatcmpl-")
        self._model = model
        self._calls: dict[int, ToolCalls] = {}
        self._begun: set[int] = set()

    @property
    def head(self) -> ChatHead:
        stem = self.stem
        assert stem.id is not None, "asked for before the first object"
        return {
            "id": stem.id,
            "object": "chat.completion.chunk",
            "created": stem.created,
            "model": self._model,
            "system_fingerprint": stem.fingerprint,
        }

    def push(self, value: Mapping[str, Any]) -> Iterator[ChatChoice]:
        """Streamed choices have a `delta`, those of a whole answer a `message`: what is in it is the same."""
        for index, choice in self.stem.read(value):
            given = choice.get("delta") or choice.get("message") or {}
            if not isinstance(given, dict):
                raise unreadable("delta", given)
            logprobs = read_chat_logprobs(choice.get("logprobs"))
            delta = self._delta(index, given)
            if delta or logprobs is not None:
                yield from self._begin(index)
                yield {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}

    def finish(self) -> Iterator[ChatChoice]:
        for index, reason in sorted(self.stem.reasons.items()):
            calls = self._calls.get(index)
            if calls is not None:
                calls.finish()
            yield from self._begin(index)
            end: Reason = reason or ("stop" if calls is None else "tool_calls")
            yield {"index": index, "delta": {}, "logprobs": None, "finish_reason": end}

    def _begin(self, index: int) -> Iterator[ChatChoice]:
        """The role, once."""
        if index not in self._begun:
            self._begun.add(index)
            role: ChatDelta = {"role": "assistant", "content": "", "refusal": None}
            yield {"index": index, "delta": role, "logprobs": None, "finish_reason": None}

    def _delta(self, index: int, given: Mapping[str, Any]) -> ChatDelta:
        """Only what it adds."""
        content, thoughts = read_content(given.get("content"))
        delta: ChatDelta = {}
        if content:
            delta["content"] = content
        # Some send the same text under both names.
        reasoning = read_text("reasoning_content", given.get("reasoning_content")) or thoughts
        if not reasoning and isinstance(given.get("reasoning"), str):
            reasoning = given["reasoning"]
        if reasoning:
            delta["reasoning_content"] = reasoning
        refusal = read_text("refusal", given.get("refusal"))
        if refusal:
            delta["refusal"] = refusal
        if given.get("tool_calls"):
            calls = self._calls.setdefault(index, ToolCalls()).push(given["tool_calls"])
            if calls:
                delta["tool_calls"] = calls
        return delta


class CompletionAnswer:
    def __init__(self, model: str) -> None:
        self.stem = Stem("cmpl-")
        self._model = model

    @property
    def head(self) -> CompletionHead:
        stem = self.stem
        assert stem.id is not None, "asked for before the first object"
        return {
            "id": stem.id,
            "object": "text_completion",
            "created": stem.created,
            "model": self._model,
            "system_fingerprint": stem.fingerprint,
        }

    def push(self, value: Mapping[str, Any]) -> Iterator[CompletionChoice]:
        for index, choice in self.stem.read(value):
            text = read_text("text", choice.get("text"))
            logprobs = read_completion_logprobs(choice.get("logprobs"))
            if text or logprobs is not None:
                yield {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}

    def finish(self) -> Iterator[CompletionChoice]:
        for index, reason in sorted(self.stem.reasons.items()):
            end = "stop" if reason in (None, "tool_calls") else reason
            yield {"index": index, "text": "", "logprobs": None, "finish_reason": end}  # type: ignore[typeddict-item]
