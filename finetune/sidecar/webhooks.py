"""Tells webhooks which versions were promoted, rejected and rolled back, whoever decided it; signed, and never lost.

The registry's numbered changes are the outbox: they are committed with what they tell. What an endpoint has been told
is a place in their numbers, moved on when it has answered 2xx; killed in between, it is told again (with the same id).
An endpoint that fails is tried again with backoff, in order, and holds back no other. A new one hears of what comes.

    Sterna-Id: change-17
    Sterna-Signature: t=<seconds>,v1=<hex HMAC-SHA256 of "<t>.<body>" under the secret>
"""

import hashlib
import hmac
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from sqlalchemy import select, update

from finetune.rounds.lease import Lease, check_lease
from finetune.rounds.round import Round
from finetune.rounds.store import RoundStore
from finetune.rounds.tables import webhook_places
from server.adapters.registry import Registry
from server.adapters.states import Action
from server.adapters.version import Change
from server.storage.database import Database

logger = logging.getLogger(__name__)

EVENTS = {
    Action.PROMOTE: "promoted",
    Action.OVERRIDE: "promoted",
    Action.REJECT: "rejected",
    Action.ROLLBACK: "rolled_back",
}
FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 3600.0
TIMEOUT_SECONDS = 10.0
LEASE = "all webhooks"
"""No adapter has such a name: rounds are leased under theirs."""


@dataclass(slots=True)
class _Endpoint:
    url: str
    name: str
    wait: float = 0.0
    next_try: float = 0.0


class Webhooks:
    """Used by one thread, under `LEASE`."""

    def __init__(
        self,
        database: Database,
        urls: Sequence[str],
        secret: str,
        *,
        transport: httpx.BaseTransport | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        on_delivery: Callable[[str], None] = lambda outcome: None,
    ) -> None:
        self._database = database
        self._registry = Registry(database)
        self._rounds = RoundStore(database)
        self._secret = secret.encode()
        self._clock = clock
        self._wall_clock = wall_clock
        self._on_delivery = on_delivery
        self._client = httpx.Client(timeout=TIMEOUT_SECONDS, transport=transport)
        self._endpoints = [_Endpoint(url, _name(url)) for url in urls]

    def close(self) -> None:
        self._client.close()

    def deliver(self, lease: Lease) -> None:
        """Whatever is due, to every endpoint. Raises LeaseLostError."""
        for endpoint in self._endpoints:
            place = self._place(lease, endpoint)
            while endpoint.next_try <= self._clock():
                found = self._registry.changes_since(place, limit=100)
                if not found:
                    break
                for change in found:
                    if not self._tell(endpoint, change):
                        break
                    place = change.number
                    self._move(lease, endpoint, place)

    def _tell(self, endpoint: _Endpoint, change: Change) -> bool:
        """False: not now."""
        kind = EVENTS.get(change.action)
        if kind is None:
            return True
        body = json.dumps(self._event(kind, change)).encode()
        try:
            headers = self._headers(change, body)
            with self._client.stream(
                "POST", endpoint.url, content=body, headers=headers
            ) as reply:  # its body is its own
                problem = None if reply.is_success else f"HTTP {reply.status_code}"
        except httpx.HTTPError as error:
            problem = str(error) or type(error).__name__
        self._on_delivery("delivered" if problem is None else "failed")
        if problem is None:
            endpoint.wait = endpoint.next_try = 0.0
            return True
        endpoint.wait = min(max(2 * endpoint.wait, FIRST_WAIT_SECONDS), LONGEST_WAIT_SECONDS)
        endpoint.next_try = self._clock() + endpoint.wait
        logger.warning("webhook %s: %s; tried again in %g s", endpoint.name, problem, endpoint.wait)
        return False

    def _event(self, kind: str, change: Change) -> dict[str, Any]:
        assert change.ref is not None, "these are changes of versions"
        round = self._rounds.of_version(*change.ref)
        return {
            "id": f"change-{change.number}",
            "type": kind,
            "adapter": change.ref.adapter,
            "version": str(change.ref),
            "from_state": change.from_state,
            "to_state": change.to_state,
            "reason": change.reason,
            "asked_by": change.asked_by,
            "at": change.at.isoformat(),
            "round": None if round is None else _round(round),
        }

    def _headers(self, change: Change, body: bytes) -> dict[str, str]:
        seconds = int(self._wall_clock())
        return {
            "Content-Type": "application/json",
            "Sterna-Id": f"change-{change.number}",
            "Sterna-Signature": f"t={seconds},v1={signature(self._secret, seconds, body)}",
        }

    def _place(self, lease: Lease, endpoint: _Endpoint) -> int:
        query = select(webhook_places.c.last_change).where(webhook_places.c.endpoint == endpoint.name)
        with self._database.read() as connection:
            found = connection.scalar(query)
        if found is not None:
            return int(found)
        with self._database.write(lock=LEASE) as connection:
            check_lease(connection, lease)
            latest = self._registry.latest_change()
            connection.execute(webhook_places.insert().values(endpoint=endpoint.name, last_change=latest))
        return latest

    def _move(self, lease: Lease, endpoint: _Endpoint, place: int) -> None:
        mine = webhook_places.c.endpoint == endpoint.name
        with self._database.write(lock=LEASE) as connection:
            check_lease(connection, lease)
            connection.execute(update(webhook_places).where(mine).values(last_change=place))


def signature(secret: bytes, seconds: int, body: bytes) -> str:
    """What a receiver computes and compares, in constant time."""
    return hmac.new(secret, f"{seconds}.".encode() + body, hashlib.sha256).hexdigest()


def _name(url: str) -> str:
    """For the database and the log: a URL may hold a secret."""
    host = httpx.URL(url).host[:40]
    return f"{host} {hashlib.sha256(url.encode()).hexdigest()[:16]}"


def _round(round: Round) -> dict[str, Any]:
    return {"id": str(round.ref), "result": round.result, "reason": round.reason}
