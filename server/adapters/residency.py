"""Which adapter versions are in the engine: loads on demand, keeps to a budget, unloads what nobody uses.

A request holds a lease on its version from before its first token to after its last, and a version under lease is
never unloaded. A load is a task of its own: all who wait for it share it, and it goes on when one of them leaves.

Everything runs on one event loop; `try_acquire` is the request path of a loaded version and never waits. Not here:
which version a request gets (router.py), who must go for whom (room.py), files and the engine (engine_loader.py).
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from server.adapters.room import Phase, Place, Role, Room
from server.adapters.version import Version, VersionRef
from server.errors import ServerUnavailableError, SternaError

logger = logging.getLogger(__name__)

Handle = TypeVar("Handle")


class Loader(Protocol[Handle]):
    """What moves versions in and out of the engine."""

    async def load(self, version: Version) -> Handle:
        """Put it beside the others. Raises a SternaError that says why not."""

    def unload(self, handle: Handle) -> Awaitable[None]:
        """Done once its last sequence has ended and its memory is free."""


@dataclass(eq=False)
class _Entry(Place, Generic[Handle]):
    handle: Handle | None = None
    task: "asyncio.Task[None] | None" = None
    """The load, then the unload."""
    is_leaving: bool = False
    """Lost its role, or was deleted: goes as soon as nobody uses it."""


class Lease(Generic[Handle]):
    """One request's hold on a loaded version, for a `with` statement; releasing it again does nothing."""

    def __init__(self, version: Version, handle: Handle, release: Callable[[], None]) -> None:
        self.version = version
        self.handle = handle
        self._release: Callable[[], None] | None = release

    def release(self) -> None:
        release, self._release = self._release, None
        if release is not None:
            release()

    def __enter__(self) -> "Lease[Handle]":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


@dataclass(frozen=True, slots=True)
class ResidencyStats:
    """One moment. Held: loading, loaded or not yet unloaded."""

    num_held: int
    held_bytes: int
    num_leases: int
    num_loads: int
    num_failed_loads: int
    num_evictions: int


class Residency(Generic[Handle]):
    """`warm_up` is called once for a loaded version, before anybody can have it.

    `max_wait_seconds`: how long a request waits for a version that is not loaded, which is for room if it is long.
    """

    def __init__(
        self,
        loader: Loader[Handle],
        *,
        max_versions: int,
        max_bytes: int,
        warm_up: Callable[[Version, Handle], Awaitable[None]] | None = None,
        max_wait_seconds: float = 30.0,
    ) -> None:
        self._loader = loader
        self._warm_up = warm_up
        self._max_wait_seconds = max_wait_seconds
        self._entries: dict[VersionRef, _Entry[Handle]] = {}
        self._roles: Mapping[VersionRef, Role] = {}
        self._room = Room(max_versions, max_bytes, self._places, self._evict)
        self._clock = 0
        self._num_loads = 0
        self._num_failed_loads = 0
        self._is_closed = False

    # -- for requests -------------------------------------------------------------------------------------------------

    def try_acquire(self, version: Version) -> Lease[Handle] | None:
        """A lease at once, or None when the version is not loaded."""
        entry = self._entries.get(version.ref)
        if entry is None or entry.phase is not Phase.READY:
            return None
        entry.num_leases += 1
        self._touch(entry)
        assert entry.handle is not None
        return Lease(entry.version, entry.handle, lambda: self._release(entry))

    async def acquire(self, version: Version) -> Lease[Handle]:
        """A lease, after loading the version if need be.

        Raises AdapterError when it cannot be loaded, ServerUnavailableError when there is no room for it.
        """
        lease = self.try_acquire(version)
        if lease is not None:
            return lease
        try:
            async with asyncio.timeout(self._max_wait_seconds) as deadline:
                return await self._acquire_cold(version)
        except TimeoutError:
            if not deadline.expired():
                raise
            raise ServerUnavailableError(
                f"{version.ref} could not be loaded within {self._max_wait_seconds:g} s (adapters hold {self._room})"
            ) from None

    async def _acquire_cold(self, version: Version) -> Lease[Handle]:
        while True:
            if self._is_closed:
                raise ServerUnavailableError("the server is shutting down")
            entry = self._entries.get(version.ref) or self._begin_load(version)
            task, is_unloading = entry.task, entry.phase is Phase.UNLOADING
            assert task is not None
            entry.num_waiters += 1
            try:
                await asyncio.wait((task,))  # unlike `await task`, this leaves it running when we are cancelled
            except asyncio.CancelledError:
                entry.num_waiters -= 1
                self._forsaken(entry)
                raise
            entry.num_waiters -= 1
            if not is_unloading and not task.cancelled():
                task.result()  # raises what the load raised
            lease = self.try_acquire(version)
            if lease is not None:
                return lease

    def _release(self, entry: _Entry[Handle]) -> None:
        assert entry.num_leases > 0
        entry.num_leases -= 1
        self._touch(entry)
        self._leave(entry)
        self._room.grant()

    def _forsaken(self, entry: _Entry[Handle]) -> None:
        """A request left before it had the version."""
        if entry.num_waiters:
            return
        if entry.phase is Phase.WAITING and entry.task is not None:
            entry.task.cancel()
        self._leave(entry)
        self._room.grant()

    # -- for whoever decides about roles ------------------------------------------------------------------------------

    def assign_roles(self, roles: Mapping[VersionRef, Role]) -> None:
        """These are kept from now on; what had a role and has none any more goes when its last request ends."""
        before, self._roles = self._roles, dict(roles)
        for entry in list(self._entries.values()):
            ref = entry.version.ref
            entry.role = roles.get(ref, Role.NONE)
            if entry.role:
                entry.is_leaving = False
            elif before.get(ref):
                entry.is_leaving = True
                self._leave(entry)
        self._room.grant()

    def discard(self, refs: Iterable[VersionRef]) -> None:
        """Versions that were deleted go when their last request ends."""
        for ref in refs:
            entry = self._entries.get(ref)
            if entry is not None:
                entry.is_leaving = True
                self._leave(entry)

    @property
    def has_room(self) -> bool:
        """One more (of no size) would fit without unloading any."""
        return self._room.has_room

    def loaded(self) -> list[Version]:
        """What can answer at once."""
        return [entry.version for entry in self._entries.values() if entry.phase is Phase.READY]

    def stats(self) -> ResidencyStats:
        held = self._room.held()
        return ResidencyStats(
            num_held=len(held),
            held_bytes=sum(place.size for place in held),
            num_leases=sum(place.num_leases for place in held),
            num_loads=self._num_loads,
            num_failed_loads=self._num_failed_loads,
            num_evictions=self._room.num_evictions,
        )

    async def close(self) -> None:
        """Load nothing any more; returns when no load or unload is under way. The engine stops after this."""
        self._is_closed = True
        for entry in self._entries.values():
            if entry.phase is Phase.WAITING and entry.task is not None:
                entry.task.cancel()
        while tasks := [one.task for one in self._entries.values() if one.task and one.phase is not Phase.READY]:
            await asyncio.wait(tasks)

    # -- loading and unloading ----------------------------------------------------------------------------------------

    def _begin_load(self, version: Version) -> _Entry[Handle]:
        entry: _Entry[Handle] = _Entry(version, self._roles.get(version.ref, Role.NONE))
        self._entries[version.ref] = entry
        entry.task = asyncio.create_task(self._load(entry), name=f"load {version.ref}")
        entry.task.add_done_callback(lambda task: self._after_load(entry, task))
        return entry

    async def _load(self, entry: _Entry[Handle]) -> None:
        await self._room.claim(entry)
        handle = await self._loader.load(entry.version)
        if self._warm_up is not None:
            try:
                await self._warm_up(entry.version, handle)
            except BaseException:
                await self._loader.unload(handle)
                raise
        entry.handle = handle
        entry.phase = Phase.READY
        self._touch(entry)

    def _after_load(self, entry: _Entry[Handle], task: "asyncio.Task[None]") -> None:
        """Runs before any waiter hears of it: it was added first."""
        if task.cancelled() or task.exception() is not None:
            self._num_failed_loads += not task.cancelled()
            del self._entries[entry.version.ref]
        else:
            self._num_loads += 1
            self._leave(entry)
        self._room.grant()

    def _leave(self, entry: _Entry[Handle]) -> None:
        if entry.is_leaving and entry.is_idle:
            self._begin_unload(entry)

    def _evict(self, place: Place) -> None:
        self._begin_unload(self._entries[place.version.ref])

    def _begin_unload(self, entry: _Entry[Handle]) -> None:
        assert entry.is_idle
        entry.phase = Phase.UNLOADING
        entry.task = asyncio.create_task(self._unload(entry), name=f"unload {entry.version.ref}")

    async def _unload(self, entry: _Entry[Handle]) -> None:
        assert entry.handle is not None
        try:
            await self._loader.unload(entry.handle)
        except SternaError as error:
            # Only an engine that has stopped refuses, and it has freed everything.
            logger.warning("unloading %s: %s", entry.version.ref, error)
        finally:
            del self._entries[entry.version.ref]
            self._room.grant()

    def _places(self) -> Iterator[Place]:
        return iter(self._entries.values())

    def _touch(self, entry: _Entry[Handle]) -> None:
        self._clock += 1
        entry.last_used = self._clock
