"""An engine for residency tests: loads and unloads end when the test says so; every rule is checked as it happens."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from server.adapters.version import Version, VersionRef
from server.errors import AdapterError
from tests.patience import PATIENCE_SECONDS


@dataclass(eq=False)
class Handle:
    """One load of one version."""

    version: Version
    is_loaded: bool = True
    num_users: int = 0


@dataclass
class FakeEngine:
    """Implements residency.Loader. `is_manual`: the test ends each load and unload; otherwise they end at once."""

    max_versions: int = 4
    max_bytes: int = 1000
    is_manual: bool = False
    broken: set[VersionRef] = field(default_factory=set)
    log: list[str] = field(default_factory=list)
    memory: list[Version] = field(default_factory=list)
    """Loading, loaded, or unloading."""
    loads: list[tuple[Version, "asyncio.Future[None]"]] = field(default_factory=list)
    unloads: list[tuple[Version, "asyncio.Future[None]"]] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    """Empty at the end of every test. (A failed load that nobody waits for is heard of nowhere.)"""

    async def load(self, version: Version) -> Handle:
        self.check(version.ref not in [one.ref for one in self.memory], f"{version.ref} is in memory twice")
        self.memory.append(version)
        self.check(len(self.memory) <= self.max_versions, "more versions than there are places")
        self.check(sum(one.memory_bytes for one in self.memory) <= self.max_bytes, "more bytes than allowed")
        self.log.append(f"load {version.ref}")
        try:
            if self.is_manual:
                future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                self.loads.append((version, future))
                await future
            if version.ref in self.broken:
                raise AdapterError(f"{version.ref} is broken")
        except BaseException:
            self.memory.remove(version)
            raise
        self.log.append(f"loaded {version.ref}")
        return Handle(version)

    def unload(self, handle: Handle) -> Awaitable[None]:
        self.check(handle.is_loaded, "unloaded twice")
        self.check(not handle.num_users, f"{handle.version.ref} was unloaded while in use")
        handle.is_loaded = False
        self.log.append(f"unload {handle.version.ref}")
        return self._unload(handle.version)

    async def _unload(self, version: Version) -> None:
        if self.is_manual:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self.unloads.append((version, future))
            await future
        self.memory.remove(version)
        self.log.append(f"unloaded {version.ref}")

    def check(self, holds: bool, violation: str) -> None:
        if not holds:
            self.violations.append(violation)

    def end(self, pending: list[tuple[Version, "asyncio.Future[None]"]], index: int, fails: bool = False) -> None:
        """Let the index-th (modulo) pending load or unload end."""
        if not pending:
            return
        version, future = pending.pop(index % len(pending))
        if not future.done():
            if fails:
                future.set_exception(AdapterError(f"{version.ref} failed"))
            else:
                future.set_result(None)


async def settle() -> None:
    """Let everything that can run now run: a task here never needs more turns than this to reach its next wait."""
    for _ in range(20):
        await asyncio.sleep(0)


async def until(condition: Callable[[], bool]) -> None:
    """Threads do part of the work, so there is nothing to await; the limit is for a bug, not a measurement."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            if condition():
                return
            await asyncio.sleep(0)
