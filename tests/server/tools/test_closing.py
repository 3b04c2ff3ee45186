"""Closing objects: what is closed, what is left alone, and that nothing becomes unsatisfiable."""

import json
from typing import Any

import pytest

from server.tools.closing import closed
from tests.server.tools.grammar_walk import TinyTokenizer, make_factory, walk

OPEN = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}
CLOSED = {**OPEN, "additionalProperties": False}


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (OPEN, CLOSED),
        (CLOSED, CLOSED),
        ({"type": "object"}, {"type": "object"}),
        ({"properties": {"x": OPEN}}, {"properties": {"x": CLOSED}, "additionalProperties": False}),
        ({"items": OPEN}, {"items": CLOSED}),
        ({"items": [OPEN, True]}, {"items": [CLOSED, True]}),
        ({"anyOf": [OPEN, {"type": "null"}]}, {"anyOf": [CLOSED, {"type": "null"}]}),
        ({"$ref": "#/$defs/x", "$defs": {"x": OPEN}}, {"$ref": "#/$defs/x", "$defs": {"x": CLOSED}}),
        ({"type": "object", "additionalProperties": OPEN}, {"type": "object", "additionalProperties": CLOSED}),
    ],
)
def test_closes(schema: dict[str, Any], expected: dict[str, Any]) -> None:
    before = json.dumps(schema)
    assert closed(schema) == expected
    assert json.dumps(schema) == before


@pytest.mark.parametrize(
    "schema",
    [
        {**OPEN, "additionalProperties": True},
        {**OPEN, "required": ["a", "b"]},
        {**OPEN, "minProperties": 2},
        {**OPEN, "patternProperties": {"^b": {}}},
        {"allOf": [OPEN, {"properties": {"b": {}}, "required": ["b"]}]},
        {**OPEN, "anyOf": [{"properties": {"b": {}}, "required": ["b"]}]},
        {"items": {"$ref": "#/$defs/x", "required": ["b"]}, "$defs": {"x": OPEN}},
        {"enum": [OPEN], "default": OPEN},
        {"properties": [OPEN], "required": "a", "anyOf": OPEN},
    ],
)
def test_leaves_alone(schema: dict[str, Any]) -> None:
    assert closed(schema) == schema


def test_a_parameter_may_be_called_properties() -> None:
    schema = {"properties": {"properties": {"type": "string"}, "items": {"type": "null"}}}
    assert closed(schema) == {**schema, "additionalProperties": False}


def test_answers_have_the_listed_properties_only() -> None:
    tokenizer = TinyTokenizer()
    factory = make_factory(tokenizer)
    compiled = factory.json_schema(OPEN, param="response_format")
    words = -(-tokenizer.vocab_size // 32) + 1
    assert all(json.loads(walk(compiled, tokenizer, seed, mask_words=words)) == {"a": 1} for seed in range(5))
