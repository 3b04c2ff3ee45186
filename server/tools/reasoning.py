"""Splits a leading `<think>...</think>` off an answer: reasoning and content, streamed.

The block counts only at the answer's very beginning (whitespace aside), or when the chat template has already
opened it in the prompt (`opens_reasoning`). Whitespace around the reasoning, and before the content that follows it,
is dropped; an answer without the block passes unchanged. A block that never ends is all reasoning. For any chunking
the pieces put together are the same.
"""

from dataclasses import dataclass
from enum import Enum, auto

from server.tools.formats import WHITESPACE
from server.tools.parser import ContentDelta
from server.tools.stop import held_back_length

OPEN = "<think>"
CLOSE = "</think>"


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    text: str


def opens_reasoning(prompt: str) -> bool:
    """True when the rendered prompt ends inside a reasoning block that its template has just opened."""
    return prompt.rstrip(WHITESPACE).endswith(OPEN)


class _State(Enum):
    START = auto()
    OPENED = auto()  # after the tag, before the first character of reasoning
    REASONING = auto()
    CLOSED = auto()  # after the closing tag, before the first character of content
    CONTENT = auto()


class ReasoningSplitter:
    """One answer's splitter; `opened` says that the prompt already holds the opening tag."""

    def __init__(self, *, opened: bool = False) -> None:
        self._opened = opened
        self._state = _State.START
        self._buffer = ""

    def push(self, text: str) -> list[ReasoningDelta | ContentDelta]:
        """Take the next piece of the answer; returns what became certain."""
        self._buffer += text
        out: list[ReasoningDelta | ContentDelta] = []
        steps = {
            _State.START: self._at_start,
            _State.OPENED: self._skip_space,
            _State.REASONING: self._in_reasoning,
            _State.CLOSED: self._skip_space,
            _State.CONTENT: self._in_content,
        }
        while self._buffer and steps[self._state](out):
            pass
        return out

    def finish(self) -> list[ReasoningDelta | ContentDelta]:
        """The answer's end: what was held back, but for whitespace that ends the reasoning."""
        rest, self._buffer = self._buffer, ""
        if self._state is _State.REASONING or (self._state is _State.START and self._opened):
            rest = rest.rstrip(WHITESPACE)
            rest = rest.lstrip(WHITESPACE) if self._state is _State.START else rest
            return [ReasoningDelta(rest)] if rest else []
        if self._state is _State.START and rest:
            return [ContentDelta(rest)]
        return []

    # Each step works on the buffer and returns False when it needs more text.

    def _at_start(self, out: list[ReasoningDelta | ContentDelta]) -> bool:
        stripped = self._buffer.lstrip(WHITESPACE)
        if stripped.startswith(OPEN):
            self._buffer = stripped[len(OPEN) :]
            self._state = _State.OPENED
        elif OPEN.startswith(stripped):
            return False
        else:
            self._state = _State.OPENED if self._opened else _State.CONTENT
        return True

    def _skip_space(self, out: list[ReasoningDelta | ContentDelta]) -> bool:
        self._buffer = self._buffer.lstrip(WHITESPACE)
        if self._buffer:
            self._state = _State.REASONING if self._state is _State.OPENED else _State.CONTENT
        return bool(self._buffer)

    def _in_reasoning(self, out: list[ReasoningDelta | ContentDelta]) -> bool:
        found = self._buffer.find(CLOSE)
        end = found if found >= 0 else len(self._buffer) - held_back_length(self._buffer, (CLOSE,))
        body = self._buffer[:end].rstrip(WHITESPACE)
        if body:
            out.append(ReasoningDelta(body))
        if found < 0:
            self._buffer = self._buffer[len(body) :]
            return False
        self._buffer = self._buffer[found + len(CLOSE) :]
        self._state = _State.CLOSED
        return True

    def _in_content(self, out: list[ReasoningDelta | ContentDelta]) -> bool:
        out.append(ContentDelta(self._buffer))
        self._buffer = ""
        return False
