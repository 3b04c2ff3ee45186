"""Residency: order of loading and unloading, sharing, budgets, roles, cancellation; then everything at random."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.adapters.residency import Lease, Residency
from server.adapters.room import Role
from server.adapters.version import Version, VersionRef
from server.errors import AdapterError, ServerUnavailableError
from tests.server.adapters.fake_engine import FakeEngine, Handle, settle
from tests.server.adapters.make import version

V = {number: version(number, memory_bytes=10) for number in range(1, 8)}
SERVING, STANDBY, NONE = Role.SERVING, Role.STANDBY, Role.NONE


def refs(*numbers: int) -> list[VersionRef]:
    return [V[number].ref for number in numbers]


def residency_of(engine: FakeEngine, **options: Any) -> Residency[Handle]:
    return Residency(engine, max_versions=engine.max_versions, max_bytes=engine.max_bytes, **options)


def scenario(**engine_options: Any) -> Callable[..., Callable[[], None]]:
    """Run the test's coroutine with a fresh engine and residency; close them after."""

    def decorate(test: Callable[[FakeEngine, Residency[Handle]], Coroutine[Any, Any, None]]) -> Callable[[], None]:
        def run() -> None:
            async def main() -> None:
                engine = FakeEngine(**engine_options)
                residency = residency_of(engine)
                await test(engine, residency)
                engine.is_manual = False
                for _, future in [*engine.loads, *engine.unloads]:
                    if not future.done():
                        future.set_result(None)
                await residency.close()
                assert engine.violations == []

            asyncio.run(main())

        run.__name__ = test.__name__
        run.__doc__ = test.__doc__
        return run

    return decorate


async def leased(residency: Residency[Handle], *versions: Version) -> list[Lease[Handle]]:
    return [await residency.acquire(one) for one in versions]


@scenario()
async def test_loaded_on_demand_and_kept(engine: FakeEngine, residency: Residency[Handle]) -> None:
    assert residency.try_acquire(V[1]) is None
    with await residency.acquire(V[1]) as lease:
        assert (lease.version, lease.handle.version) == (V[1], V[1])
    lease.release()  # again: nothing
    again = residency.try_acquire(V[1])
    assert again is not None
    assert again.handle is lease.handle
    again.release()
    assert engine.log == ["load tools@1", "loaded tools@1"]
    stats = residency.stats()
    assert (stats.num_held, stats.held_bytes, stats.num_leases, stats.num_loads) == (1, 10, 0, 1)


@scenario(is_manual=True)
async def test_who_waits_for_the_same_version_shares_one_load(engine: FakeEngine, residency: Residency[Handle]) -> None:
    tasks = [asyncio.create_task(residency.acquire(V[1])) for _ in range(5)]
    await settle()
    assert engine.log == ["load tools@1"]
    tasks[0].cancel()
    tasks[3].cancel()
    await settle()
    engine.end(engine.loads, 0)
    leases = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(lease) for lease in leases] == [asyncio.CancelledError, Lease, Lease, asyncio.CancelledError, Lease]
    assert residency.stats().num_leases == 3
    assert engine.log == ["load tools@1", "loaded tools@1"]


@scenario(is_manual=True)
async def test_a_load_goes_on_when_everybody_left(engine: FakeEngine, residency: Residency[Handle]) -> None:
    task = asyncio.create_task(residency.acquire(V[1]))
    await settle()
    task.cancel()
    await settle()
    engine.end(engine.loads, 0)
    await settle()
    assert residency.loaded() == [V[1]]
    assert residency.stats().num_leases == 0


@scenario(is_manual=True)
async def test_who_leaves_while_waiting_for_room_leaves_nothing(
    engine: FakeEngine, residency: Residency[Handle]
) -> None:
    engine.is_manual = False
    held = await leased(residency, V[1], V[2], V[3], V[4])
    task = asyncio.create_task(residency.acquire(V[5]))
    await settle()
    task.cancel()
    await settle()
    held[0].release()
    await settle()
    assert residency.stats().num_held == 4  # nothing was unloaded for a request that is gone
    assert (await residency.acquire(V[5])).version is V[5]


@scenario()
async def test_a_failed_load_says_why_and_can_be_tried_again(engine: FakeEngine, residency: Residency[Handle]) -> None:
    engine.broken.add(V[1].ref)
    for _ in range(2):
        with pytest.raises(AdapterError, match="tools@1 is broken"):
            await residency.acquire(V[1])
    assert (residency.stats().num_failed_loads, residency.stats().num_held) == (2, 0)
    engine.broken.clear()
    assert (await residency.acquire(V[1])).version is V[1]


@scenario(max_versions=3)
async def test_the_least_recently_used_idle_version_goes(engine: FakeEngine, residency: Residency[Handle]) -> None:
    one, two, three = await leased(residency, V[1], V[2], V[3])
    two.release()
    one.release()
    (await residency.acquire(V[2])).release()  # now 1 is the oldest
    (await residency.acquire(V[4])).release()
    assert engine.log[-4:] == ["unload tools@1", "unloaded tools@1", "load tools@4", "loaded tools@4"]
    (await residency.acquire(V[5])).release()  # 3 is in use, 2 goes
    assert "unload tools@2" in engine.log
    assert three.handle.is_loaded
    assert residency.stats().num_evictions == 2


@scenario(max_versions=2)
async def test_without_an_idle_version_a_request_waits(engine: FakeEngine, residency: Residency[Handle]) -> None:
    one, _ = await leased(residency, V[1], V[2])
    waiting = [asyncio.create_task(residency.acquire(V[number])) for number in (3, 4)]
    await settle()
    assert not any(task.done() for task in waiting)
    one.release()
    lease = await waiting[0]  # the oldest first
    assert not waiting[1].done()
    lease.release()
    assert (await waiting[1]).version is V[4]


@scenario(max_versions=10, max_bytes=100)
async def test_bytes_are_a_budget_too(engine: FakeEngine, residency: Residency[Handle]) -> None:
    for number in (1, 2, 3):
        (await residency.acquire(version(number, memory_bytes=30))).release()
    (await residency.acquire(version(4, memory_bytes=65))).release()
    assert engine.log.count("unload tools@1") == engine.log.count("unload tools@2") == 1
    assert residency.stats().held_bytes == 95
    with pytest.raises(AdapterError, match=r"tools@5 takes 101 bytes in memory; adapters may take 100 bytes and 10"):
        await residency.acquire(version(5, memory_bytes=101))


@scenario(max_versions=2)
async def test_roles_are_kept_from_weaker_ones(engine: FakeEngine, residency: Residency[Handle]) -> None:
    residency.assign_roles({V[1].ref: SERVING, V[2].ref: STANDBY})
    for lease in await leased(residency, V[1], V[2]):
        lease.release()
    with pytest.raises(ServerUnavailableError, match=r"tools@3 has no room: .*2 of 2 places, 20 of 1000 bytes"):
        await residency.acquire(V[3])
    residency.assign_roles({V[1].ref: SERVING, V[2].ref: STANDBY, V[4].ref: SERVING})
    (await residency.acquire(V[4])).release()  # the standby gives way
    assert {one.ref for one in residency.loaded()} == {V[1].ref, V[4].ref}
    residency.assign_roles({V[1].ref: SERVING, V[4].ref: SERVING, V[5].ref: SERVING})
    (await residency.acquire(V[5])).release()  # more live versions than places: they take turns
    assert {one.ref for one in residency.loaded()} == {V[4].ref, V[5].ref}


@scenario(max_versions=2)
async def test_a_stronger_role_overtakes(engine: FakeEngine, residency: Residency[Handle]) -> None:
    one, _ = await leased(residency, V[1], V[2])
    weak = asyncio.create_task(residency.acquire(V[3]))
    await settle()
    residency.assign_roles({V[4].ref: SERVING})
    strong = asyncio.create_task(residency.acquire(V[4]))
    await settle()
    one.release()
    assert (await strong).version is V[4]
    assert not weak.done()
    weak.cancel()


@scenario()
async def test_a_lost_role_means_leaving_after_the_last_request(
    engine: FakeEngine, residency: Residency[Handle]
) -> None:
    residency.assign_roles({V[1].ref: SERVING, V[2].ref: SERVING})
    first, second, idle = await leased(residency, V[1], V[1], V[2])
    idle.release()
    residency.assign_roles({V[3].ref: SERVING})
    await settle()
    assert engine.log[-1] == "unloaded tools@2"
    first.release()
    third = residency.try_acquire(V[1])  # pinned by its number: still served
    assert third is not None
    second.release()
    await settle()
    assert "unload tools@1" not in engine.log
    third.release()
    await settle()
    assert engine.log[-2:] == ["unload tools@1", "unloaded tools@1"]
    (await residency.acquire(V[1])).release()  # back as one without a role: it stays until room is short
    await settle()
    assert residency.loaded() == [V[1]]


@scenario()
async def test_a_role_that_comes_back_keeps_it(engine: FakeEngine, residency: Residency[Handle]) -> None:
    residency.assign_roles({V[1].ref: SERVING})
    lease = await residency.acquire(V[1])
    residency.assign_roles({})
    residency.assign_roles({V[1].ref: STANDBY})
    lease.release()
    await settle()
    assert residency.loaded() == [V[1]]


@scenario()
async def test_discarded_versions_go(engine: FakeEngine, residency: Residency[Handle]) -> None:
    one, two = await leased(residency, V[1], V[2])
    two.release()
    residency.discard(refs(1, 2, 3))
    await settle()
    assert residency.loaded() == [V[1]]
    one.release()
    await settle()
    assert residency.loaded() == []


@scenario(is_manual=True)
async def test_wanted_again_while_it_is_unloaded(engine: FakeEngine, residency: Residency[Handle]) -> None:
    engine.is_manual = False
    (await residency.acquire(V[1])).release()
    engine.is_manual = True
    residency.discard(refs(1))
    task = asyncio.create_task(residency.acquire(V[1]))
    await settle()
    assert engine.log[-1] == "unload tools@1"
    engine.end(engine.unloads, 0)
    await settle()
    engine.end(engine.loads, 0)
    lease = await task
    assert engine.log[-4:] == ["unload tools@1", "unloaded tools@1", "load tools@1", "loaded tools@1"]
    assert lease.handle.is_loaded


@scenario(max_versions=1, is_manual=True)
async def test_a_loaded_version_is_not_evicted_before_its_waiter_has_it(
    engine: FakeEngine, residency: Residency[Handle]
) -> None:
    tasks = [asyncio.create_task(residency.acquire(V[number])) for number in (1, 2)]
    await settle()
    engine.end(engine.loads, 0)
    lease = await tasks[0]
    await settle()
    assert engine.log == ["load tools@1", "loaded tools@1"]
    lease.release()
    await settle()
    engine.end(engine.unloads, 0)
    await settle()
    engine.end(engine.loads, 0)
    assert (await tasks[1]).version is V[2]


def test_warm_up_comes_before_the_first_request() -> None:
    async def main() -> None:
        engine = FakeEngine()
        fails = True

        async def warm_up(one: Version, handle: Handle) -> None:
            engine.log.append(f"warm {one.ref}")
            await asyncio.sleep(0)
            assert residency.try_acquire(one) is None
            if fails:
                raise AdapterError("cold")

        residency = residency_of(engine, warm_up=warm_up)
        with pytest.raises(AdapterError, match="cold"):
            await residency.acquire(V[1])
        assert engine.memory == []
        fails = False
        await residency.acquire(V[1])
        assert engine.log[-3:] == ["load tools@1", "loaded tools@1", "warm tools@1"]

    asyncio.run(main())


def test_waiting_has_an_end() -> None:
    async def main() -> None:
        engine = FakeEngine(max_versions=1)
        residency = residency_of(engine, max_wait_seconds=0.0)
        residency._max_wait_seconds = 30.0
        lease = await residency.acquire(V[1])
        residency._max_wait_seconds = 0.0
        with pytest.raises(ServerUnavailableError, match=r"tools@2 could not be loaded within 0 s .*1 of 1 places"):
            await residency.acquire(V[2])
        lease.release()
        await settle()
        assert residency.loaded() == [V[1]]  # the request that gave up left no claim behind

    asyncio.run(main())


def test_closing() -> None:
    async def main() -> None:
        engine = FakeEngine(max_versions=1, is_manual=True)
        residency = residency_of(engine)
        tasks = [asyncio.create_task(residency.acquire(V[number])) for number in (1, 2)]
        await settle()
        closing = asyncio.create_task(residency.close())
        await settle()
        assert not closing.done()
        engine.end(engine.loads, 0)
        await closing
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(results[0], Lease)
        assert isinstance(results[1], ServerUnavailableError)
        with pytest.raises(ServerUnavailableError, match="shutting down"):
            await residency.acquire(V[3])

    asyncio.run(main())


# -- everything at random ---------------------------------------------------------------------------------------------

NUM_VERSIONS = 6
Step = tuple[str, int, int]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            [
                *("request", "request", "request", "finish", "finish", "cancel", "promote", "rollback", "roles"),
                *("discard", "loaded", "loaded", "loaded", "fail", "unloaded", "unloaded", "settle", "settle"),
            ]
        ),
        st.integers(0, 30),
        st.integers(0, 30),
    ),
    min_size=40,  # Hypothesis likes short lists, in which nothing fills up
    max_size=80,
)


class World:
    """Requests on random versions while loads, unloads, roles and cancellations come in any order."""

    def __init__(self, max_versions: int, max_bytes: int) -> None:
        self.engine = FakeEngine(max_versions, max_bytes, is_manual=True)
        self.residency = residency_of(self.engine, max_wait_seconds=3600)
        self.versions = [version(number, memory_bytes=10 * (1 + number % 3)) for number in range(1, NUM_VERSIONS + 1)]
        self.requests: list[tuple[asyncio.Task[str], asyncio.Event]] = []
        self.live: list[int] = [0]

    async def serve(self, wanted: Version, end: asyncio.Event) -> str:
        try:
            with await self.residency.acquire(wanted) as lease:
                handle = lease.handle
                assert handle.version == wanted
                assert handle.is_loaded
                handle.num_users += 1
                try:
                    await end.wait()
                finally:
                    assert handle.is_loaded, "unloaded while in use"
                    handle.num_users -= 1
            return "answered"
        except (AdapterError, ServerUnavailableError) as error:
            return str(error)

    def take(self, step: Step) -> None:
        name, a, b = step
        open_requests = [one for one in self.requests if not one[0].done()]
        chosen = self.versions[a % NUM_VERSIONS]
        if name == "request":
            end = asyncio.Event()
            self.requests.append((asyncio.create_task(self.serve(chosen, end)), end))
        elif name in ("finish", "cancel") and open_requests:
            task, end = open_requests[a % len(open_requests)]
            end.set() if name == "finish" else task.cancel()
        elif name == "promote":
            self.live.append(a % NUM_VERSIONS)
            self.assign()
        elif name == "rollback" and len(self.live) > 1:
            self.live.pop()
            self.assign()
        elif name == "roles":
            self.residency.assign_roles({chosen.ref: Role.SERVING, self.versions[b % NUM_VERSIONS].ref: Role.STANDBY})
        elif name == "discard":
            self.residency.discard([chosen.ref])
        elif name in ("loaded", "fail"):
            self.engine.end(self.engine.loads, a, fails=name == "fail")
        elif name == "unloaded":
            self.engine.end(self.engine.unloads, a)

    def assign(self) -> None:
        kept = [self.versions[index].ref for index in self.live[-2:]]
        self.residency.assign_roles({kept[0]: Role.STANDBY} | {kept[-1]: Role.SERVING})

    async def finish(self) -> None:
        """Everything ends by itself once loads and unloads do: nothing waits for ever."""
        for _, end in self.requests:
            end.set()
        for _ in range(20 * (len(self.requests) + NUM_VERSIONS)):
            await settle()
            if all(task.done() for task, _ in self.requests):
                break
            self.engine.end(self.engine.loads, 0)
            self.engine.end(self.engine.unloads, 0)
        else:
            raise AssertionError(f"deadlock: {self.engine.log[-10:]}")
        for task, _ in self.requests:
            assert task.cancelled() or isinstance(task.result(), str)
        self.engine.is_manual = False
        for pending in (self.engine.loads, self.engine.unloads):
            while pending:
                self.engine.end(pending, 0)
        await self.residency.close()
        assert self.engine.violations == []
        stats = self.residency.stats()
        assert stats.num_leases == 0
        assert stats.num_held == len(self.residency.loaded()) == len(self.engine.memory)


def check_world(steps: list[Step], max_versions: int, max_bytes: int) -> None:
    async def main() -> None:
        world = World(max_versions, max_bytes)
        for step in steps:
            world.take(step)
            if step[0] == "settle":
                await settle()
            elif step[2] % 3 == 0:
                await asyncio.sleep(0)
        await world.finish()

    asyncio.run(main())


@settings(max_examples=200, deadline=None)
@given(STEPS, st.integers(1, 4), st.integers(30, 90))
def test_anything_in_any_order(steps: list[Step], max_versions: int, max_bytes: int) -> None:
    check_world(steps, max_versions, max_bytes)


@pytest.mark.slow
@settings(max_examples=1500, deadline=None)
@given(STEPS, st.integers(1, 4), st.integers(30, 90))
def test_anything_in_any_order_for_longer(steps: list[Step], max_versions: int, max_bytes: int) -> None:
    check_world(steps, max_versions, max_bytes)
