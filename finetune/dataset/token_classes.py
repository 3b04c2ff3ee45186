"""What each token of an answer is for: tool name, argument key, argument value, structure, thinking or answer.

The text is read by the server's own descriptions of tool calls (server/tools), so a call here is a call that the parser
reads back. Characters are classified first; a token that covers several classes takes the highest. Weights a class come
from a table; all are 1 unless a recipe says otherwise.
"""

import itertools
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from server.text.tokenizer import Tokenizer
from server.tools.call_object import CallObject
from server.tools.formats import WHITESPACE, ToolFormat
from server.tools.json_scan import Scan
from server.tools.reasoning import CLOSE, OPEN


class TokenClass(IntEnum):
    """In the order of precedence: a token `": 5` is a value, because only its value is hard to get right."""

    STRUCTURE = 0  # markers, braces, quotes, colons; the end of turn after a call
    ANSWER = 1  # plain text; the end of turn after it
    THINKING = 2
    ARGUMENT_KEY = 3
    ARGUMENT_VALUE = 4
    TOOL_NAME = 5


@dataclass(frozen=True)
class ClassWeights:
    """The loss weight of a token of each class."""

    structure: float = 1.0
    answer: float = 1.0
    thinking: float = 1.0
    argument_key: float = 1.0
    argument_value: float = 1.0
    tool_name: float = 1.0

    def table(self) -> NDArray[np.float32]:
        """[class]"""
        return np.array([getattr(self, kind.name.lower()) for kind in TokenClass], np.float32)


_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]|[^\s{}\[\],:"]+', re.DOTALL)


def classify_tokens(
    tokenizer: Tokenizer, tool_format: ToolFormat, names: Collection[str], token_ids: Sequence[int], *, opened: bool
) -> NDArray[np.uint8]:
    """[tokens of the answer], the end of turn included. `names`: the offered tools. `opened`: the prompt has opened a
    block of reasoning."""
    ends = tokenizer.eog_token_ids
    pieces = [b"" if token_id in ends else tokenizer.token_bytes(token_id) for token_id in token_ids]
    text = b"".join(pieces).decode("utf-8", "surrogateescape")
    of_chars = classify_text(text, tool_format, names, opened=opened)
    has_call = any(kind == TokenClass.TOOL_NAME for kind in of_chars)
    of_bytes = [
        kind
        for char, kind in zip(text, of_chars, strict=True)
        for _ in range(len(char.encode("utf-8", "surrogateescape")))
    ]
    found = np.empty(len(token_ids), np.uint8)
    start = 0
    for index, piece in enumerate(pieces):
        end = start + len(piece)
        fallback = TokenClass.STRUCTURE if has_call else TokenClass.ANSWER
        found[index] = max(of_bytes[start:end], default=fallback)
        start = end
    return found


def classify_text(text: str, tool_format: ToolFormat, names: Collection[str], *, opened: bool) -> list[TokenClass]:
    """[characters of the answer]"""
    classes = [TokenClass.ANSWER] * len(text)
    place = _mark_thinking(text, classes, opened=opened)
    known = frozenset(names)
    if tool_format.starts_bare and text[place:].lstrip(WHITESPACE).startswith("{"):
        place = _mark_section(text, classes, place, _skip(text, place), tool_format, known) or place
    while (found := text.find(tool_format.marker, place)) >= 0:
        inside = _skip(text, found + len(tool_format.marker))
        if text.startswith(tool_format.opening, inside):
            inside = _skip(text, inside + len(tool_format.opening))
        end = _mark_section(text, classes, found, inside, tool_format, known)
        place = found + len(tool_format.marker) if end is None else end
    return classes


def _mark_thinking(text: str, classes: list[TokenClass], *, opened: bool) -> int:
    """Returns where the rest begins."""
    start = _skip(text, 0)
    if not opened and not text.startswith(OPEN, start):
        return 0
    found = text.find(CLOSE, start)
    end = len(text) if found < 0 else found + len(CLOSE)
    classes[:end] = [TokenClass.THINKING] * end
    return end


def _mark_section(
    text: str, classes: list[TokenClass], start: int, brace: int, form: ToolFormat, names: frozenset[str]
) -> int | None:
    """Calls from the first brace on, up to the section's closing. Returns where the rest begins; None: no call."""
    end = None
    while brace < len(text) and text[brace] == "{":
        after = _call_end(text, brace, form, names)
        if after is None:
            break
        classes[start:after] = [TokenClass.STRUCTURE] * (after - start)
        _mark_call(text, classes, brace, after, form)
        start = end = after
        place = _skip(text, after)
        if not form.separator or not text.startswith(form.separator, place):
            break
        brace = _skip(text, place + len(form.separator))
    if end is None:
        return None
    place = _skip(text, end)
    if form.closing and text.startswith(form.closing, place):
        place += len(form.closing)
        classes[end:place] = [TokenClass.STRUCTURE] * (place - end)
        return place
    return end


def _call_end(text: str, brace: int, form: ToolFormat, names: frozenset[str]) -> int | None:
    call = CallObject(names, form.argument_keys)
    for place in range(brace, len(text)):
        status = call.feed(text[place])
        if status is Scan.DONE:
            return place + 1
        if status is not Scan.MORE:
            return None
    return None


def _mark_call(text: str, classes: list[TokenClass], start: int, end: int, form: ToolFormat) -> None:
    """The pieces of one complete call object; everything in it counts as structure already."""
    nested: list[str] = []  # open brackets
    key, is_key = "", False
    for match in _JSON_TOKEN.finditer(text, start, end):
        piece = match[0]
        if piece in "{[":
            nested.append(piece)
            is_key = piece == "{"
        elif piece in "}]":
            nested.pop()
            is_key = False
        elif piece == ",":
            is_key = nested[-1] == "{"
        elif piece == ":":
            is_key = False
        else:
            if is_key and len(nested) == 1:
                key = piece[1:-1]
            kind = _kind(key, is_key, len(nested), form)
            inner = (match.start() + 1, match.end() - 1) if piece[0] == '"' else match.span()
            classes[inner[0] : inner[1]] = [kind] * (inner[1] - inner[0])


def _kind(key: str, is_key: bool, depth: int, form: ToolFormat) -> TokenClass:
    """Of a string or scalar below the call's key `key`."""
    if depth == 1:
        if is_key:
            return TokenClass.STRUCTURE
        if key == "name":
            return TokenClass.TOOL_NAME
    if key not in form.argument_keys:
        return TokenClass.STRUCTURE
    return TokenClass.ARGUMENT_KEY if is_key else TokenClass.ARGUMENT_VALUE


def _skip(text: str, place: int) -> int:
    """Past white space."""
    return place + sum(1 for _ in itertools.takewhile(WHITESPACE.__contains__, itertools.islice(text, place, None)))
