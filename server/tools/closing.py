"""Closes the objects of a schema that list their properties and do not say whether others may follow.

JSON Schema lets such objects have any further properties; people who write `properties` mean these, and a small model
that may go on inventing keys often does, until max_tokens. A closed schema allows a part of what the open one did, so
answers stay valid. `additionalProperties: true` keeps an object open.

Left alone: documents that intersect object schemas (`allOf`, or `anyOf`, `oneOf`, `$ref` beside keywords of objects),
where closing one part could forbid what another part requires.
"""

from collections.abc import Iterator, Mapping
from typing import Any

_MAPS_OF_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")
_LISTS_OF_SCHEMAS = ("prefixItems", "anyOf", "oneOf")
_SCHEMAS = ("items", "additionalProperties", "additionalItems")
_OF_OBJECTS = ("properties", "required", "additionalProperties", "patternProperties", "minProperties", "maxProperties")
_COMBINING = ("anyOf", "oneOf", "$ref")


def closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with `additionalProperties: false` where it was meant. The schema's depth must be bounded already."""
    return dict(schema) if _intersects_objects(schema) else _closed(schema)


def _intersects_objects(schema: Mapping[str, Any]) -> bool:
    if "allOf" in schema or (_has(schema, _COMBINING) and _has(schema, _OF_OBJECTS)):
        return True
    return any(_intersects_objects(child) for _, _, child in _children(schema))


def _has(schema: Mapping[str, Any], keywords: tuple[str, ...]) -> bool:
    return any(keyword in schema for keyword in keywords)


def _closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(schema)
    for keyword, key, child in _children(schema):
        if key is None:
            result[keyword] = _closed(child)
            continue
        if result[keyword] is schema[keyword]:
            result[keyword] = schema[keyword].copy()
        result[keyword][key] = _closed(child)
    properties, required = schema.get("properties"), schema.get("required", [])
    if (
        isinstance(properties, Mapping)
        and not _has(schema, ("additionalProperties", "patternProperties", "minProperties"))
        and isinstance(required, list)
        and all(isinstance(name, str) and name in properties for name in required)
    ):
        result["additionalProperties"] = False
    return result


def _children(schema: Mapping[str, Any]) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """(keyword, key or index under it or None, subschema) for every subschema that is an object."""
    for keyword, value in schema.items():
        places: list[tuple[Any, Any]] = []
        if keyword in _MAPS_OF_SCHEMAS and isinstance(value, Mapping):
            places = list(value.items())
        elif (keyword in _LISTS_OF_SCHEMAS or keyword == "items") and isinstance(value, list):
            places = list(enumerate(value))
        elif keyword in _SCHEMAS:
            places = [(None, value)]
        yield from ((keyword, key, child) for key, child in places if isinstance(child, Mapping))
