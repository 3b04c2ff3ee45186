"""One tool call's JSON object, read a character at a time: `{"name": ..., "arguments": {...}}`.

The call becomes *announced* as soon as its name is known, is one of the offered tools, and its arguments begin with
`{`; from then on the arguments' text is handed out as it arrives. Before that, any fault makes the object an ERROR
and the caller treats its text as content. The keys may come in either order (arguments first are buffered); other
keys are skipped; arguments given as a string that holds a JSON object are unwrapped; absent or null arguments
are `{}`.

The arguments' text is the model's own, whitespace included, but for raw control characters inside strings, which are
escaped so that what a client parses is JSON.
"""

import json
from collections.abc import Container
from enum import Enum, auto

from server.tools.formats import WHITESPACE
from server.tools.json_scan import JsonScanner, Scan, escape_control


class _At(Enum):
    OPEN = auto()
    KEY = auto()
    IN_KEY = auto()
    COLON = auto()
    VALUE = auto()
    COMMA_OR_END = auto()


class CallObject:
    """Feed it from the opening brace on. `name` is set for good once `announced` is."""

    def __init__(self, names: Container[str], argument_keys: tuple[str, ...]) -> None:
        self.announced = False
        self.name: str | None = None
        self._names = names
        self._argument_keys = argument_keys
        self._at = _At.OPEN
        self._scanner = JsonScanner()
        self._text: list[str] = []  # of the key or value being read; not kept for arguments that stream
        self._key = ""
        self._arguments: str | None = None  # complete but unannounced, or not yet taken
        self._has_arguments = False
        self._streaming = False  # inside the arguments of an announced call
        self._out: list[str] = []

    def take_arguments(self) -> str:
        """Arguments' text since the last call; empty until announced."""
        if not self.announced or not self._out:
            return ""
        text = "".join(self._out)
        self._out.clear()
        return text

    def feed(self, ch: str) -> Scan:
        """Take one character. DONE: it closed the object. ERROR: it was not taken; `announced` tells what to do."""
        if self._at is _At.VALUE:
            return self._feed_value(ch)
        if self._at is _At.IN_KEY:
            return self._feed_key(ch)
        if ch in WHITESPACE and self._at is not _At.OPEN:
            return Scan.MORE
        if self._at is _At.COMMA_OR_END and ch == "}":
            return self._close()
        if self._at is _At.OPEN and ch == "{":
            self._at = _At.KEY
        elif self._at is _At.KEY and ch == '"':
            self._begin(_At.IN_KEY)
            self._feed_key(ch)
        elif self._at is _At.COLON and ch == ":":
            self._begin(_At.VALUE)
        elif self._at is _At.COMMA_OR_END and ch == ",":
            self._at = _At.KEY
        else:
            return Scan.ERROR
        return Scan.MORE

    def _begin(self, at: _At) -> None:
        self._at = at
        self._scanner = JsonScanner()
        self._text = []

    def _feed_key(self, ch: str) -> Scan:
        status = self._scanner.feed(ch)
        self._text.append(ch)
        if status is Scan.DONE:
            self._key = json.loads("".join(self._text), strict=False)
            self._at = _At.COLON
            return Scan.MORE
        return status

    def _feed_value(self, ch: str) -> Scan:
        if not self._text and not self._streaming:
            if ch in WHITESPACE:
                return Scan.MORE
            self._maybe_announce(ch)
        taken = escape_control(ch) if self._scanner.in_string else ch
        status = self._scanner.feed(ch)
        if status is Scan.ERROR:
            return status
        if status is not Scan.DONE_BEFORE:
            if self._streaming:
                self._out.append(taken)
            else:
                self._text.append(taken)
        if status is Scan.MORE:
            return status
        if not self._value_done():
            return Scan.ERROR
        return self.feed(ch) if status is Scan.DONE_BEFORE else Scan.MORE

    def _maybe_announce(self, first: str) -> None:
        """The first character of a value: arguments that begin with `{` after a known name start to stream."""
        if first == "{" and self.name is not None and self._key in self._argument_keys and not self._has_arguments:
            self._has_arguments = True
            self._streaming = True
            self.announced = True

    def _value_done(self) -> bool:
        """Keep what the value gave; False when it makes the call malformed."""
        self._at = _At.COMMA_OR_END
        if self._streaming:
            self._streaming = False
            return True
        text = "".join(self._text)
        if self._key == "name" and self.name is None:
            if not text.startswith('"') or (name := json.loads(text)) not in self._names:
                return False
            self.name = name
        elif self._key in self._argument_keys and not self._has_arguments:
            arguments = _unwrapped(text)
            if arguments is None:
                return False
            self._has_arguments = True
            self._arguments = arguments
        self._announce_buffered()
        return True

    def _announce_buffered(self) -> None:
        if self.name is not None and self._arguments is not None:
            self._out.append(self._arguments)
            self._arguments = None
            self.announced = True

    def _close(self) -> Scan:
        if self.name is None:
            return Scan.ERROR
        if not self._has_arguments:
            self._has_arguments = True
            self._arguments = "{}"
            self._announce_buffered()
        return Scan.DONE


def _unwrapped(text: str) -> str | None:
    """The arguments' object text of a complete value: an object, a string holding one, or null. None: neither."""
    if text.startswith("{"):
        return text
    if text == "null":
        return "{}"
    if not text.startswith('"'):
        return None
    inner = json.loads(text).strip(WHITESPACE)
    scanner = JsonScanner()
    if not inner.startswith("{"):
        return None
    for i, ch in enumerate(inner):
        status = scanner.feed(ch)
        if status is not Scan.MORE:
            return inner if status is Scan.DONE and i == len(inner) - 1 else None
    return None
