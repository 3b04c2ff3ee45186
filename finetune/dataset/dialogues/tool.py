"""One tool: its signature in OpenAI's form, and the pure function behind it.

The function's docstring is the description that the model reads, so it stays short. Arguments are checked against the
schema before the function runs: a wrong name or type is our bug or a bad data set, a value that the function refuses
(`ToolRefusal`) is an answer, `{"error": ...}`, as real tools give it. Numbers are rounded to four decimals.

The schemas use a small part of JSON Schema: type, enum, items, default, required; nothing else is checked here.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Category = Literal["math", "text", "conversions", "reasoning", "errors"]
CATEGORIES: tuple[Category, ...] = ("math", "text", "conversions", "reasoning", "errors")

NUMBER: Mapping[str, Any] = {"type": "number"}
INTEGER: Mapping[str, Any] = {"type": "integer"}
TEXT: Mapping[str, Any] = {"type": "string"}


class ToolRefusal(Exception):
    """What a tool answers when it cannot do it: a clause without a full stop that says what is accepted."""


class ArgumentsError(Exception):
    """Arguments that do not fit the tool's schema."""


@dataclass(frozen=True, slots=True)
class Tool:
    name: str
    category: Category
    purpose: str
    """What it does, as a verb phrase: "convert a length"."""
    parameters: Mapping[str, Any]
    function: Callable[..., Any]

    @property
    def description(self) -> str:
        return (self.function.__doc__ or "").strip().removesuffix(".")

    @property
    def required(self) -> tuple[str, ...]:
        return tuple(self.parameters["required"])

    def signature(self) -> dict[str, Any]:
        """As OpenAI's wire has it."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


def make_tool(
    category: Category,
    purpose: str,
    function: Callable[..., Any],
    *,
    optional: tuple[str, ...] = (),
    **properties: Mapping[str, Any],
) -> Tool:
    """`properties` in the function's order; those with a default, and the `optional` ones, may be left out."""
    required = [name for name, schema in properties.items() if "default" not in schema and name not in optional]
    parameters = {
        "type": "object",
        "properties": {name: dict(schema) for name, schema in properties.items()},
        "required": required,
    }
    return Tool(function.__name__, category, purpose, parameters, function)


def choice(*values: str) -> dict[str, Any]:
    return {"type": "string", "enum": list(values)}


def list_of(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": dict(schema)}


def run_tool(tool: Tool, arguments: Mapping[str, Any]) -> str:
    """The content of the tool's message: `{"result": ...}` or `{"error": ...}`. Raises ArgumentsError."""
    check_arguments(tool.parameters, arguments)
    try:
        answer = {"result": _tidy(tool.function(**arguments))}
    except ToolRefusal as refusal:
        answer = {"error": str(refusal)}
    return json.dumps(answer, ensure_ascii=False)


def check_arguments(parameters: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    properties = parameters["properties"]
    for name in parameters["required"]:
        if name not in arguments:
            raise ArgumentsError(f"the required argument '{name}' is missing")
    for name, value in arguments.items():
        if name not in properties:
            raise ArgumentsError(f"there is no argument '{name}'; there are {', '.join(properties)}")
        _check_value(name, properties[name], value)


def _check_value(name: str, schema: Mapping[str, Any], value: Any) -> None:
    kind = schema["type"]
    fits = {
        "number": isinstance(value, int | float) and not isinstance(value, bool),
        "integer": isinstance(value, int) and not isinstance(value, bool),
        "string": isinstance(value, str),
        "boolean": isinstance(value, bool),
        "array": isinstance(value, list),
    }
    if not fits[kind]:
        raise ArgumentsError(f"'{name}' must be of type {kind}, not {value!r:.60}")
    if "enum" in schema and value not in schema["enum"]:
        raise ArgumentsError(f"'{name}' must be one of {', '.join(schema['enum'])}, not {value!r:.60}")
    if kind == "array":
        for item in value:
            _check_value(f"{name}[]", schema["items"], item)


def _tidy(value: Any) -> Any:
    """Whole floats as integers, others with four decimals: what people write, and the same on every machine."""
    if isinstance(value, bool) or not isinstance(value, float):
        return [_tidy(item) for item in value] if isinstance(value, list) else value
    rounded = round(value, 4)
    return int(rounded) if rounded == int(rounded) else rounded
