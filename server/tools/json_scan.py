"""Incremental JSON: a strict scanner for one value, fed a character at a time, with an explicit stack.

It says for every character whether the value goes on, ends with it, ended before it, or is no JSON. Nothing is built:
callers keep the text. One leniency, because small models write it often: raw control characters inside strings (a
newline in a piece of code) pass; `escape_control` turns them into valid JSON.
"""

import re
from enum import Enum, auto

from server.tools.formats import WHITESPACE

_NUMBER_OR_WORD = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?|true|false|null")
_SCALAR_CHARACTERS = frozenset("+-.0123456789abcdefghijklmnopqrstuvwxyzE")
_HEX = frozenset("0123456789abcdefABCDEF")
_SHORT_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\b": "\\b", "\f": "\\f"}


class Scan(Enum):
    """What one character did to the value."""

    MORE = auto()
    DONE = auto()
    """The character was the value's last."""
    DONE_BEFORE = auto()
    """The value (a number or a word) ended before this character, which was not taken."""
    ERROR = auto()
    """The character cannot follow and was not taken."""


class _State(Enum):
    VALUE = auto()
    VALUE_OR_END = auto()  # just after [
    KEY = auto()
    KEY_OR_END = auto()  # just after {
    COLON = auto()
    COMMA_OR_END = auto()
    STRING = auto()
    ESCAPE = auto()
    HEX = auto()
    SCALAR = auto()


class JsonScanner:
    """Scans one JSON value; make a new one for the next. Leading whitespace is accepted, trailing is the caller's."""

    __slots__ = ("_hex_left", "_is_key", "_scalar", "_stack", "_state")

    def __init__(self) -> None:
        self._state = _State.VALUE
        self._stack: list[str] = []
        self._is_key = False
        self._scalar = ""
        self._hex_left = 0

    @property
    def in_string(self) -> bool:
        """True between a string's quotes: here a control character is data."""
        return self._state is _State.STRING

    def feed(self, ch: str) -> Scan:
        """Take one character; see `Scan`."""
        state = self._state
        if state is _State.STRING:
            return self._feed_string(ch)
        if state is _State.ESCAPE:
            return self._feed_escape(ch)
        if state is _State.HEX:
            return self._feed_hex(ch)
        if state is _State.SCALAR:
            return self._feed_scalar(ch)
        if ch in WHITESPACE:
            return Scan.MORE
        if state in (_State.VALUE, _State.VALUE_OR_END):
            return self._feed_value(ch)
        return self._feed_structure(ch)

    def _feed_value(self, ch: str) -> Scan:
        if ch == "]" and self._state is _State.VALUE_OR_END:
            return self._close("[")
        if ch == '"':
            self._is_key = False
            self._state = _State.STRING
        elif ch == "{":
            self._stack.append(ch)
            self._state = _State.KEY_OR_END
        elif ch == "[":
            self._stack.append(ch)
            self._state = _State.VALUE_OR_END
        elif ch in "-0123456789tfn":
            self._scalar = ch
            self._state = _State.SCALAR
        else:
            return Scan.ERROR
        return Scan.MORE

    def _feed_structure(self, ch: str) -> Scan:
        """A character between values: keys, colons, commas and closing brackets."""
        state = self._state
        if ch == '"' and state in (_State.KEY, _State.KEY_OR_END):
            self._is_key = True
            self._state = _State.STRING
        elif ch == ":" and state is _State.COLON:
            self._state = _State.VALUE
        elif ch == "," and state is _State.COMMA_OR_END:
            self._state = _State.KEY if self._stack[-1] == "{" else _State.VALUE
        elif ch == "}" and state in (_State.KEY_OR_END, _State.COMMA_OR_END):
            return self._close("{")
        elif ch == "]" and state is _State.COMMA_OR_END:
            return self._close("[")
        else:
            return Scan.ERROR
        return Scan.MORE

    def _close(self, opened_by: str) -> Scan:
        if self._stack[-1] != opened_by:
            return Scan.ERROR
        self._stack.pop()
        return self._value_ended()

    def _value_ended(self) -> Scan:
        self._state = _State.COMMA_OR_END
        return Scan.MORE if self._stack else Scan.DONE

    def _feed_string(self, ch: str) -> Scan:
        if ch == "\\":
            self._state = _State.ESCAPE
        elif ch == '"':
            if not self._is_key:
                return self._value_ended()
            self._state = _State.COLON
        return Scan.MORE

    def _feed_escape(self, ch: str) -> Scan:
        if ch == "u":
            self._hex_left = 4
            self._state = _State.HEX
        elif ch in '"\\/bfnrt':
            self._state = _State.STRING
        else:
            return Scan.ERROR
        return Scan.MORE

    def _feed_hex(self, ch: str) -> Scan:
        if ch not in _HEX:
            return Scan.ERROR
        self._hex_left -= 1
        if self._hex_left == 0:
            self._state = _State.STRING
        return Scan.MORE

    def _feed_scalar(self, ch: str) -> Scan:
        if ch in _SCALAR_CHARACTERS:
            self._scalar += ch
            return Scan.MORE
        if not _NUMBER_OR_WORD.fullmatch(self._scalar):
            return Scan.ERROR
        if self._value_ended() is Scan.DONE:
            return Scan.DONE_BEFORE
        return Scan.MORE if ch in WHITESPACE else self._feed_structure(ch)


def escape_control(ch: str) -> str:
    """The JSON escape of a raw control character inside a string; any other character as it is."""
    if ch >= " ":
        return ch
    return _SHORT_ESCAPES.get(ch) or f"\\u{ord(ch):04x}"
