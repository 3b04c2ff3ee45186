"""Whether tool calls are exactly right: the structural match against the accepted values.

- The same calls in any order, none missing and none too many.
- Numbers as numbers: 1 is 1.0, true is not 1, and "1" is not 1 unless the schema says that the value is a string.
- Objects in any order of keys, lists in order, strings to the letter.
- An optional parameter may be left out where the label or its default allows it, or be given with its default.
Not here: whether a call could be carried out (server/tools/well_formed.py).
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from finetune.gate.expected import Accepted, Expected, ExpectedCall, parse_arguments

_MISSING = object()
Schema = Mapping[str, Any]


def calls_match(calls: Sequence[Mapping[str, Any]], expected: Expected, tools: Sequence[Mapping[str, Any]]) -> bool:
    """`calls`: a message's `tool_calls`. `tools`: the request's."""
    if len(calls) != len(expected):
        return False
    schemas = {tool["function"]["name"]: _object(tool["function"].get("parameters")) for tool in tools}
    fits = [[_call_matches(call["function"], wanted, schemas) for wanted in expected] for call in calls]
    return _pairs_up(fits)


def names_match(calls: Sequence[Mapping[str, Any]], expected: Expected) -> bool:
    """The right tools, each as often as expected, whatever their arguments."""
    return sorted(call["function"]["name"] for call in calls) == sorted(wanted.name for wanted in expected)


def _call_matches(function: Mapping[str, Any], wanted: ExpectedCall, schemas: Mapping[str, Schema]) -> bool:
    if function["name"] != wanted.name:
        return False
    arguments = parse_arguments(function["arguments"])
    return arguments is not None and _object_matches(wanted.arguments, arguments, schemas.get(wanted.name, {}))


def _object_matches(wanted: Mapping[str, Accepted], actual: Mapping[str, Any], schema: Schema) -> bool:
    properties = _object(schema.get("properties"))
    required = schema.get("required")
    required = required if isinstance(required, list) else []
    for key, accepted in wanted.items():
        inner = _object(properties.get(key))
        if key in actual:
            if not any(_value_matches(value, actual[key], inner) for value in accepted.values):
                return False
        elif not accepted.may_be_absent:
            default = inner.get("default", _MISSING)
            if key in required or not any(_value_matches(value, default, inner) for value in accepted.values):
                return False
    return all(_is_default(actual[key], _object(properties.get(key))) for key in actual if key not in wanted)


def _is_default(value: Any, schema: Schema) -> bool:
    return "default" in schema and _plain_equal(schema["default"], value)


def _value_matches(wanted: Any, actual: Any, schema: Schema) -> bool:
    if isinstance(wanted, Mapping):
        return isinstance(actual, Mapping) and _object_matches(wanted, actual, schema)
    if isinstance(wanted, list):
        items = _object(schema.get("items"))
        return (
            isinstance(actual, list)
            and len(wanted) == len(actual)
            and all(_value_matches(*pair, items) for pair in zip(wanted, actual, strict=True))
        )
    if _is_number(wanted) and isinstance(actual, str) and _says_string(schema):
        return actual == json.dumps(wanted)
    return _plain_equal(wanted, actual)


def _plain_equal(left: Any, right: Any) -> bool:
    """JSON values: Python's equality, but true is not 1."""
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return left.keys() == right.keys() and all(_plain_equal(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(_plain_equal(*pair) for pair in zip(left, right, strict=True))
    if _is_number(left) and _is_number(right):
        return bool(left == right)
    return type(left) is type(right) and bool(left == right)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _says_string(schema: Schema) -> bool:
    kinds = schema.get("type")
    return kinds == "string" or (isinstance(kinds, list) and "string" in kinds and not {"number", "integer"} & {*kinds})


def _object(value: Any) -> Schema:
    """Nobody checked the client's schema: what is no object says nothing."""
    return value if isinstance(value, Mapping) else {}


def _pairs_up(fits: Sequence[Sequence[bool]]) -> bool:
    """Whether every row can have a column of its own where it fits (augmenting paths; a few calls at most)."""
    owner: dict[int, int] = {}

    def place(row: int, tried: set[int]) -> bool:
        for column, is_fit in enumerate(fits[row]):
            if is_fit and column not in tried:
                tried.add(column)
                if column not in owner or place(owner[column], tried):
                    owner[column] = row
                    return True
        return False

    return all(place(row, set()) for row in range(len(fits)))
