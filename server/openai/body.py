"""From the bytes of a request to a checked request model, or a 4xx that names the field.

The body is read up to a limit (413 above it), parsed without NaN, infinity or lone surrogates, and validated
strictly. Of pydantic's list of errors the first field's most telling one is reported, as OpenAI reports one.
"""

import json
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails, from_json
from starlette.requests import ClientDisconnect, Request

from server.errors import InvalidRequestError
from server.openai.errors import HttpError
from server.openai.protocol.common import WireModel

MAX_BODY_BYTES = 16 * 2**20
"""A prompt of a million tokens as ids is about 7 MB of JSON; no served context is near that."""
_SHOWN_LENGTH = 60
"""Characters of a bad value that an error message repeats."""

Model = TypeVar("Model", bound=WireModel)


async def read_model(request: Request, model: type[Model]) -> Model:
    """Raises HttpError (413, 415) and InvalidRequestError."""
    return (await read_both(request, model))[0]


async def read_both(request: Request, model: type[Model]) -> tuple[Model, dict[str, Any], int]:
    """The checked request, the object as the client wrote it, and its bytes. Raises as `read_model`."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json" and not content_type.endswith("+json"):
        raise HttpError(415, f"Send the body as 'Content-Type: application/json', not {content_type[:80]!r}.")
    body = await _read(request)
    data = parse(body)
    return validate(data, model), data, len(body)


async def _read(request: Request) -> bytes:
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > MAX_BODY_BYTES:
        raise _too_large()
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > MAX_BODY_BYTES:
                raise _too_large()
            parts.append(part)
    except ClientDisconnect:
        raise HttpError(400, "The client closed the connection before the body was complete.") from None
    return b"".join(parts)


def _too_large() -> HttpError:
    return HttpError(413, f"The request body exceeds {MAX_BODY_BYTES} bytes.", code="request_too_large")


def parse(body: bytes) -> Any:
    """JSON without NaN and infinity; lone surrogates and absurd nesting are refused too."""
    try:
        return from_json(body, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        raise InvalidRequestError(f"The request body is not valid JSON: {error}", code="invalid_json") from None


def validate(data: Any, model: type[Model]) -> Model:
    if not isinstance(data, dict):
        raise InvalidRequestError(f"The request body must be a JSON object, got {_kind(data)}.", code="invalid_type")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise _explain(_most_telling(error.errors(include_url=False)), data) from None


def _most_telling(errors: list[ErrorDetails]) -> ErrorDetails:
    """Of the first bad field: our own messages before pydantic's, then the error deepest inside a union."""
    first = errors[0]["loc"][:1]
    same_field = [error for error in errors if error["loc"][:1] == first]
    return max(same_field, key=lambda error: ("text" in error.get("ctx", {}), len(error["loc"])))


def _explain(error: ErrorDetails, data: dict[str, Any]) -> InvalidRequestError:
    kind, context = error["type"], error.get("ctx", {})
    path = _path(error["loc"], data, is_missing=kind == "missing")
    param = ".".join(part for part in (path, context.get("param")) if part) or None
    if kind == "missing":
        return InvalidRequestError(
            f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter"
        )
    if kind == "extra_forbidden":
        return InvalidRequestError(
            f"Unrecognized request argument supplied: {param}", param=param, code="unknown_parameter"
        )
    if kind.startswith("union_tag"):
        tag = str(context["discriminator"]).strip("'")
        path = f"{param}.{tag}" if param else tag
        return InvalidRequestError(f"Missing or unknown '{path}'.", param=path, code="missing_required_parameter")
    if "text" in context:
        message = f"Invalid value for '{param}': {context['text']}." if error["loc"] else f"{context['text']}."
        return InvalidRequestError(message, param=param, code=kind)
    problem = error["msg"].replace("Input should be", "expected", 1)
    message = f"Invalid value for '{param}': {problem}, got {_shown(error['input'])}."
    return InvalidRequestError(message, param=param, code=_code(kind, error["input"]))


def _path(loc: tuple[int | str, ...], data: Any, *, is_missing: bool) -> str | None:
    """The caller's own path (`messages[2].content`): pydantic's location without the names of union branches."""
    path, here = "", data
    for position, step in enumerate(loc):
        if isinstance(here, dict) and step in here:
            path, here = f"{path}.{step}", here[step]
        elif isinstance(here, list) and isinstance(step, int) and step < len(here):
            path, here = f"{path}[{step}]", here[step]
        elif is_missing and position == len(loc) - 1:
            path = f"{path}.{step}"
    return path.lstrip(".") or None


def _code(kind: str, value: Any) -> str:
    """OpenAI's code for pydantic's error type."""
    number = "integer" if isinstance(value, int) else "decimal"
    match kind:
        case "greater_than" | "greater_than_equal":
            return f"{number}_below_min_value"
        case "less_than" | "less_than_equal":
            return f"{number}_above_max_value"
        case "too_long":
            return "array_above_max_length"
        case "too_short":
            return "array_below_min_length"
        case _ if kind.endswith("_type"):
            return "invalid_type"
        case _:
            return "invalid_value"


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def _shown(value: Any) -> str:
    """The bad value as JSON, cut short; containers by kind only."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    if isinstance(value, str):
        value = value[: _SHOWN_LENGTH + 1]
    elif isinstance(value, int) and abs(value) >= 10**_SHOWN_LENGTH:
        return "a huge number"  # str() of an int refuses more than 4,300 digits
    text = json.dumps(value)
    return text if len(text) <= _SHOWN_LENGTH else text[:_SHOWN_LENGTH] + "…"
