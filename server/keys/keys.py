"""API keys: made, listed, revoked, and checked on every request.

A key is `sk-sterna-` and 256 random bits; it is shown once, when it is made, and only its SHA-256 is stored. What was
found is remembered for a few seconds, so that most requests need no query; a revocation made on another server takes
that long to be seen. Not here: HTTP, and which route needs which scope.
"""

import hashlib
import hmac
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, get_args

from sqlalchemy import insert, select, update

from server.errors import InvalidRequestError, SternaError
from server.keys.tables import api_keys
from server.storage.clock import Clock, utc_now
from server.storage.database import Database
from server.storage.errors import DatabaseUnavailableError
from server.storage.patience import Patience
from server.traces.policy import TracePolicy
from server.traces.text import short

Scope = Literal["inference", "feedback", "train", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
PREFIX = "sk-sterna-"
MAX_NAME_LENGTH = 128

CACHE_SECONDS = 5.0
"""How long a revocation on another server may go unseen."""
STALE_SECONDS = 300.0
"""How long a key that was good stays good while the database cannot be asked (relaxed logging serves on then)."""
CACHE_KEYS = 4096


class InvalidKeyError(SternaError):
    """No key, an unknown one or a revoked one: 401 on the wire."""


class MissingScopeError(SternaError):
    """A good key that may not do this: 403 on the wire."""


class KeyNotFoundError(SternaError):
    """No key has this id."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    id: str
    name: str
    scopes: frozenset[Scope]
    trace_policy: TracePolicy
    created_at: datetime
    revoked_at: datetime | None = None

    @property
    def is_admin(self) -> bool:
        return "admin" in self.scopes


@dataclass(frozen=True, slots=True)
class _Cached:
    key: ApiKey | None
    asked_at: float


class Keys:
    """`verify` and `any_exist` on the event loop; the rest wherever waiting is allowed."""

    def __init__(
        self, database: Database, *, clock: Clock = utc_now, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._database = database
        self._clock = clock
        self._monotonic = monotonic
        self._cache: OrderedDict[bytes, _Cached] = OrderedDict()
        self._any_exist: tuple[bool, float] | None = None
        self._patience = Patience()

    def create(
        self, name: str, scopes: Iterable[str] = ("inference", "feedback"), *, trace_policy: str = "on"
    ) -> tuple[ApiKey, str]:
        """The key's record and, this once, its text. Raises InvalidRequestError."""
        wanted = _check(name, scopes, trace_policy)
        text = PREFIX + secrets.token_urlsafe(32)
        row = {
            "id": "key-" + secrets.token_hex(8),
            "name": name,
            "digest": _digest(text),
            "scopes": ",".join(sorted(wanted)),
            "trace_policy": trace_policy,
            "created_at": self._clock(),
        }
        with self._database.write() as connection:
            created = connection.execute(insert(api_keys).values(row).returning(*api_keys.c)).one()
        self._any_exist = None
        return _key(created), text

    def list(self, *, with_revoked: bool = False) -> Sequence[ApiKey]:
        """In the order in which they were made."""
        query = select(api_keys).order_by(api_keys.c.seq)
        if not with_revoked:
            query = query.where(api_keys.c.revoked_at.is_(None))
        with self._database.read() as connection:
            return [_key(row) for row in connection.execute(query)]

    def revoke(self, key_id: str) -> ApiKey:
        """Takes effect here at once, on other servers within CACHE_SECONDS. Twice is the same. KeyNotFoundError."""
        key_id = short(key_id, MAX_NAME_LENGTH)
        statement = update(api_keys).where(api_keys.c.id == key_id, api_keys.c.revoked_at.is_(None))
        with self._database.write() as connection:
            connection.execute(statement.values(revoked_at=self._clock()))
            row = connection.execute(select(api_keys).where(api_keys.c.id == key_id)).one_or_none()
        if row is None:
            raise KeyNotFoundError(f"There is no API key with the id '{key_id[:64]}'.")
        self._cache.clear()
        return _key(row)

    async def verify(self, text: str | None) -> ApiKey:
        """The key behind a bearer token. Raises InvalidKeyError; DatabaseUnavailableError when that cannot be known."""
        if text is None or not text.startswith(PREFIX):
            raise InvalidKeyError("A valid API key is needed: 'Authorization: Bearer sk-sterna-...'.")
        digest = _digest(text)
        now = self._monotonic()
        cached = self._cache.get(digest)
        if cached is None or now - cached.asked_at > CACHE_SECONDS:
            cached = await self._ask(digest, now, cached)
        if cached.key is None:
            raise InvalidKeyError("The API key is unknown or was revoked.")
        return cached.key

    async def any_exist(self) -> bool:
        """Whether a key was ever made: from then on keys are needed, for a revocation must open nothing."""
        now = self._monotonic()
        if self._any_exist is None or not (self._any_exist[0] or now - self._any_exist[1] <= CACHE_SECONDS):
            query = select(api_keys.c.seq).limit(1)

            def ask() -> bool:
                with self._database.read() as connection:
                    return connection.scalar(query) is not None

            try:
                self._any_exist = (await self._patience.ask(ask), now)
            except DatabaseUnavailableError:
                if self._any_exist is None:
                    raise
        return self._any_exist[0]

    async def _ask(self, digest: bytes, now: float, stale: _Cached | None) -> _Cached:
        def ask() -> ApiKey | None:
            with self._database.read() as connection:
                row = connection.execute(select(api_keys).where(api_keys.c.digest == digest)).one_or_none()
            # The index has found it by its bytes already; this is for what the index's timing may tell.
            if row is None or row.revoked_at is not None or not hmac.compare_digest(bytes(row.digest), digest):
                return None
            return _key(row)

        try:
            found = _Cached(await self._patience.ask(ask), now)
        except DatabaseUnavailableError:
            if stale is not None and now - stale.asked_at <= STALE_SECONDS:
                return stale
            raise
        self._cache[digest] = found
        self._cache.move_to_end(digest)
        while len(self._cache) > CACHE_KEYS:
            self._cache.popitem(last=False)
        return found


def _check(name: str, scopes: Iterable[str], trace_policy: str) -> set[str]:
    wanted = set(scopes)
    if not name.strip() or len(name) > MAX_NAME_LENGTH or not name.isprintable():
        raise InvalidRequestError(
            f"a key's name has 1 to {MAX_NAME_LENGTH} printable characters, not {name[:40]!r}", param="name"
        )
    unknown = sorted(wanted.difference(SCOPES))
    if unknown or not wanted:
        raise InvalidRequestError(
            f"scopes are some of {', '.join(SCOPES)}" + (f", not {unknown[0][:40]!r}" if unknown else ""),
            param="scopes",
        )
    if trace_policy not in get_args(TracePolicy):
        raise InvalidRequestError(f"a trace policy is 'on' or 'off', not {trace_policy[:40]!r}", param="trace_policy")
    return wanted


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _key(row: Any) -> ApiKey:
    return ApiKey(row.id, row.name, frozenset(row.scopes.split(",")), row.trace_policy, row.created_at, row.revoked_at)
