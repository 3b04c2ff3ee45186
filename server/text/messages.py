"""Chat messages as chat templates want them, from messages as OpenAI's wire has them.

`content` becomes a string ('' for null), text parts are joined without a separator as vLLM does, `developer` becomes
`system` (templates know no developer), and the arguments of earlier tool calls become the object that their JSON text
stands for. Idempotent, and used by training as well as by serving, so that both see the same prompt. Schema checks of
the wire (roles, lengths) are not here.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from server.errors import InvalidRequestError

_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")


def normalize_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """New messages; raises InvalidRequestError for content that is not text, naming the field."""
    return [_normalize(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _normalize(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    plain = {key: value for key, value in message.items() if value is not None}
    if plain.get("role") == "developer":
        plain["role"] = "system"
    plain["content"] = _flatten(plain.get("content"), f"{where}.content")
    if "tool_calls" in plain:
        plain["tool_calls"] = [_normalize_call(call) for call in plain["tool_calls"]]
    reasoning = next((plain[key] for key in _REASONING_KEYS if key in plain), None)
    if reasoning is not None:  # templates disagree on the name, as in transformers
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return plain


def _flatten(content: Any, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, Sequence):
        raise InvalidRequestError("content must be a string or a list of text parts", param=where)
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind not in ("text", "refusal"):
            raise InvalidRequestError(
                f"content parts of type {kind!r} are not supported: the served models read text only",
                param=f"{where}[{index}]",
                code="unsupported_value",
            )
        texts.append(part[kind])
    return "".join(texts)


def _normalize_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call["function"])
    function["arguments"] = _parse_arguments(function.get("arguments", ""))
    return {**call, "function": function}


def _parse_arguments(arguments: Any) -> Any:
    """The object; text that is none (a call that broke off at `max_tokens`) stays as it is."""
    if not isinstance(arguments, str):
        return arguments
    if not arguments.strip():
        return {}
    try:
        value = json.loads(arguments)
    except ValueError:
        return arguments
    return value if isinstance(value, dict) else arguments
