"""Bounds and clear refusals for JSON schemas that come with a request, before they become grammars.

llguidance refuses what it cannot enforce (`not`, `uniqueItems`, unknown formats, look-around); here its messages become
400s that name the keyword. It has limits of its own, but its compiler is quadratic in the properties of one object
(1,000 optional ones: 75 ms; 10,000: 8 s) and expands forced repetitions of patterns (10^5 characters: 0.1 s a
mask), so size, depth, properties and repetition are bounded first. 120,000 characters and 5,000 properties are OpenAI's
published limits for structured outputs.

Keywords that JSON Schema itself does not know are ignored, as its specification says.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from server.errors import InvalidRequestError
from server.tools.closing import closed

MAX_CHARACTERS = 120_000
MAX_PROPERTIES = 5_000
MAX_PROPERTIES_PER_OBJECT = 1_000
MAX_DEPTH = 100  # levels of JSON; the Rust parser behind llguidance stops at 128
MAX_REPETITIONS = 10_000  # characters that one pattern may force: 8 ms

# Whitespace between JSON tokens: none, one or two spaces, or a newline with indentation. Unbounded whitespace
# (llguidance's default) lets a small model write newlines until max_tokens.
WHITESPACE_PATTERN = r"\n[ \t]{0,32}|[ ]{1,2}"

NO_DETAILS = "<non-verbose/>"  # what llguidance writes in place of its state, which we do not show
_OPTIONS_KEY = "x-guidance"  # llguidance's options inside a schema; ours alone
_PLACE = re.compile(r"^at \d+\(\d+\): failed to compile JSON schema: ")  # in a grammar that the caller never saw
_QUANTIFIER = re.compile(r"\{(\d+)?(,(\d+)?)?\}")


def bounded_schema(schema: object, *, param: str) -> dict[str, Any]:
    """The schema closed (closing.py) and with our compile options; InvalidRequestError names what is over a limit."""
    if not isinstance(schema, Mapping):
        raise InvalidRequestError(f"{param}: the schema must be a JSON object", param=param)
    num_properties = 0
    for node, depth in _walk(schema):
        if depth > MAX_DEPTH:
            raise InvalidRequestError(f"{param}: the schema is nested more than {MAX_DEPTH} levels deep", param=param)
        properties = node.get("properties")
        if isinstance(properties, Mapping):
            num_properties += len(properties)
            if len(properties) > MAX_PROPERTIES_PER_OBJECT or num_properties > MAX_PROPERTIES:
                raise InvalidRequestError(
                    f"{param}: the schema has too many properties; accepted are {MAX_PROPERTIES_PER_OBJECT} in an "
                    f"object and {MAX_PROPERTIES} in all",
                    param=param,
                )
        _check_patterns(node, param)
    try:
        num_characters = len(json.dumps(schema, allow_nan=False))
    except ValueError:
        raise InvalidRequestError(f"{param}: the schema has a number that is not finite", param=param) from None
    if num_characters > MAX_CHARACTERS:
        raise InvalidRequestError(
            f"{param}: the schema has {num_characters} characters; at most {MAX_CHARACTERS} are accepted", param=param
        )
    return {**closed(schema), _OPTIONS_KEY: {"whitespace_pattern": WHITESPACE_PATTERN}}


def _walk(schema: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], int]]:
    """Every object inside the schema (subschema or not) with its depth; iterative, so depth cannot hurt."""
    pending: list[tuple[Any, int]] = [(schema, 1)]
    while pending:
        value, depth = pending.pop()
        if isinstance(value, Mapping):
            yield value, depth
            pending += [(child, depth + 1) for child in value.values()]
        elif isinstance(value, list):
            pending += [(child, depth + 1) for child in value]


def _check_patterns(node: Mapping[str, Any], param: str) -> None:
    pattern = node.get("pattern")
    patterns = [pattern] if isinstance(pattern, str) else []
    by_pattern = node.get("patternProperties")
    if isinstance(by_pattern, Mapping):
        patterns += by_pattern
    for text in patterns:
        if max_repetitions(text) > MAX_REPETITIONS:
            raise InvalidRequestError(
                f"{param}: the pattern {text[:60]!r} repeats more than {MAX_REPETITIONS} times", param=param
            )


def max_repetitions(pattern: str) -> int:
    """The largest product of nested counted repetitions: 200 for `(a{10}b){20}`. Malformed patterns get some number."""
    open_groups: list[int] = []  # largest product so far in every open group
    largest = 1  # in the group being read
    atom = 1  # of what a following quantifier would repeat
    position = 0
    while position < len(pattern):
        ch = pattern[position]
        quantifier = _QUANTIFIER.match(pattern, position) if ch == "{" else None
        if quantifier is not None:
            counts = [_bounded_int(text) for text in (quantifier[1], quantifier[3]) if text]
            atom *= max(counts, default=1)
            position = quantifier.end()
            largest = max(largest, atom)
            continue
        if ch == "(":
            open_groups.append(largest)
            largest = atom = 1
        elif ch == ")" and open_groups:
            atom = largest
            largest = max(largest, open_groups.pop())
        elif ch not in "*+?":
            atom = 1
            if ch == "\\":
                position += 1
            elif ch == "[":
                position = _end_of_class(pattern, position)
        position += 1
    return largest


def _bounded_int(digits: str) -> int:
    return int(digits) if len(digits) <= 9 else 10**9


def _end_of_class(pattern: str, start: int) -> int:
    position = start + 1
    if pattern.startswith("^", position):
        position += 1
    position += 1  # a first `]` is a member
    while position < len(pattern) and pattern[position] != "]":
        position += 2 if pattern[position] == "\\" else 1
    return position


def refusal(error: str, *, param: str) -> InvalidRequestError:
    """llguidance's words as a 400 that names the keyword; its messages are stable enough to match, or pass as said."""
    text = error.replace(NO_DETAILS, "").strip()
    if found := re.search(r"Unimplemented keys: (\[.*?\])", text):
        keywords = ", ".join(f"'{keyword}'" for keyword in json.loads(found[1]))
        reason = f"schema keyword {keywords} is not supported"
    elif found := re.search(r"Unknown format: (.*)", text):
        reason = f"schema keyword 'format': {found[1].strip()!r} is not supported"
    elif "oneOf constraints are not supported" in text:
        reason = "schema keyword 'oneOf' is supported only where at most one branch can match; use 'anyOf'"
    elif "regex parse error" in text:
        reason = f"schema keyword 'pattern': {text.rsplit('error: ', 1)[-1].splitlines()[0]}"
    else:
        first_line = text.splitlines()[0] if text else "the schema cannot be compiled"
        reason = _PLACE.sub("", first_line)
    return InvalidRequestError(f"{param}: {reason}", param=param)
