"""Who sends a request and what they may do: the API key in `Authorization: Bearer`, checked on every route but two.

While no key was ever made, everybody may ask for answers, and callers of a server that listens on loopback may do
everything. From the first key on (revoking the last one opens nothing) every route needs one; only /health and
/metrics never do. Not here: how keys are stored (server/keys), and what a viewer of traces sees (server/traces).
"""

import ipaddress
from collections.abc import Callable
from dataclasses import dataclass

from starlette.requests import Request

from server.keys.keys import SCOPES, Keys, MissingScopeError, Scope
from server.traces.policy import TracePolicy
from server.traces.viewer import Viewer


@dataclass(frozen=True, slots=True)
class Caller:
    """`key_id` "" is whoever needs no key."""

    name: str
    """For the registry's history: who asked."""
    key_id: str = ""
    scopes: frozenset[Scope] = frozenset(SCOPES)
    trace_policy: TracePolicy = "on"

    @property
    def is_admin(self) -> bool:
        return "admin" in self.scopes

    @property
    def viewer(self) -> Viewer:
        """Which traces, episodes and feedback the caller sees."""
        return Viewer(self.key_id, self.is_admin)

    @property
    def cache_salt(self) -> bytes:
        return self.key_id.encode()

    def require(self, *scopes: Scope) -> "Caller":
        """Itself, when it has one of them; admin may do everything. Raises MissingScopeError."""
        if self.is_admin or not self.scopes.isdisjoint(scopes):
            return self
        wanted = " or ".join(f"'{scope}'" for scope in scopes)
        if self.key_id:
            raise MissingScopeError(f"The API {self.name} does not have the scope {wanted}.")
        raise MissingScopeError(
            f"This needs an API key with the scope {wanted}, because the server does not listen on loopback "
            "(make one with `sterna keys create`)."
        )


LOCAL = Caller("loopback")
ANYBODY = Caller("nobody", scopes=frozenset({"inference"}))


class Access:
    """`keys` raises when nothing can be known yet: the runtime that holds the database is still opening."""

    def __init__(self, keys: Callable[[], Keys], *, is_loopback: bool) -> None:
        self._keys = keys
        self._without_keys = LOCAL if is_loopback else ANYBODY

    async def caller(self, http: Request) -> Caller:
        """Raises InvalidKeyError, and ServerUnavailableError while keys cannot be looked up."""
        keys = self._keys()
        if not await keys.any_exist():
            return self._without_keys
        kind, _, text = http.headers.get("authorization", "").partition(" ")
        key = await keys.verify(text.strip() if kind.lower() == "bearer" else None)
        return Caller(f"key '{key.name}'", key.id, key.scopes, key.trace_policy)


def is_loopback(host: str) -> bool:
    """Whether nobody from elsewhere reaches a server that listens on `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
