"""Chat messages of a request, one model per role.

Content is text: a string, null where OpenAI allows it, or a list of text parts. Fields that clients echo back from our
own answers (`refusal`, `annotations`, `reasoning_content`, a tool call's `index`) are accepted in the history. Not
here: what templates need (server/text/messages.py joins parts and parses arguments).
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from server.openai.protocol.common import WireModel, invalid

MAX_MESSAGES = 4096
_ROLES = ("system", "developer", "user", "assistant", "tool")
_PART_NAMES = {"image_url": "images", "input_audio": "audio", "file": "files"}


class TextPart(WireModel):
    type: Literal["text"]
    text: str


class RefusalPart(WireModel):
    type: Literal["refusal"]
    refusal: str


def _check_part(value: Any) -> Any:
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind in _PART_NAMES:
        raise invalid(f"content parts of type '{kind}' are not supported: the served models read text only, not "
                      f"{_PART_NAMES[kind]}", "unsupported_value")  # fmt: skip
    return value


def _check_content(value: Any) -> Any:
    if value is None or isinstance(value, str | list):
        return value
    raise invalid(f"expected a string or a list of content parts, got {type(value).__name__}", "invalid_type")


Part = Annotated[TextPart, BeforeValidator(_check_part)]
AssistantPart = Annotated[Annotated[TextPart | RefusalPart, Field(discriminator="type")], BeforeValidator(_check_part)]
Content = Annotated[str | list[Part], BeforeValidator(_check_content)]


class FunctionCall(WireModel):
    name: str = Field(min_length=1)
    arguments: str
    """JSON text, as OpenAI has it; not parsed here."""


class ToolCall(WireModel):
    id: str
    type: Literal["function"]
    function: FunctionCall
    index: int | None = None


class SystemMessage(WireModel):
    role: Literal["system"]
    content: Content
    name: str | None = None


class DeveloperMessage(WireModel):
    role: Literal["developer"]
    content: Content
    name: str | None = None


class UserMessage(WireModel):
    role: Literal["user"]
    content: Content
    name: str | None = None


class AssistantMessage(WireModel):
    role: Literal["assistant"]
    content: Annotated[str | list[AssistantPart] | None, BeforeValidator(_check_content)] = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    annotations: list[Any] | None = None
    audio: Literal[None] = None
    function_call: Literal[None] = None

    @model_validator(mode="after")
    def _says_something(self) -> "AssistantMessage":
        if self.content is None and not self.tool_calls and self.refusal is None:
            raise invalid("an assistant message needs 'content' or 'tool_calls'")
        return self


class ToolMessage(WireModel):
    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: str | None = None


def _check_role(value: Any) -> Any:
    role = value.get("role") if isinstance(value, dict) else None
    if role == "function":
        raise invalid(
            "role 'function' is deprecated and not supported; use role 'tool'", "unsupported_value", param="role"
        )
    if role is not None and role not in _ROLES:
        raise invalid(f"unknown role {str(role)[:40]!r}; accepted: {', '.join(_ROLES)}", param="role")
    return value


Message = Annotated[
    Annotated[
        SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
    ],
    BeforeValidator(_check_role),
]
Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]


def template_message(
    message: SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage,
) -> dict[str, Any]:
    """The message as plain data, for `server.text.messages.normalize_messages`."""
    plain = message.model_dump(exclude_none=True, exclude={"annotations": True, "refusal": True})
    if isinstance(message, AssistantMessage):
        if message.content is None and message.refusal is not None:
            plain["content"] = message.refusal
        for call in plain.get("tool_calls", ()):
            call.pop("index", None)
    return plain
