"""The one object of this room that a server holds: who answers a request, and the versions kept loaded for it.

In the order of a server's life:

    service = AdapterService(registry, residency, base_names={"base"}, on_swap=metrics.count_swap)
    await service.start()                                       # live versions are loaded when this returns
    async with service.route(request.model, episode_id=..., request_id=...) as routed:
        engine.submit(..., adapter=routed.handle)               # None: the base; also routed.headers, .fingerprint
    await service.change(partial(registry.promote, ref, ...))   # an act of the admin API: followed when this returns
    await service.stop()                                        # then the engine

Without its database a server goes on with the routes that it has.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

from server.adapters.follower import Failure, Follower, Outcome
from server.adapters.registry import Registry
from server.adapters.residency import Handle, Lease, Residency
from server.adapters.router import AdapterRoutes, Route
from server.adapters.version import Version
from server.errors import AdapterError, ServerUnavailableError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

POLL_SECONDS = 0.5
"""A promotion made elsewhere is to be seen within a second. One look costs well under a millisecond on a thread."""
HOUSEKEEPING_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class Routed(Generic[Handle]):
    """Who answers one request, for as long as the request lasts."""

    route: Route
    handle: Handle | None
    """What the engine knows the version as; None: the base."""

    @property
    def headers(self) -> dict[str, str]:
        """For the response, so that each answer names its version."""
        version = self.route.version
        if version is None:
            return {}
        return {"X-Sterna-Adapter-Version": str(version.ref), "X-Sterna-Adapter-Digest": version.digest}

    @property
    def fingerprint(self) -> str:
        """To be appended to the base's `system_fingerprint`."""
        digest = self.route.digest
        return "" if digest is None else "-" + digest.removeprefix("sha256:")[:16]


@dataclass(frozen=True, slots=True)
class ServiceStats:
    """One moment, for /metrics."""

    change: int
    """The registry's last change that was seen."""
    num_requests: dict[str, int]
    """By version (`tools@7`), since the start."""
    num_poll_errors: int
    failures: tuple[Failure, ...]


class AdapterService(Generic[Handle]):
    """One server's view of the registry. Used on its event loop only."""

    def __init__(
        self,
        registry: Registry,
        residency: Residency[Handle],
        *,
        base_names: Iterable[str],
        poll_seconds: float = POLL_SECONDS,
        on_swap: Callable[[Outcome, float], None] = lambda outcome, seconds: None,
        housekeeping: Callable[[], object] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`housekeeping` (the store's `collect_garbage`) runs on a thread after the start and every hour."""
        self._residency = residency
        self._poll_seconds = poll_seconds
        self._housekeeping = housekeeping
        self._follower = Follower(registry, residency, base_names=base_names, on_swap=on_swap, clock=clock)
        self._num_requests: Counter[str] = Counter()
        self._num_poll_errors = 0
        self._is_reachable = True
        self._tasks: list[asyncio.Task[None]] = []

    # -- life ---------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Raises DatabaseUnavailableError. A version that cannot be loaded is no reason not to start."""
        await self._follower.start()
        for loop in (self._keep_following(), self._keep_house()):
            self._tasks.append(asyncio.create_task(loop))

    async def stop(self) -> None:
        """Follow no more and load nothing more. The engine stops after this."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._follower.stop()
        await self._residency.close()

    # -- requests -----------------------------------------------------------------------------------------------------

    def resolve(self, model_name: str, *, episode_id: str | None, request_id: str) -> Route:
        """Who answers. Raises ModelNotFoundError."""
        return self._follower.table.resolve(model_name, episode_id, request_id)

    @asynccontextmanager
    async def route(self, model_name: str, *, episode_id: str | None, request_id: str) -> AsyncIterator[Routed[Handle]]:
        """Hold the version that answers, until the answer is complete.

        Raises ModelNotFoundError, and ServerUnavailableError when the version cannot be loaded.
        """
        route = self.resolve(model_name, episode_id=episode_id, request_id=request_id)
        if route.version is None:
            yield Routed(route, None)
            return
        with await self.acquire(route.version) as lease:
            self._num_requests[str(route.version.ref)] += 1
            yield Routed(route, lease.handle)

    async def acquire(self, version: Version) -> Lease[Handle]:
        """Hold one version outside of any route: for a shadow's run, or the gate's. Raises ServerUnavailableError."""
        lease = self._residency.try_acquire(version)
        if lease is not None:
            return lease
        try:
            return await self._residency.acquire(version)
        except AdapterError as error:  # whoever asks is not to blame
            raise ServerUnavailableError(f"{version.ref} cannot be served: {error}") from error

    # -- changes ------------------------------------------------------------------------------------------------------

    async def change(self, act: Callable[[], Result]) -> Result:
        """Run an act of the registry or the store on a thread; routes have followed when this returns."""
        before = self._follower.running()
        result = await asyncio.to_thread(act)
        with suppress(ServerUnavailableError):  # done is done; the next look follows it
            await self.refresh(before)
        return result

    async def refresh(self, before: frozenset[asyncio.Task[None]] | None = None) -> None:
        """Follow now, and wait until that is done or has failed. Raises DatabaseUnavailableError.

        With `before`, also for what was begun since: the look of every few seconds may have seen the same change.
        """
        tasks = set(await self._follower.look())
        if before is not None:
            tasks |= self._follower.running() - before
        if tasks:
            await asyncio.wait(tasks)  # which goes on without us if we are cancelled

    # -- observation --------------------------------------------------------------------------------------------------

    def known_versions(self) -> list[Version]:
        """All that a request can reach: the bound of any label."""
        return [one for routes in self._follower.table.adapters.values() for one in routes.versions.values()]

    def adapters(self) -> list[AdapterRoutes]:
        """By name, as they are routed now."""
        return [routes for _, routes in sorted(self._follower.table.adapters.items())]

    def stats(self) -> ServiceStats:
        failures = tuple(self._follower.failures.values())
        return ServiceStats(self._follower.change, dict(self._num_requests), self._num_poll_errors, failures)

    # -- top loops: whatever happens, the next turn comes -------------------------------------------------------------

    async def _keep_following(self) -> None:
        while True:
            await asyncio.sleep(self._poll_seconds)
            try:
                await self._follower.look()
                self._is_reachable = True
            except ServerUnavailableError as error:
                self._num_poll_errors += 1
                if self._is_reachable:  # once, not twice a second
                    logger.warning("the adapter registry cannot be followed, routes stay as they are: %s", error)
                self._is_reachable = False
            except Exception:
                self._num_poll_errors += 1
                logger.exception("following the adapter registry failed")

    async def _keep_house(self) -> None:
        while True:
            try:
                await asyncio.to_thread(self._housekeeping)
            except Exception:
                logger.exception("removing what belongs to no adapter version failed")
            await asyncio.sleep(HOUSEKEEPING_SECONDS)
