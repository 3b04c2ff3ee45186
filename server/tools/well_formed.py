"""Whether the tool calls of an answer could have been carried out: what the metrics and the gate call well-formed.

A call is well-formed when its tool is one of those offered and its arguments are a JSON object with all keys that the
tool's schema requires. Types and values are not checked against the schema. What was meant as a call but stayed in the
text, because it could not be read as one, is malformed: a format's marker in the content, or content that begins like a
bare call object.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from server.tools.formats import TOOL_FORMATS

_MARKERS = tuple(form.marker for form in TOOL_FORMATS.values())
"""Of all formats: small models mix them up."""
_ARGUMENTS = "|".join(sorted({key for form in TOOL_FORMATS.values() for key in form.argument_keys}))
_BARE_CALL = re.compile(rf'\s*\{{\s*"name"\s*:\s*"[^"]*"\s*,\s*"(?:{_ARGUMENTS})"\s*:')


@dataclass(frozen=True, slots=True)
class CallForm:
    num_calls: int
    """In the answer, and attempts left in its text."""
    num_malformed: int
    """Of `num_calls`."""


def judge_calls(message: Mapping[str, Any], tools: Sequence[Mapping[str, Any]]) -> CallForm:
    """`message`: an assistant message as it was sent. `tools`: the request's, checked, and not switched off by
    `tool_choice`."""
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
    calls = message.get("tool_calls") or ()
    num_wrong = sum(not _is_well_formed(call["function"], schemas) for call in calls)
    num_left = _num_attempts(message.get("content") or "")
    return CallForm(len(calls) + num_left, num_wrong + num_left)


def _is_well_formed(function: Mapping[str, Any], schemas: Mapping[str, Mapping[str, Any]]) -> bool:
    schema = schemas.get(function["name"])
    if schema is None:
        return False
    try:
        arguments = json.loads(function["arguments"], parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return False
    return isinstance(arguments, dict) and all(key in arguments for key in _required(schema))


def _required(schema: Mapping[str, Any]) -> list[str]:
    """Nobody checks a client's schema while no grammar is made from it: what is no key requires nothing."""
    keys = schema.get("required")
    return [key for key in keys if isinstance(key, str)] if isinstance(keys, list) else []


def _num_attempts(content: str) -> int:
    num_marked = sum(content.count(marker) for marker in _MARKERS)
    return num_marked or int(_BARE_CALL.match(content) is not None)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
