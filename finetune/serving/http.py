"""Requests to a server that may be away for a while: tried again with backoff until the patience is over.

Everything that is sent here can be sent twice: greedy answers are equal, an import of the same content is the same
version, and who changes an adapter's state looks at the state again when it is told that it has changed.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import httpx

from finetune.serving.errors import RefusedError, ServerDownError
from server.config import Remote

CONNECT_SECONDS = 5.0
READ_SECONDS = 300.0
"""A long answer on a busy CPU; an import of gigabytes is checked before it is answered."""
FIRST_WAIT_SECONDS = 0.25
LONGEST_WAIT_SECONDS = 10.0
AWAY = frozenset({429, 502, 503, 504})
"""Busy, draining, loading, or a proxy before a server that is none of these."""
_LOOPBACK = frozenset(("127.0.0.1", "::1", "localhost"))


def may_use_proxy(url: str) -> bool:
    """A proxy cannot reach our loopback, and must not see what is meant for it."""
    return httpx.URL(url).host not in _LOOPBACK


class Http:
    """One server. Safe to use from several threads."""

    def __init__(
        self,
        remote: Remote,
        *,
        patience_seconds: float,
        sleep: Callable[[float], object] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        on_away: Callable[[str], None] = lambda reason: None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """`sleep` may raise, to give up. `on_away` hears once what is wrong, whenever the server goes away."""
        self.url = remote.url
        self._patience = patience_seconds
        self._sleep = sleep
        self._clock = clock
        self._on_away = on_away
        key = remote.api_key
        self._client = httpx.Client(
            base_url=remote.url,
            headers={} if key is None else {"Authorization": f"Bearer {key.get_secret_value()}"},
            timeout=httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=None),
            trust_env=may_use_proxy(remote.url),
            transport=transport,
        )

    def close(self) -> None:
        self._client.close()

    def request(
        self,
        method: str,
        path: str,
        *,
        json: Any = None,
        content: bytes | None = None,
        query: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        """A 2xx answer. Raises RefusedError, and ServerDownError when the patience is over."""
        since, wait = None, FIRST_WAIT_SECONDS
        while True:
            params = None if query is None else {key: value for key, value in query.items() if value is not None}
            reason, response = "", None
            try:
                response = self._client.request(
                    method, path, json=json, content=content, params=params, headers=headers
                )
            except httpx.TransportError as error:
                reason = str(error) or type(error).__name__
            if response is not None:
                if response.is_success:
                    return response
                reason = _message(response)
                if response.status_code not in AWAY:
                    raise RefusedError(response.status_code, reason)
            now = self._clock()
            if since is None:
                since = now
                self._on_away(reason)
            if now - since >= self._patience:
                raise ServerDownError(f"the server at {self.url} has been away for {self._patience:g} s: {reason}")
            self._sleep(min(max(wait, _retry_after(response)), LONGEST_WAIT_SECONDS))
            wait = min(2 * wait, LONGEST_WAIT_SECONDS)

    def peek(self, path: str) -> str | None:
        """The text at `path`, tried once; None: nobody is there, or not well."""
        try:
            response = self._client.get(path, timeout=CONNECT_SECONDS)
        except httpx.TransportError:
            return None
        return response.text if response.is_success else None


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, TypeError, KeyError):
        return f"HTTP {response.status_code} {response.reason_phrase}"


def _retry_after(response: httpx.Response | None) -> float:
    text = "" if response is None else response.headers.get("retry-after", "")
    return float(text) if text.isdigit() else 0.0
