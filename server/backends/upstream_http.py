"""The connections to an upstream server: one pool, kept alive, with our key; every failure as a named exception.

What is under way can be ended from outside (the server shuts down), and a caller that stops reading closes its
connection at once, which is how an upstream learns that nobody wants the rest. HTTPS_PROXY and NO_PROXY are honoured.
Not here: what the bodies mean.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Mapping
from typing import Any, TypeVar

import httpx
from pydantic_core import from_json

from server.backends.upstream_errors import read_refusal, refusal_error
from server.errors import ConfigError, ServerUnavailableError

Result = TypeVar("Result")

CONNECT_SECONDS = 5.0
READ_SECONDS = 600.0
"""Between two parts of a body, and until its first: a large model on a long prompt, or a reasoning one behind a server
that streams no reasoning, says nothing for minutes."""
WRITE_SECONDS = 60.0
MAX_IDLE_CONNECTIONS = 64
IDLE_SECONDS = 30.0
"""Below the 60 s and more after which servers and load balancers close, so that a request seldom meets a closed one."""
MAX_ERROR_BYTES = 65_536
SHUT_DOWN = "the server shut down before the answer was complete"
_EVENTS = {"accept": "text/event-stream, application/json", "content-type": "application/json"}


class UpstreamHttp:
    """`url` as the setting: with its path, or without one, which means `/v1`. Raises ConfigError."""

    def __init__(self, url: str, api_key: str | None) -> None:
        key = (api_key or "").strip()
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise ConfigError("upstream_api_key has characters that no HTTP header can carry")
        try:
            base = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise ConfigError(f"upstream is not a URL: {error}") from None
        self.secrets = tuple(secret for secret in (key, base.password) if secret)
        """What must be neither logged nor told."""
        # httpx writes URLs into its log lines.
        user, base = (base.username, base.password), base.copy_with(username=None, password=None)
        path = base.path.rstrip("/")
        self._base = base.copy_with(path=path or "/v1")
        self._root = base.copy_with(path=path.removesuffix("/v1") or "/")
        self.name = base.netloc.decode("ascii")
        """Host and port, for messages."""
        self.fault: str | None = None
        """Why the last request found nobody; None: it was answered."""
        headers = {"accept-encoding": "identity"}  # a compressed stream would come in lumps
        if key:
            headers["authorization"] = f"Bearer {key}"
        self._client = httpx.AsyncClient(
            headers=headers,
            auth=user if any(user) else None,
            timeout=httpx.Timeout(None, connect=CONNECT_SECONDS, read=READ_SECONDS, write=WRITE_SECONDS),
            # Nobody waits in a queue of ours: how much an upstream takes is for the upstream to say.
            limits=httpx.Limits(
                max_connections=None,
                max_keepalive_connections=MAX_IDLE_CONNECTIONS,
                keepalive_expiry=IDLE_SECONDS,
            ),
        )
        self._waiting: set[asyncio.Timeout] = set()
        self._is_ending = False

    async def stream(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[bytes, None]:
        """The parts of the answer's body. Raises UpstreamError, ServerUnavailableError."""
        response = await self._open("POST", self._url(self._base, path), body, _EVENTS)
        try:
            parts = response.aiter_bytes()
            while (part := await self._guarded(anext(parts, None))) is not None:
                yield part
        finally:
            await response.aclose()

    async def ask(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, at_root: bool = False
    ) -> dict[str, Any]:
        """A JSON object for one. `at_root`: beside /v1, not in it. Raises UpstreamError, ServerUnavailableError."""
        url = self._url(self._root if at_root else self._base, path)
        response = await self._open(method, url, body, {"accept": "application/json", **_content_type(body)})
        try:
            text = await self._guarded(response.aread())
        finally:
            await response.aclose()
        try:
            value = from_json(text)
        except ValueError as error:
            raise ServerUnavailableError(f"The upstream's answer to {path} is not JSON: {error}.") from None
        if not isinstance(value, dict):
            raise ServerUnavailableError(f"The upstream's answer to {path} is no JSON object.")
        return value

    def end(self) -> None:
        """Whoever waits for the upstream gets ServerUnavailableError, now and from now on."""
        self._is_ending = True
        for scope in self._waiting:
            scope.reschedule(0)
        self._waiting.clear()

    async def aclose(self) -> None:
        await self._client.aclose()

    async def _open(
        self, method: str, url: httpx.URL, body: Mapping[str, Any] | None, headers: Mapping[str, str]
    ) -> httpx.Response:
        """An answer with status 200, its body unread."""
        content = None if body is None else json.dumps(body, separators=(",", ":"), allow_nan=False).encode()
        request = self._client.build_request(method, url, content=content, headers=headers)
        response = await self._guarded(self._client.send(request, stream=True))
        if response.status_code == 200:
            return response
        try:
            text = bytearray()
            parts = response.aiter_bytes()
            while len(text) < MAX_ERROR_BYTES and (part := await self._guarded(anext(parts, None))) is not None:
                text += part
        finally:
            await response.aclose()
        refusal = read_refusal(bytes(text), self.secrets)
        raise refusal_error(response.status_code, refusal, retry_after=response.headers.get("retry-after"))

    async def _guarded(self, work: Awaitable[Result]) -> Result:
        """One wait for the upstream: that can be ended, and that fails in our words."""
        scope = asyncio.timeout(0 if self._is_ending else None)
        try:
            async with scope:
                self._waiting.add(scope)
                try:
                    result = await work
                finally:
                    self._waiting.discard(scope)
        except TimeoutError:
            raise ServerUnavailableError(SHUT_DOWN) from None
        except httpx.HTTPError as error:
            self.fault = f"{self.name}: {_reason(error)}"
            raise ServerUnavailableError(f"The upstream cannot be reached or broke off: {_reason(error)}.") from error
        self.fault = None
        return result

    def _url(self, base: httpx.URL, path: str) -> httpx.URL:
        """A query of the setting's URL (Azure's api-version) stays."""
        return base.copy_with(path=base.path.rstrip("/") + path)


def _content_type(body: Any) -> dict[str, str]:
    return {} if body is None else {"content-type": "application/json"}


def _reason(error: httpx.HTTPError) -> str:
    """httpx has no words for time-outs."""
    match error:
        case httpx.ConnectTimeout():
            return f"no connection within {CONNECT_SECONDS:g} s"
        case httpx.ReadTimeout():
            return f"nothing came for {READ_SECONDS:g} s"
        case httpx.WriteTimeout():
            return f"it did not read the request for {WRITE_SECONDS:g} s"
    return str(error) or type(error).__name__
