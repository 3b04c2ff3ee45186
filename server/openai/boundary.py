"""The outermost layer of our own: counts every response and turns an unexpected exception into a logged 500.

Named failures are mapped by the application's exception handlers further in; what arrives here is our bug. This is the
process's one broad `except` for requests.
"""

import logging
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.metrics import Endpoint
from server.openai.errors import INTERNAL_ERROR

logger = logging.getLogger(__name__)

CLIENT_LEFT = 499
"""nginx's status for a client that closed the connection before an answer began."""

_ENDPOINTS: dict[str, Endpoint] = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/tokenize": "tokenize",
    "/detokenize": "detokenize",
    "/health": "health",
    "/metrics": "metrics",
}
_COLLECTIONS: dict[str, Endpoint] = {
    "models": "models",
    "traces": "traces",
    "episodes": "episodes",
    "feedback": "feedback",
    "responses": "feedback",  # only feedback by a response's id is below it
    "adapters": "adapters",
}
"""By the segment after /v1/."""


def endpoint_of(path: str) -> Endpoint:
    """A label of few values, whatever path a client makes up."""
    if path in _ENDPOINTS:
        return _ENDPOINTS[path]
    if path.startswith("/v1/"):
        return _COLLECTIONS.get(path.split("/", 3)[2], "other")
    return "other"


class Boundary:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, count_response: Callable[[Endpoint, int], None]) -> None:
        self._app = app
        self._count_response = count_response

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = CLIENT_LEFT

        async def watched_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched_send)
        except Exception:  # the top loop of a request
            logger.exception("%s %s failed", scope["method"], scope["path"])
            if status != CLIENT_LEFT:
                raise  # a response is under way; the server must drop the connection
            await INTERNAL_ERROR.response()(scope, receive, watched_send)
        finally:
            self._count_response(endpoint_of(scope["path"]), status)
