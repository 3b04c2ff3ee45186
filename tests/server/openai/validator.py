"""Checks wire objects against the `openai` package's own models: nothing missing, nothing foreign.

The client builds its models without validation and keeps unknown fields, so `model_validate` (strict) is called here
and `model_extra` is looked at in every model of the tree. Fields that OpenAI always sends but its models call optional
must be present too.
"""

import json
from typing import Any

from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

ALLOWED_EXTRAS = {
    "ChatCompletionMessage": {"reasoning_content"},
    "ChoiceDelta": {"reasoning_content"},
    "Model": {"max_model_len", "root", "parent"},
}
ALWAYS_SENT = {
    ChatCompletion: {"id", "object", "created", "model", "system_fingerprint", "choices", "usage"},
    ChatCompletionChunk: {"id", "object", "created", "model", "system_fingerprint", "choices"},
    Completion: {"id", "object", "created", "model", "system_fingerprint", "choices"},
    Model: {"id", "object", "created", "owned_by"},
}


def foreign_fields(value: Any, path: str = "") -> list[str]:
    """Paths of fields that the models do not know and that are not our documented extensions."""
    found: list[str] = []
    if isinstance(value, BaseModel):
        allowed = ALLOWED_EXTRAS.get(type(value).__name__, set())
        found += [f"{path}.{name}" for name in (value.model_extra or {}) if name not in allowed]
        for name in type(value).model_fields:
            found += foreign_fields(getattr(value, name), f"{path}.{name}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            found += foreign_fields(item, f"{path}[{index}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            found += foreign_fields(item, f"{path}[{key!r}]")
    return found


def check(model: type[BaseModel], data: dict[str, Any]) -> None:
    """Raises when `data` is not exactly what `model` describes."""
    parsed = model.model_validate(data, strict=True)
    assert foreign_fields(parsed) == []
    missing = ALWAYS_SENT[model] - data.keys()
    assert not missing, f"missing: {missing}"
    for choice in data.get("choices", ()):
        assert {"index", "logprobs", "finish_reason"} <= choice.keys()
        if model is ChatCompletion:
            assert {"role", "content", "refusal"} <= choice["message"].keys()


def check_chat(data: dict[str, Any]) -> None:
    check(ChatCompletion, data)


def check_chat_chunk(data: dict[str, Any]) -> None:
    check(ChatCompletionChunk, data)


def check_completion(data: dict[str, Any]) -> None:
    check(Completion, data)
    assert all(choice["finish_reason"] for choice in data["choices"])


def check_completion_chunk(data: dict[str, Any]) -> None:
    """A chunk under way has a null finish reason, as OpenAI sends it, which their one model for both does not admit."""
    choices = [{**choice, "finish_reason": choice["finish_reason"] or "stop"} for choice in data["choices"]]
    check(Completion, {**data, "choices": choices})


def check_model(data: dict[str, Any]) -> None:
    check(Model, data)


def check_error(data: dict[str, Any]) -> None:
    """OpenAI's error shape."""
    assert data.keys() == {"error"}
    error = data["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)
    assert error["param"] is None or isinstance(error["param"], str)
    assert error["code"] is None or isinstance(error["code"], str)


def check_response(path: str, status: int, content_type: str, body: bytes) -> None:
    """Any response of ours, by the path it answers."""
    if status >= 400:
        check_error(json.loads(body))
        return
    is_stream = content_type.startswith("text/event-stream")
    match path:
        case "/v1/chat/completions" if is_stream:
            _check_events(body, check_chat_chunk)
        case "/v1/chat/completions":
            check_chat(json.loads(body))
        case "/v1/completions" if is_stream:
            _check_events(body, check_completion_chunk)
        case "/v1/completions":
            check_completion(json.loads(body))
        case "/v1/models":
            listed = json.loads(body)
            assert listed.keys() == {"object", "data"}
            for model in listed["data"]:
                check_model(model)
        case _ if path.startswith("/v1/models/"):
            check_model(json.loads(body))


def events(body: bytes) -> list[Any]:
    """The data of a server-sent event stream: JSON objects, and "[DONE]"."""
    *parts, rest = body.decode().split("\n\n")
    assert rest == ""
    assert all(part.startswith("data: ") for part in parts)
    return [part[6:] if part == "data: [DONE]" else json.loads(part[6:]) for part in parts]


def _check_events(body: bytes, check_chunk: Any) -> None:
    *chunks, last = events(body)
    for chunk in chunks:
        check_chunk(chunk)
    if last != "[DONE]":
        check_error(last)
