"""Every failure's HTTP status and OpenAI error body, in one place.

Shape: {"error": {"message", "type", "param", "code"}}. Named exceptions of the rooms below map here; what is not
named is our bug, answered 500 without details (the boundary in `server/openai/boundary.py` logs the traceback).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus

from starlette.exceptions import HTTPException
from starlette.responses import Response

from server.adapters.errors import AdapterConflictError, VersionNotFoundError
from server.errors import (
    AdapterError,
    InvalidRequestError,
    ModelNotFoundError,
    QueueFullError,
    ServerUnavailableError,
    SternaError,
    UpstreamError,
)
from server.keys.keys import InvalidKeyError, KeyNotFoundError, MissingScopeError
from server.traces.errors import FeedbackConflictError, TraceNotFoundError

UNAVAILABLE_RETRY_SECONDS = 1
"""A model loads in about a second; a drained server's load balancer has moved on by then."""


class HttpError(SternaError):
    """A request refused for a reason of HTTP itself: size, content type, method, path."""

    def __init__(self, status: int, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


@dataclass(frozen=True, slots=True)
class WireError:
    """A status, the fields of the error object, and extra headers."""

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> bytes:
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return json.dumps({"error": error}, ensure_ascii=True, separators=(",", ":")).encode()

    def response(self) -> Response:
        return Response(self.body(), self.status, headers=dict(self.headers), media_type="application/json")


INTERNAL_ERROR = WireError(500, "The server failed to answer; its log says why.", "server_error")


def wire_error(error: Exception) -> WireError:
    """Map an exception. Anything unknown is INTERNAL_ERROR, whose cause the caller must log."""
    match error:
        case HttpError():
            return WireError(error.status, str(error), code=error.code)
        case InvalidRequestError():
            return WireError(400, str(error), param=error.param, code=error.code)
        case InvalidKeyError():
            headers = {"WWW-Authenticate": "Bearer"}
            return WireError(401, str(error), code="invalid_api_key", headers=headers)
        case MissingScopeError():
            return WireError(403, str(error), "permission_error", code="insufficient_permissions")
        case TraceNotFoundError():
            return WireError(404, str(error), param=error.param, code="not_found")
        case KeyNotFoundError():
            return WireError(404, str(error), code="not_found")
        case FeedbackConflictError():
            return WireError(409, str(error), param=error.param, code="conflict")
        case AdapterConflictError():
            return WireError(409, str(error), code="conflict")
        case VersionNotFoundError():
            return WireError(404, str(error), code="version_not_found")
        case ModelNotFoundError():
            return WireError(404, str(error), param="model", code="model_not_found")
        case QueueFullError():
            headers = {"Retry-After": str(error.retry_after_seconds)}
            return WireError(429, str(error), "rate_limit_error", code="rate_limit_exceeded", headers=headers)
        case ServerUnavailableError():
            headers = {"Retry-After": str(UNAVAILABLE_RETRY_SECONDS)}
            return WireError(503, str(error), "server_error", code="service_unavailable", headers=headers)
        case UpstreamError():
            return _from_upstream(error)
        case AdapterError():
            return WireError(400, str(error), code="invalid_adapter")
        case HTTPException():
            return _from_starlette(error)
        case _:
            return INTERNAL_ERROR


def _from_upstream(error: UpstreamError) -> WireError:
    """Its words; of its headers only a Retry-After that is one (seconds or a date)."""
    wait = error.retry_after or ""
    headers = {"Retry-After": wait} if wait.isascii() and wait.isprintable() and 0 < len(wait) < 64 else {}
    return WireError(error.status, str(error), error.type, error.param, error.code, headers)


def _from_starlette(error: HTTPException) -> WireError:
    """The router's own refusals: unknown path and wrong method."""
    phrases = {404: "Unknown path; the served paths are listed at /openapi.json.", 405: "Method not allowed here."}
    message = phrases.get(error.status_code) or error.detail or HTTPStatus(error.status_code).phrase
    codes = {404: "unknown_url", 405: "method_not_allowed"}
    return WireError(error.status_code, message, code=codes.get(error.status_code), headers=dict(error.headers or {}))
