"""Tools, `tool_choice` and `response_format` of a chat request. Schemas are compiled (and judged) in the backend."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints

from server.openai.protocol.common import WireModel, invalid

MAX_TOOLS = 128
"""OpenAI's limit."""
Name = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_-]+$")]


class FunctionDefinition(WireModel):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON Schema of the arguments; None: no parameters."""
    strict: bool | None = None


def _check_tool(value: Any) -> Any:
    if isinstance(value, dict) and value.get("type") == "custom":
        raise invalid("tools of type 'custom' are not supported; use type 'function'", "unsupported_value")
    return value


class ToolDefinition(WireModel):
    type: Literal["function"]
    function: FunctionDefinition


Tools = Annotated[list[Annotated[ToolDefinition, BeforeValidator(_check_tool)]], Field(max_length=MAX_TOOLS)]


class NamedFunction(WireModel):
    name: str


class NamedToolChoice(WireModel):
    type: Literal["function"]
    function: NamedFunction


def _check_tool_choice(value: Any) -> Any:
    if isinstance(value, str):
        if value not in ("none", "auto", "required"):
            raise invalid(f"accepted: 'none', 'auto', 'required' or a named function, got {value[:40]!r}")
    elif isinstance(value, dict) and value.get("type") in ("allowed_tools", "custom"):
        raise invalid(f"tool choices of type '{value['type']}' are not supported", "unsupported_value")
    elif value is not None and not isinstance(value, dict):
        raise invalid(f"expected a string or an object, got {type(value).__name__}", "invalid_type")
    return value


ToolChoice = Annotated[Literal["none", "auto", "required"] | NamedToolChoice, BeforeValidator(_check_tool_choice)]


class TextFormat(WireModel):
    type: Literal["text"]


class JsonObjectFormat(WireModel):
    type: Literal["json_object"]


class JsonSchema(WireModel):
    name: Name
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None
    """Accepted; decoding is constrained to the schema either way."""


class JsonSchemaFormat(WireModel):
    type: Literal["json_schema"]
    json_schema: JsonSchema


def _check_format(value: Any) -> Any:
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind not in ("text", "json_object", "json_schema"):
        raise invalid(f"unknown type {kind[:40]!r}; accepted: 'text', 'json_object', 'json_schema'", param="type")
    return value


ResponseFormat = Annotated[
    Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")],
    BeforeValidator(_check_format),
]
