"""Makes the routing table what the registry says: load beside, then swap the adapter's part of the table.

What cannot be loaded changes nothing: the old route stays, the reason is kept, and it is tried again, later and later.
One adapter never waits for another. Not here: when to look (service.py), and what has room (room.py).
"""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Generic, Literal

from server.adapters.registry import Registry
from server.adapters.residency import Handle, Residency
from server.adapters.room import Role
from server.adapters.router import AdapterRoutes, RoutingTable
from server.adapters.version import Adapter, Version, VersionRef
from server.errors import SternaError

logger = logging.getLogger(__name__)

Outcome = Literal["switched", "failed"]

MAX_RETRY_SECONDS = 60.0
CHANGES_AT_ONCE = 1000


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a version is not served where the registry wants it."""

    version: VersionRef
    reason: str
    num_attempts: int
    retry_at: float
    """By the monotonic clock."""


class Follower(Generic[Handle]):
    """`on_swap` hears of every new live version: whether it answers now, and the seconds that this took."""

    def __init__(
        self,
        registry: Registry,
        residency: Residency[Handle],
        *,
        base_names: Iterable[str],
        on_swap: Callable[[Outcome, float], None] = lambda outcome, seconds: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.table = RoutingTable(frozenset(base_names), b"")
        self.change = 0
        """The registry's last change that was seen."""
        self.failures: dict[str, Failure] = {}
        """By adapter."""
        self._registry = registry
        self._residency = residency
        self._on_swap = on_swap
        self._clock = clock
        self._has_started = False
        self._wanted: dict[str, AdapterRoutes] = {}
        """What is being loaded for, or failed to be: the table has it later."""
        self._looking = asyncio.Lock()
        self._order: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._tasks: dict[asyncio.Task[None], str] = {}

    async def start(self) -> None:
        """Read the registry, and load what is live while there is room."""
        draw_key = await asyncio.to_thread(self._registry.draw_key)
        self.table = RoutingTable(self.table.base_names, draw_key)
        self.change = await asyncio.to_thread(self._registry.latest_change)  # first: what comes later is followed later
        for adapter in await asyncio.to_thread(self._registry.adapters):
            await self._follow(adapter)
        self._has_started = True

    async def look(self) -> "list[asyncio.Task[None]]":
        """Begin to follow what has changed since the last look, and to try again what failed.

        Raises DatabaseUnavailableError, and then the next look sees the same changes.
        """
        async with self._looking:
            names, change = self._due(), self.change
            while True:
                changes = await asyncio.to_thread(self._registry.changes_since, change, limit=CHANGES_AT_ONCE)
                names.update(one.adapter for one in changes)
                change = changes[-1].number if changes else change
                if len(changes) < CHANGES_AT_ONCE:
                    break
            adapters = await asyncio.to_thread(self._registry.adapters, names) if names else []
            self.change = change
            return [self._begin(adapter) for adapter in adapters]

    def running(self) -> frozenset[asyncio.Task[None]]:
        """What follows a change just now."""
        return frozenset(self._tasks)

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks))

    def _due(self) -> set[str]:
        """Adapters to be tried again."""
        busy = set(self._tasks.values())
        due = {name for name, failure in self.failures.items() if failure.retry_at <= self._clock()}
        return due - busy

    def _begin(self, adapter: Adapter) -> "asyncio.Task[None]":
        task = asyncio.create_task(self._follow(adapter), name=f"follow {adapter.name}")
        self._tasks[task] = adapter.name
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: "asyncio.Task[None]") -> None:
        name = self._tasks.pop(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("following the adapter %s failed", name, exc_info=task.exception())

    async def _follow(self, adapter: Adapter) -> None:
        async with self._order[adapter.name]:  # in the order in which they were read
            now = self.table.adapters.get(adapter.name)
            self._wanted[adapter.name] = wanted = AdapterRoutes.of(adapter)
            self._assign_roles()
            start = self._clock()
            routes, failure = await self._load(wanted, now)
            self.table = self.table.with_routes([routes])
            if failure is None:
                self.failures.pop(adapter.name, None)
                del self._wanted[adapter.name]
            else:
                self.failures[adapter.name] = failure
            self._assign_roles()
            self._residency.discard(one.ref for one in adapter.versions.values() if one.is_deleted)
            if self._has_started:
                self._report(now, routes, failure, self._clock() - start)

    async def _load(self, wanted: AdapterRoutes, now: AdapterRoutes | None) -> tuple[AdapterRoutes, Failure | None]:
        """What can be served: a canary or hold-back that cannot is left out; for a live one the old stays."""
        routes, failure = wanted, None
        for version in wanted.serving():
            if version is wanted.previous and routes.live is not wanted.live:
                continue  # held back from a version that does not answer
            if not self._has_started and not self._residency.has_room:
                break  # more live versions than places: the rest is loaded when asked for
            try:
                (await self._residency.acquire(version)).release()
            except SternaError as error:
                failure = failure or self._failed(version, str(error))
                if version is wanted.live:
                    if now is not None:  # without anything to stay with, requests hear why
                        routes = _staying(routes, now)
                elif version is wanted.canary:
                    routes = replace(routes, canary=None, canary_share=0.0)
                else:
                    routes = replace(routes, hold_back_share=0.0)
        return routes, failure

    def _failed(self, version: Version, reason: str) -> Failure:
        before = self.failures.get(version.ref.adapter)
        num_attempts = before.num_attempts + 1 if before is not None and before.version == version.ref else 1
        if num_attempts == 1:
            logger.error("%s cannot be loaded, the route stays as it was: %s", version.ref, reason)
        wait_seconds = min(2.0 ** min(num_attempts - 1, 10), MAX_RETRY_SECONDS)
        return Failure(version.ref, reason, num_attempts, self._clock() + wait_seconds)

    def _report(
        self, now: AdapterRoutes | None, routes: AdapterRoutes, failure: Failure | None, seconds: float
    ) -> None:
        before = now.live.ref if now is not None and now.live is not None else None
        after = routes.live.ref if routes.live is not None else None
        if failure is not None:
            self._on_swap("failed", seconds)
        elif before != after:
            self._on_swap("switched", seconds)

    def _assign_roles(self) -> None:
        """Keep what is routed now and what is about to be."""
        roles: dict[VersionRef, Role] = {}
        for routes in [*self.table.adapters.values(), *self._wanted.values()]:
            for version in (routes.previous, routes.shadow):
                if version is not None:
                    roles.setdefault(version.ref, Role.STANDBY)
            roles.update({version.ref: Role.SERVING for version in routes.serving()})
        self._residency.assign_roles(roles)


def _staying(wanted: AdapterRoutes, now: AdapterRoutes) -> AdapterRoutes:
    """Who answers stays as it was; canary and shadow are what they were made since."""
    is_there = now.previous is None or now.previous.ref.number in wanted.versions
    share = now.hold_back_share if is_there else 0.0
    return replace(wanted, live=now.live, previous=now.previous, hold_back_share=share)
