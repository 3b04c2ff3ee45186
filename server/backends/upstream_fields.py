"""Single fields of an upstream's answer, read into our wire's types: usage, finish reasons, text, log-probabilities.

Absent and null are one. A value of another type is an error and not dropped: the answer that the log would keep is not
the one that was given. Finish reasons outside OpenAI's set are translated.
"""

import logging
from collections.abc import Mapping
from typing import Any, Literal

from server.errors import ServerUnavailableError
from server.openai.protocol.chunks import ChatLogprobs, CompletionLogprobs, TopLogprob, Usage

logger = logging.getLogger(__name__)

Reason = Literal["stop", "length", "tool_calls", "content_filter"]
_REASONS: dict[str, Reason] = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "content_filter": "content_filter",
    "function_call": "tool_calls",
    "tool_use": "tool_calls",
    "eos": "stop",
    "eos_token": "stop",
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "model_length": "length",
}
_FAILURES = ("error", "abort", "cancelled", "insufficient_system_resource")
"""Finish reasons of answers that are not whole."""


def read_usage(given: Any) -> Usage | None:
    """None unless both counts are there. Cached tokens by OpenAI's name or DeepSeek's."""
    if not isinstance(given, dict):
        return None
    prompt, completion = given.get("prompt_tokens"), given.get("completion_tokens")
    if not isinstance(prompt, int) or not isinstance(completion, int):
        return None
    total, details = given.get("total_tokens"), given.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else given.get("prompt_cache_hit_tokens")
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": total if isinstance(total, int) else prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached if isinstance(cached, int) else 0},
    }


def unreadable(field: str, value: Any) -> ServerUnavailableError:
    return ServerUnavailableError(f"The upstream's answer cannot be read: '{field}' is {type(value).__name__}.")


def read_reason(given: Any) -> Reason | None:
    """Raises ServerUnavailableError for a reason that means failure."""
    if not given:
        return None
    if not isinstance(given, str):
        raise unreadable("finish_reason", given)
    name = given.lower()
    if name in _FAILURES:
        raise ServerUnavailableError(f"The upstream broke off its answer (finish_reason {given!r}).")
    if name not in _REASONS:
        logger.warning("the upstream's finish_reason %.40r is not known and counts as 'stop'", given)
    return _REASONS.get(name, "stop")


def read_text(field: str, given: Any) -> str:
    if given is None:
        return ""
    if not isinstance(given, str):
        raise unreadable(field, given)
    return given


def read_content(given: Any) -> tuple[str, str]:
    """(content, reasoning) of a string, or of a list of parts as Mistral's reasoning models send."""
    if not isinstance(given, list):
        return read_text("content", given), ""
    texts: dict[str, str] = {"text": "", "thinking": ""}
    for part in given:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in texts:
            raise unreadable("content", part)
        texts[kind] += read_content(part.get(kind))[0]
    return texts["text"], texts["thinking"]


def read_chat_logprobs(given: Any) -> ChatLogprobs | None:
    content = given.get("content") if isinstance(given, dict) else None
    if not isinstance(content, list) or not content:
        return None
    return {
        "content": [{**_logprob(entry), "top_logprobs": _alternatives(entry)} for entry in content],
        "refusal": None,
    }


def _logprob(given: Any) -> TopLogprob:
    if not isinstance(given, dict) or not isinstance(given.get("logprob"), int | float):
        raise unreadable("logprobs", given)
    return {
        "token": read_text("token", given.get("token")),
        "logprob": given["logprob"],
        "bytes": given.get("bytes"),  # type: ignore[typeddict-item]  # OpenAI has null for tokens without bytes
    }


def _alternatives(entry: Mapping[str, Any]) -> list[TopLogprob]:
    given = entry.get("top_logprobs") or []
    if not isinstance(given, list):
        raise unreadable("top_logprobs", given)
    return [_logprob(one) for one in given]


def read_completion_logprobs(given: Any) -> CompletionLogprobs | None:
    """Columns that are null (no alternatives were asked for) are empty."""
    if not isinstance(given, dict) or not given.get("tokens"):
        return None
    return {
        "tokens": given["tokens"],
        "token_logprobs": given.get("token_logprobs") or [],
        "top_logprobs": given.get("top_logprobs") or [],
        "text_offset": given.get("text_offset") or [],
    }
