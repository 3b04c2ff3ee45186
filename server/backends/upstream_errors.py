"""What an upstream's refusals and failures become for our client.

4xx are the client's and pass with their status, message, type, param and code; 429 keeps its Retry-After. What is
between us and the upstream (credentials, credit) is not the client's fault: 502, and what the upstream said goes to
our log only. Everything else, and every connection that fails: 503. The shapes are those of OpenAI, vLLM (old and
new), Ollama, FastAPI and Mistral; a body that is none of them is quoted.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json

from server.errors import ServerUnavailableError, SternaError, UpstreamError

logger = logging.getLogger(__name__)

MAX_MESSAGE_LENGTH = 2000
"""Characters that are repeated. Some servers quote the request."""
_OURS = (401, 402, 403, 407)
"""The upstream refuses this server, not its client: key, credit, rights, proxy."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """The fields of an error object. `status`: as the body has it, which only errors in mid-stream need."""

    message: str
    type: str | None = None
    param: str | None = None
    code: str | None = None
    status: int | None = None


def read_refusal(body: bytes | str | dict[str, Any], secrets: Sequence[str] = ()) -> Refusal:
    """Never raises. `secrets` are taken out of the message: some servers quote the key."""
    if not isinstance(body, dict):
        text = body if isinstance(body, str) else body.decode("utf-8", "replace")
        try:
            value = from_json(text)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            return Refusal(_short(text, secrets))
        body = value
    inner = body.get("error")
    fields = inner if isinstance(inner, dict) else body
    message = inner if isinstance(inner, str) and inner else fields.get("message") or fields.get("detail") or fields
    code = fields.get("code")
    status = code if isinstance(code, int) else fields.get("status_code")
    return Refusal(
        _short(message if isinstance(message, str) else json.dumps(message), secrets),
        _text(fields.get("type")),
        _text(fields.get("param")),
        None if isinstance(code, int) else _text(code),
        status if isinstance(status, int) and 400 <= status < 600 else None,
    )


def refusal_error(status: int | None, refusal: Refusal, *, retry_after: str | None = None) -> SternaError:
    """The exception for a refusal. `status` None: in the middle of an answer, where only the body can tell."""
    if status is None:
        status = refusal.status or 500
    if status in _OURS:
        logger.warning("the upstream answered HTTP %d: %s", status, refusal.message)
        return UpstreamError(
            502,
            f"The upstream refuses this server (HTTP {status}): its API key, credit or rights do not allow the "
            "request. The server's log has the upstream's words; the key is the setting upstream_api_key.",
            type="server_error",
            code="upstream_refused_server",
        )
    if 400 <= status < 500:
        return UpstreamError(
            status,
            refusal.message,
            type=refusal.type or ("rate_limit_error" if status == 429 else "invalid_request_error"),
            param=refusal.param,
            code=refusal.code,
            retry_after=retry_after,
        )
    if 300 <= status < 400:
        return ServerUnavailableError(
            f"The upstream redirects (HTTP {status}), which is not followed; set the upstream URL to where it leads."
        )
    return ServerUnavailableError(f"The upstream failed (HTTP {status}): {refusal.message}")


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _short(text: str, secrets: Sequence[str]) -> str:
    text = " ".join(text.split())
    for secret in secrets:
        text = text.replace(secret, "[redacted]")
    if not text:
        return "it gave no reason"
    return text if len(text) <= MAX_MESSAGE_LENGTH else text[:MAX_MESSAGE_LENGTH] + "…"
