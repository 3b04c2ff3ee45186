"""Streaming parser of tool calls in a model's answer: text in, OpenAI-shaped events out.

For any way of cutting an answer into chunks, the events put together are the same; the unstreamed answer is the
one-chunk run. Rules:

- A call is announced (`ToolCallStart`) once its name is complete and its arguments begin with `{`. Text of a call that
  turns out malformed or unterminated before that, or that names a tool that was not offered, is content, verbatim.
- An announced call whose arguments break off keeps what it has (as OpenAI's do at `max_tokens`); text from the first
  impossible character on is content again.
- Whitespace between content and a call, between calls, and after the last call is dropped; all else is kept.
- `parallel_tool_calls=False`: the first call is kept and everything after it is dropped. `done` is then True and the
  caller may cancel the generation.

Not covered: whether arguments fit the tool's schema (a grammar ensures that, or nobody does).
"""

import secrets
from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import Enum, auto

from server.tools.call_object import CallObject
from server.tools.formats import WHITESPACE, ToolFormat
from server.tools.json_scan import Scan
from server.tools.stop import held_back_length


@dataclass(frozen=True, slots=True)
class ContentDelta:
    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    index: int
    text: str


Event = ContentDelta | ToolCallStart | ToolCallArguments


def new_call_id() -> str:
    """`call_` and 24 URL-safe characters: 144 random bits, so ids are unique across servers."""
    return "call_" + secrets.token_urlsafe(18)


class _State(Enum):
    START = auto()  # formats whose answer may begin with a bare call
    CONTENT = auto()
    OPENING = auto()  # after the marker, before the first brace
    CALL = auto()
    TAIL = auto()  # after a call, before the separator or the closing


class ToolCallParser:
    """One answer's parser: `push` every piece of text, then `finish` once; keep the events' order.

    `names` are the offered tools. If the format's marker is a special token of the vocabulary the detokenizer must
    not skip it (`Detokenizer(skip_special=False)` while tools are offered), or the calls would look like content.
    """

    def __init__(
        self,
        tool_format: ToolFormat,
        names: Collection[str],
        *,
        parallel_tool_calls: bool = True,
        make_id: Callable[[], str] = new_call_id,
    ) -> None:
        self.num_calls = 0
        """Calls announced so far: more than none makes the finish reason `tool_calls`."""
        self.done = False
        """Nothing that follows can matter (only with `parallel_tool_calls=False`)."""
        self._format = tool_format
        self._names = frozenset(names)
        self._parallel = parallel_tool_calls
        self._make_id = make_id
        self._state = _State.START if tool_format.starts_bare else _State.CONTENT
        self._buffer = ""  # not yet looked at, or held back
        self._lead = ""  # whitespace and marker before an unannounced call
        self._raw: list[str] = []  # an unannounced call's text after `_lead`
        self._call = CallObject((), ())
        self._call_is_last = False  # no content since the last call: trailing whitespace is dropped
        self._events: list[Event] = []

    @property
    def may_end_early(self) -> bool:
        """`done` may come before the answer's end."""
        return not self._parallel

    def push(self, text: str) -> list[Event]:
        """Take the next piece of the answer; returns what became certain."""
        if not self.done:
            self._buffer += text
            self._run()
        return self._take_events()

    def finish(self) -> list[Event]:
        """The answer's end: whatever was held back, as content unless it is a call's tail."""
        while self._state is _State.OPENING or (self._state is _State.CALL and not self._call.announced):
            self._reject("")
            self._run()
        if self._state in (_State.START, _State.CONTENT) and not self.done:
            if self._buffer.strip(WHITESPACE) or not self._call_is_last:
                self._emit_content(self._buffer)
            self._buffer = ""
        self.done = True
        return self._take_events()

    def _take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _run(self) -> None:
        steps = {
            _State.START: self._at_start,
            _State.CONTENT: self._in_content,
            _State.OPENING: self._in_opening,
            _State.CALL: self._in_call,
            _State.TAIL: self._in_tail,
        }
        while not self.done and steps[self._state]():
            pass

    # Each step works on the buffer and returns False when it needs more text.

    def _at_start(self) -> bool:
        stripped = self._buffer.lstrip(WHITESPACE)
        if not stripped:
            return False
        if stripped[0] == "{":
            self._begin_call("", len(self._buffer) - len(stripped))
        else:
            self._state = _State.CONTENT
        return True

    def _in_content(self) -> bool:
        marker = self._format.marker
        found = self._buffer.find(marker)
        end = found if found >= 0 else len(self._buffer) - held_back_length(self._buffer, (marker,))
        body = self._buffer[:end].rstrip(WHITESPACE)
        self._emit_content(body)
        self._buffer = self._buffer[len(body) :]
        if found < 0:
            return False
        lead_length = end - len(body) + len(marker)
        self._lead, self._buffer = self._buffer[:lead_length], self._buffer[lead_length:]
        self._raw = []
        self._state = _State.OPENING
        return True

    def _in_opening(self) -> bool:
        opening = self._format.opening
        rest = self._buffer.lstrip(WHITESPACE)
        if rest.startswith(opening):
            rest = rest[len(opening) :].lstrip(WHITESPACE)
        elif rest:
            self._reject("")
            return True
        if not rest:
            return False
        if rest[0] == "{":
            self._begin_call(self._lead, len(self._buffer) - len(rest))
        else:
            self._reject("")
        return True

    def _begin_call(self, lead: str, skip: int) -> None:
        """The buffer holds a brace at `skip`; the text before it belongs to the call until it is announced."""
        self._lead = lead
        self._raw = [self._buffer[:skip]]
        self._buffer = self._buffer[skip:]
        self._call = CallObject(self._names, self._format.argument_keys)
        self._state = _State.CALL

    def _in_call(self) -> bool:
        call, text = self._call, self._buffer
        self._buffer = ""
        for i, ch in enumerate(text):
            announced = call.announced
            status = call.feed(ch)
            if call.announced and not announced:
                self._announce()
            if status is Scan.MORE:
                continue
            taken = i + 1 if status is Scan.DONE else i
            if not call.announced:
                self._raw.append(text[:taken])
                self._reject(text[taken:])
            else:
                self._end_call(text[taken:])
            return True
        if call.announced:
            self._emit_arguments()
        else:
            self._raw.append(text)
        return False

    def _announce(self) -> None:
        assert self._call.name is not None
        self._events.append(ToolCallStart(self.num_calls, self._make_id(), self._call.name))
        self.num_calls += 1

    def _end_call(self, rest: str) -> None:
        self._emit_arguments()
        self._call_is_last = True
        self._buffer = rest
        self._state = _State.TAIL
        self.done = not self._parallel

    def _reject(self, rest: str) -> None:
        """Not a call after all: its lead is content, the text after the lead is looked at again."""
        self._emit_content(self._lead)
        self._buffer = "".join(self._raw) + self._buffer + rest
        self._lead = ""
        self._raw = []
        self._state = _State.CONTENT

    def _in_tail(self) -> bool:
        """Small models add or drop a brace at the end of a Hermes call; the closing tag forgives both."""
        form = self._format
        rest = self._buffer.lstrip(WHITESPACE + "}" if form.closing else WHITESPACE)
        if form.closing and rest.startswith(form.closing):
            self._buffer = rest[len(form.closing) :]
            self._state = _State.CONTENT
            return True
        if form.separator and rest.startswith(form.separator):
            after = rest[len(form.separator) :].lstrip(WHITESPACE)
            if not after:
                return False
            if after[0] == "{":
                self._begin_call("", len(self._buffer) - len(after))
                return True
        elif not rest or (form.closing and form.closing.startswith(rest)):
            return False
        self._state = _State.CONTENT
        return True

    def _emit_content(self, text: str) -> None:
        if text:
            self._call_is_last = False
            self._events.append(ContentDelta(text))

    def _emit_arguments(self) -> None:
        text = self._call.take_arguments()
        if text:
            self._events.append(ToolCallArguments(self.num_calls - 1, text))
