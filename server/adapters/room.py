"""The memory budget of loaded adapter versions: who holds a place, who waits for one, who must go to make room.

Room goes to the strongest role first, then to the oldest claim. Idle versions give way, the weakest role and the least
recently used first, and never to a weaker role. Whoever is behind waits even if small enough to fit, or a large version
might wait for ever. Pure bookkeeping on one event loop; residency.py loads and unloads.
"""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum

from server.adapters.version import Version
from server.errors import AdapterError, ServerUnavailableError


class Role(IntEnum):
    """How strongly a version is kept in memory."""

    NONE = 0
    """Asked for by number."""
    STANDBY = 1
    """Shadow, or ready for a rollback."""
    SERVING = 2
    """Answers by role: live, canary, hold-back."""


class Phase(IntEnum):
    """The life of a version in memory, in order."""

    WAITING = 0
    """For room; counts for nothing yet."""
    LOADING = 1
    READY = 2
    UNLOADING = 3


@dataclass(eq=False)
class Place:
    """One version that is, or wants to be, in memory. `residency.Entry` adds what it is loaded as."""

    version: Version
    role: Role
    phase: Phase = Phase.WAITING
    num_leases: int = 0
    num_waiters: int = 0
    """Requests that take a lease as soon as it is loaded."""
    last_used: int = 0

    @property
    def size(self) -> int:
        return self.version.memory_bytes

    @property
    def is_idle(self) -> bool:
        return self.phase is Phase.READY and not self.num_leases and not self.num_waiters


@dataclass(eq=False)
class Room:
    """`max_versions` and `max_bytes` hold at any moment, unloading versions included. `evict` begins an unload."""

    max_versions: int
    max_bytes: int
    places: Callable[[], Iterator[Place]]
    evict: Callable[[Place], None]
    num_evictions: int = 0
    _claims: list[tuple[Place, "asyncio.Future[None]"]] = field(default_factory=list)
    """Oldest first."""

    async def claim(self, place: Place) -> None:
        """Wait for room; the phase is LOADING when this returns.

        Raises AdapterError when it could never fit, ServerUnavailableError when stronger roles hold all the room.
        """
        if not self._fits([], place):
            raise AdapterError(
                f"{place.version.ref} takes {place.size} bytes in memory; adapters may take {self.max_bytes} bytes and "
                f"{self.max_versions} places"
            )
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        claim = (place, granted)
        self._claims.append(claim)
        self.grant()
        try:
            await granted
        finally:
            if claim in self._claims:  # cancelled while it waited
                self._claims.remove(claim)
                self.grant()

    def grant(self) -> None:
        """Call whenever something became idle or left."""
        self._claims = [claim for claim in self._claims if not claim[1].done()]
        while self._claims:
            claim = max(self._claims, key=lambda one: one[0].role)  # the first of equals: the oldest
            place, granted = claim
            if self._fits(self.held(), place):
                place.phase = Phase.LOADING
                granted.set_result(None)
            elif not self._fits([one for one in self._staying() if one.role > place.role], place):
                granted.set_exception(
                    ServerUnavailableError(
                        f"{place.version.ref} has no room: live, canary and standby versions hold it ({self})"
                    )
                )
            else:
                self._make_room(place)
                return
            self._claims.remove(claim)

    def held(self) -> list[Place]:
        """What is in memory or on its way in or out."""
        return [one for one in self.places() if one.phase is not Phase.WAITING]

    @property
    def has_room(self) -> bool:
        """There is a place and some memory left."""
        held = self.held()
        return len(held) < self.max_versions and sum(one.size for one in held) < self.max_bytes

    def __str__(self) -> str:
        held = self.held()
        num_bytes = sum(one.size for one in held)
        return f"{len(held)} of {self.max_versions} places, {num_bytes} of {self.max_bytes} bytes"

    def _make_room(self, place: Place) -> None:
        """Unload idle versions until what stays leaves room enough."""
        victims = [one for one in self._staying() if one.is_idle and one.role <= place.role]
        for victim in sorted(victims, key=lambda one: (one.role, one.last_used)):
            if self._fits(self._staying(), place):
                return
            self.num_evictions += 1
            self.evict(victim)

    def _staying(self) -> list[Place]:
        return [one for one in self.held() if one.phase is not Phase.UNLOADING]

    def _fits(self, others: list[Place], place: Place) -> bool:
        num_bytes = sum(one.size for one in others) + place.size
        return len(others) < self.max_versions and num_bytes <= self.max_bytes
