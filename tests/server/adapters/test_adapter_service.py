"""The service over a real registry and a scripted engine: following, failures, restarts, two servers, no database."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
from sqlalchemy import text

from server.adapters.registry import Registry
from server.adapters.residency import Residency
from server.adapters.router import Arm
from server.adapters.service import AdapterService, Routed
from server.adapters.states import State
from server.adapters.version import VersionRef
from server.errors import ModelNotFoundError, ServerUnavailableError
from server.storage.database import Database
from server.storage.errors import DatabaseUnavailableError
from tests.server.adapters.fake_engine import FakeEngine, Handle, settle, until
from tests.server.adapters.make import WHO, add, put_live

V1, V2, V3 = (VersionRef("tools", number) for number in (1, 2, 3))


class Clock:
    """Monotonic seconds that the test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def serving(
    registry: Registry, engine: FakeEngine | None = None, **options: Any
) -> AsyncIterator[AdapterService[Handle]]:
    """A started service that looks at the registry only when told to, unless `poll_seconds` says otherwise."""
    engine = engine or FakeEngine(max_bytes=10**6)
    residency = Residency(engine, max_versions=engine.max_versions, max_bytes=engine.max_bytes, max_wait_seconds=3600)
    service = AdapterService(registry, residency, **({"base_names": ["base"], "poll_seconds": 3600} | options))
    await service.start()
    try:
        yield service
    finally:
        await service.stop()
        assert engine.violations == []


@pytest.fixture
def registry(sqlite_database: Database) -> Registry:
    return Registry(sqlite_database)


def three(registry: Registry, name: str = "tools") -> None:
    for content in "123":
        add(registry, name, content)


def ask(service: AdapterService[Handle], model: str = "tools", episode: str = "e") -> Any:
    return service.route(model, episode_id=episode, request_id="r")


async def answer(service: AdapterService[Handle], model: str = "tools", episode: str = "e") -> str:
    """Who answered one request, by what the engine was given."""
    async with ask(service, model, episode) as routed:
        named = "base" if routed.route.version is None else str(routed.route.version.ref)
        given = "base" if routed.handle is None else str(routed.handle.version.ref)
        assert named == given
        assert routed.handle is None or routed.handle.is_loaded
        return given


def test_names_lead_to_versions(registry: Registry) -> None:
    three(registry)

    async def main() -> None:
        async with serving(registry) as service:
            assert [await answer(service, name) for name in ("base", "tools", "tools@2")] == ["base", "base", "tools@2"]
            await service.change(partial(put_live, registry, V1))
            assert await answer(service) == "tools@1"
            with pytest.raises(ModelNotFoundError):
                await answer(service, "tools@4")
            async with ask(service) as routed:
                version = routed.route.version
                assert routed.headers == {
                    "X-Sterna-Adapter-Version": "tools@1", "X-Sterna-Adapter-Digest": version.digest,
                }  # fmt: skip
                assert routed.fingerprint == f"-{version.digest[7:23]}"
            async with ask(service, "base") as routed:
                assert (routed.headers, routed.fingerprint) == ({}, "")
            assert service.stats().num_requests == {"tools@1": 2, "tools@2": 1}
            assert {str(one.ref) for one in service.known_versions()} == {"tools@1", "tools@2", "tools@3"}
            assert [routes.name for routes in service.adapters()] == ["tools"]

    asyncio.run(main())


def test_a_promotion_loads_beside_and_disturbs_nobody(registry: Registry) -> None:
    three(registry)
    put_live(registry, V1)
    engine = FakeEngine(max_bytes=10**6)
    swaps: list[str] = []

    async def main() -> None:
        async with serving(registry, engine, on_swap=lambda outcome, seconds: swaps.append(outcome)) as service:
            async with ask(service) as running:
                engine.is_manual = True
                promotion = asyncio.create_task(service.change(partial(put_live, registry, V2)))
                await until(lambda: bool(engine.loads))
                assert await answer(service) == "tools@1"  # nobody waits for the load
                assert swaps == []
                engine.end(engine.loads, 0)
                await promotion
                assert await answer(service) == "tools@2"
                assert running.handle.version.ref == V1  # it ends on what it began with
                assert running.handle.is_loaded
                engine.is_manual = False
                await service.change(partial(put_live, registry, V3))
                await settle()
                assert running.handle.is_loaded  # two promotions on: no role any more, but in use
            await settle()
            assert engine.log[-2:] == ["unload tools@1", "unloaded tools@1"]
            await service.change(partial(registry.rollback, "tools", **WHO))
            assert engine.log[-1] == "unloaded tools@3"  # its predecessor was still there
            assert await answer(service) == "tools@2"
            assert swaps == ["switched"] * 3

    asyncio.run(main())


def test_a_failed_load_keeps_the_old_route_and_is_tried_again(registry: Registry) -> None:
    three(registry)
    put_live(registry, V1)
    engine, clock, swaps = FakeEngine(max_bytes=10**6, broken={V2}), Clock(), []

    async def main() -> None:
        options: dict[str, Any] = {"clock": clock, "on_swap": lambda outcome, seconds: swaps.append(outcome)}
        async with serving(registry, engine, **options) as service:
            await service.change(partial(put_live, registry, V2))
            assert await answer(service) == "tools@1"
            [failure] = service.stats().failures
            assert (failure.version, failure.reason, failure.num_attempts) == (V2, "tools@2 is broken", 1)
            with pytest.raises(ServerUnavailableError, match=r"tools@2 cannot be served: tools@2 is broken"):
                await answer(service, "tools@2")
            waits = []
            for attempt in range(2, 10):
                retry_at = service.stats().failures[0].retry_at
                waits.append(retry_at - clock.now)
                await service.refresh()
                assert service.stats().failures[0].num_attempts == attempt - 1  # not yet
                clock.now = retry_at
                await service.refresh()
                assert service.stats().failures[0].num_attempts == attempt
            assert waits == [1, 2, 4, 8, 16, 32, 60, 60]
            engine.broken.clear()
            clock.now += 60
            await service.refresh()
            assert await answer(service) == "tools@2"
            assert service.stats().failures == ()
            assert swaps == ["failed"] * 9 + ["switched"]

    asyncio.run(main())


def test_a_failed_live_version_can_be_rolled_back(registry: Registry) -> None:
    three(registry)
    put_live(registry, V1)

    async def main() -> None:
        async with serving(registry, FakeEngine(max_bytes=10**6, broken={V2})) as service:
            await service.change(partial(put_live, registry, V2))
            await service.change(partial(registry.rollback, "tools", **WHO))
            assert service.stats().failures == ()
            assert await answer(service) == "tools@1"

    asyncio.run(main())


def test_while_the_new_live_version_cannot_be_loaded_canary_and_shadow_are_followed(registry: Registry) -> None:
    three(registry)
    put_live(registry, V1)
    v4 = add(registry, "tools", "4")

    async def main() -> None:
        async with serving(registry, FakeEngine(max_bytes=10**6, broken={V2})) as service:

            def routed() -> tuple[str | None, ...]:
                route = service.resolve("tools", episode_id="e", request_id="r")
                return tuple(None if one is None else str(one.ref) for one in (route.version, route.shadow))

            await service.change(partial(registry.start_canary, V3, share=1.0, **WHO))
            await service.change(partial(put_live, registry, V2))
            assert routed() == ("tools@3", None)
            await service.change(partial(registry.set_share, "tools", State.CANARY, 0.0, **WHO))
            await service.change(partial(registry.start_shadow, v4, **WHO))
            assert routed() == ("tools@1", "tools@4")
            await service.change(partial(registry.set_share, "tools", State.CANARY, 1.0, **WHO))
            assert await answer(service) == "tools@3"
            await service.change(partial(registry.reject, V3, **WHO))
            await service.change(partial(registry.mark_deleted, V3, **WHO))
            assert await answer(service) == "tools@1"
            await service.change(partial(registry.start_canary, v4, share=1.0, **WHO))
            assert (routed(), service.stats().failures[0].version) == (("tools@4", None), V2)

    asyncio.run(main())


def test_a_canary_that_cannot_be_loaded_takes_no_share(registry: Registry) -> None:
    three(registry)
    put_live(registry, V1)

    async def main() -> None:
        engine = FakeEngine(max_bytes=10**6, broken={V2})
        async with serving(registry, engine) as service:
            await service.change(partial(registry.start_canary, V2, share=1.0, **WHO))
            assert await answer(service) == "tools@1"
            assert service.stats().failures[0].version == V2
            engine.broken.clear()
            await service.change(partial(registry.set_share, "tools", State.CANARY, 0.999, **WHO))
            assert [await answer(service, episode=str(number)) for number in range(5)] == ["tools@2"] * 5
            assert service.resolve("tools", episode_id="1", request_id="r").arm is Arm.CANARY
            await service.change(partial(registry.promote, V2, hold_back_share=1.0, **WHO))
            assert await answer(service) == "tools@1"  # all held back
            assert service.resolve("tools", episode_id="1", request_id="r").arm is Arm.HOLD_BACK

    asyncio.run(main())


def test_a_shadow_is_named_and_can_be_held(registry: Registry) -> None:
    three(registry)
    put_live(registry, V1)

    async def main() -> None:
        async with serving(registry) as service:
            await service.change(partial(registry.start_shadow, V2, **WHO))
            async with ask(service) as routed:
                assert routed.handle.version.ref == V1
                with await service.acquire(routed.route.shadow) as lease:
                    assert lease.handle.version.ref == V2

    asyncio.run(main())


def test_a_restart_serves_the_same(registry: Registry) -> None:
    three(registry)
    three(registry, "other")
    for number in (1, 2):
        put_live(registry, VersionRef("tools", number), hold_back_share=0.5)
    registry.start_canary(V3, share=0.3, **WHO)

    async def all_answers() -> tuple[list[str], list[str]]:
        engine = FakeEngine(max_bytes=10**6)
        async with serving(registry, engine) as service:
            loaded = sorted(str(one.ref) for one in engine.memory)
            return [await answer(service, episode=str(number)) for number in range(50)], loaded

    first, loaded = asyncio.run(all_answers())
    assert asyncio.run(all_answers()) == (first, loaded)
    assert loaded == ["tools@1", "tools@2", "tools@3"]
    assert set(first) == set(loaded)


def test_a_start_with_a_broken_live_version_says_why(registry: Registry) -> None:
    three(registry)
    three(registry, "other")
    put_live(registry, V1)
    put_live(registry, VersionRef("other", 1))

    async def main() -> None:
        engine = FakeEngine(max_bytes=10**6, broken={V1})
        async with serving(registry, engine) as service:
            assert await answer(service, "other") == "other@1"
            with pytest.raises(ServerUnavailableError, match=r"tools@1 cannot be served: tools@1 is broken"):
                await answer(service)  # never the base in its place
            engine.broken.clear()
            assert await answer(service) == "tools@1"

    asyncio.run(main())


def test_more_live_adapters_than_places(registry: Registry) -> None:
    names = [f"adapter-{number}" for number in range(10)]
    for name in names:
        put_live(registry, add(registry, name))

    async def main() -> None:
        engine = FakeEngine(max_versions=3, max_bytes=10**6)
        async with serving(registry, engine) as service:
            assert len(engine.log) == 6  # three loaded; the others did not push them out one by one
            assert [await answer(service, name) for name in names] == [f"{name}@1" for name in names]
            new = add(registry, "adapter-9", "2")
            await service.change(partial(put_live, registry, new))
            assert await answer(service, "adapter-9") == "adapter-9@2"

    asyncio.run(main())


def test_deleted_versions_go(registry: Registry) -> None:
    three(registry)

    async def main() -> None:
        engine = FakeEngine(max_bytes=10**6)
        async with serving(registry, engine) as service:
            assert await answer(service, "tools@3") == "tools@3"
            registry.reject(V3, **WHO)
            await service.change(partial(registry.mark_deleted, V3, **WHO))
            await settle()
            assert engine.memory == []
            with pytest.raises(ModelNotFoundError, match=r"'tools@3' does not exist; this server has 'tools@2', 'to"):
                await answer(service, "tools@3")

    asyncio.run(main())


def is_live(service: AdapterService[Handle], name: str) -> bool:
    """A new request would be answered by it."""
    version = service.resolve("tools", episode_id="e", request_id="r").version
    return name == ("base" if version is None else str(version.ref))


def test_two_servers_follow_one_registry(database_url: str, registry: Registry, database: Database) -> None:
    three(Registry(database))

    async def main() -> None:
        async with (
            serving(Registry(database), poll_seconds=0.001) as one,
            serving(Registry(database), poll_seconds=0.001) as other,
        ):
            await one.change(partial(put_live, Registry(database), V1))
            assert await answer(one) == "tools@1"
            await until(lambda: is_live(other, "tools@1"))
            await other.change(partial(Registry(database).rollback, "tools", **WHO))
            await until(lambda: one.stats().change == other.stats().change)
            await until(lambda: is_live(one, "base"))

    asyncio.run(main())


def test_a_change_waits_for_the_look_that_saw_it_first(registry: Registry) -> None:
    """The look of every few seconds comes between the commit and the change's own look, and begins to load."""
    three(registry)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        engine = FakeEngine(max_bytes=10**6, is_manual=True)
        async with serving(registry, engine) as service:

            def act() -> None:
                put_live(registry, V1)
                assert asyncio.run_coroutine_threadsafe(service._follower.look(), loop).result()

            changed = asyncio.create_task(service.change(act))
            await until(lambda: engine.loads)
            await asyncio.wait({changed}, timeout=0.3)  # it would be done in a millisecond
            assert not changed.done()
            engine.loads.pop()[1].set_result(None)
            await changed
            assert is_live(service, "tools@1")

    asyncio.run(main())


def test_without_its_database_a_server_goes_on(
    registry: Registry, sqlite_database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    three(registry)
    put_live(registry, V1)

    def gone(*_: Any, **__: Any) -> Any:
        raise DatabaseUnavailableError("the database failed: gone")

    async def main() -> None:
        async with serving(registry, poll_seconds=0.001) as service:
            with monkeypatch.context() as patch:
                patch.setattr(registry, "changes_since", gone)
                put_live(registry, V2)
                await until(lambda: service.stats().num_poll_errors >= 3)
                assert await answer(service) == "tools@1"
                assert await service.change(lambda: "done") == "done"
                with pytest.raises(DatabaseUnavailableError):
                    await service.refresh()
            await until(lambda: is_live(service, "tools@2"))

    asyncio.run(main())
    assert len([record for record in caplog.records if "cannot be followed" in record.message]) == 1


def test_a_bug_in_a_look_does_not_end_looking(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    three(registry)
    real, num_calls = registry.changes_since, 0

    def sometimes(*arguments: Any, **options: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 1:
            raise KeyError("a bug")
        return real(*arguments, **options)

    monkeypatch.setattr(registry, "changes_since", sometimes)

    async def main() -> None:
        async with serving(registry, poll_seconds=0.001) as service:
            put_live(registry, V1)
            await until(lambda: is_live(service, "tools@1"))
            assert service.stats().num_poll_errors == 1

    asyncio.run(main())
    assert "a bug" in caplog.text


def test_a_slow_adapter_does_not_hold_up_another(registry: Registry) -> None:
    three(registry)
    three(registry, "other")

    async def main() -> None:
        engine = FakeEngine(max_bytes=10**6, is_manual=True)
        async with serving(registry, engine) as service:
            slow = asyncio.create_task(service.change(partial(put_live, registry, V1)))
            await until(lambda: len(engine.loads) == 1)
            fast = asyncio.create_task(service.change(partial(put_live, registry, VersionRef("other", 1))))
            await until(lambda: len(engine.loads) == 2)
            engine.end(engine.loads, 1)
            await fast
            assert await answer(service, "other") == "other@1"
            assert not slow.done()
            slow.cancel()  # the client of the admin API went away: its act is done all the same
            await settle()
            engine.end(engine.loads, 0)
            await settle()
            assert await answer(service) == "tools@1"
            engine.is_manual = False

    asyncio.run(main())


def test_promotions_in_a_row_end_with_the_last(registry: Registry) -> None:
    three(registry)

    async def main() -> None:
        engine = FakeEngine(max_bytes=10**6, is_manual=True)
        async with serving(registry, engine) as service:
            changes = []
            for ref, change in ((V1, 4), (V2, 6), (V3, 8)):
                changes.append(asyncio.create_task(service.change(partial(put_live, registry, ref))))
                await until(lambda change=change: service.stats().change == change)  # type: ignore[misc]
            while not all(change.done() for change in changes):
                engine.end(engine.loads, 0)
                engine.end(engine.unloads, 0)
                await asyncio.sleep(0)
            assert await answer(service) == "tools@3"
            engine.is_manual = False

    asyncio.run(main())


def test_housekeeping_runs_and_its_faults_are_only_logged(registry: Registry, caplog: pytest.LogCaptureFixture) -> None:
    calls = []

    def clean() -> None:
        calls.append(1)
        raise OSError("no disk")

    async def main() -> None:
        async with serving(registry, housekeeping=clean):
            await until(lambda: "no disk" in caplog.text)

    asyncio.run(main())
    assert calls == [1]


def test_a_history_longer_than_one_look(registry: Registry, sqlite_database: Database) -> None:
    ref = add(registry)

    async def main() -> None:
        async with serving(registry) as service:
            with sqlite_database.write() as connection:
                connection.execute(
                    text(
                        "WITH RECURSIVE n(i) AS (SELECT 2 UNION ALL SELECT i + 1 FROM n WHERE i < 2500) INSERT INTO"
                        " adapter_changes (number, adapter, version, action, to_state, reason, asked_by, at)"
                        " SELECT i, 'tools', 1, 'pin', 'candidate', 'r', 'a', '2026-01-01 00:00:00.000000' FROM n"
                    )
                )
            await service.change(partial(put_live, registry, ref))
            assert service.stats().change == 2501
            assert await answer(service) == "tools@1"

    asyncio.run(main())


def test_a_route_is_let_go_however_the_request_ends(registry: Registry) -> None:
    three(registry)

    async def main() -> None:
        engine = FakeEngine(max_versions=1, max_bytes=10**6)
        async with serving(registry, engine) as service:

            async def request(model: str, ready: asyncio.Event) -> None:
                async with ask(service, model) as routed:
                    assert isinstance(routed, Routed)
                    ready.set()
                    await asyncio.Event().wait()

            ready = asyncio.Event()
            task = asyncio.create_task(request("tools@1", ready))
            await ready.wait()
            task.cancel()
            assert await answer(service, "tools@2") == "tools@2"
            with pytest.raises(RuntimeError):
                async with ask(service, "tools@2"):
                    raise RuntimeError("the request failed")
            assert await answer(service, "tools@3") == "tools@3"

    asyncio.run(main())
