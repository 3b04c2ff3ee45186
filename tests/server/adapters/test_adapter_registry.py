"""The registry on both databases: states, history, races, restart. No clock is trusted."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import update
from sqlalchemy.exc import IntegrityError

from server.adapters.errors import AdapterConflictError, AdapterStateError, VersionNotFoundError
from server.adapters.registry import Registry
from server.adapters.states import EXCLUSIVE, TRANSITIONS, Action, State
from server.adapters.tables import versions
from server.adapters.version import VersionRef
from server.errors import AdapterError, InvalidRequestError
from server.storage.database import Database, open_database
from tests.server.adapters.make import BASE, WHO, add, digest_of, new, put, put_live

V1, V2, V3 = (VersionRef("tools", number) for number in (1, 2, 3))


def states(registry: Registry, name: str = "tools") -> dict[int, str]:
    return {number: str(one.state) for number, one in registry.adapter(name).versions.items()}


def three(registry: Registry) -> None:
    for content in "123":
        add(registry, content=content)


def test_an_import_is_a_candidate_with_all_that_is_known_of_it(registry: Registry) -> None:
    assert registry.latest_change() == 0
    assert registry.adapters() == []
    version, is_new = put(registry, new(parent="tools@9", origin="peft-dir"))
    assert is_new
    assert (version.ref, version.state, version.digest, version.base_digest) == (V1, "candidate", digest_of("1"), BASE)
    assert (version.rank, version.size_bytes, version.memory_bytes) == (4, 1000, 2000)
    assert (version.origin, version.parent, version.directory) == ("peft-dir", "tools@9", version.directory)
    assert version.directory.startswith(new().directory)
    assert version.created_at.tzinfo is not None
    assert (version.is_pinned, version.is_deleted, version.predecessor) == (False, False, None)
    assert registry.version(V1) == version
    assert registry.adapter("tools").live is None
    [change] = registry.history("tools")
    assert (change.number, change.ref, change.action, change.from_state, change.to_state) == (
        1, V1, Action.IMPORT, None, State.CANDIDATE,
    )  # fmt: skip
    assert (change.reason, change.asked_by) == ("a test", "user:ada")


def test_the_same_content_is_the_same_version(registry: Registry) -> None:
    first, _ = put(registry, new())
    put_live(registry, first.ref)
    again, is_new = put(registry, new())
    assert (again.ref, again.state, is_new) == (V1, "live", False)
    assert len(registry.history("tools")) == 2
    assert add(registry, "other") == VersionRef("other", 1)
    assert add(registry, content="2") == V2
    with pytest.raises(AdapterError, match="another base"):
        add(registry, base_digest="sha256:" + "c" * 64)


def test_the_whole_way_of_a_version(registry: Registry) -> None:
    three(registry)
    put_live(registry, V1)
    adapter = registry.start_shadow(V2, share=0.5, **WHO)
    assert (adapter.in_state(State.SHADOW).ref, adapter.shadow_share) == (V2, 0.5)  # type: ignore[union-attr]
    adapter = registry.start_canary(V2, share=0.1, **WHO)
    assert (adapter.in_state(State.CANARY).ref, adapter.canary_share) == (V2, 0.1)  # type: ignore[union-attr]
    adapter = registry.promote(V2, hold_back_share=0.05, **WHO)
    assert states(registry) == {1: "retired", 2: "live", 3: "candidate"}
    assert adapter.live is not None
    assert (adapter.live.predecessor, adapter.hold_back_share) == (1, 0.05)
    registry.reject(V3, **WHO)
    rows = [(c.number, c.ref.number, c.action, c.from_state, c.to_state, c.share) for c in registry.changes_since(3)]
    assert rows == [
        (4, 1, "override", "candidate", "live", 0.0),
        (5, 2, "shadow", "candidate", "shadow", 0.5),
        (6, 2, "canary", "shadow", "canary", 0.1),
        (7, 1, "supersede", "live", "retired", None),
        (8, 2, "promote", "canary", "live", 0.05),
        (9, 3, "reject", "candidate", "rejected", None),
    ]
    assert registry.latest_change() == registry.adapter("tools").change == 9


def test_rollback_goes_back_one_by_one_and_ends_at_the_base(registry: Registry) -> None:
    three(registry)
    for ref in (V1, V2, V3):
        put_live(registry, ref, hold_back_share=0.2)
    adapter = registry.rollback("tools", **WHO)
    assert states(registry) == {1: "retired", 2: "live", 3: "retired"}
    assert adapter.hold_back_share == 0
    registry.rollback("tools", **WHO)
    assert states(registry) == {1: "live", 2: "retired", 3: "retired"}
    assert registry.rollback("tools", **WHO).live is None
    with pytest.raises(AdapterStateError, match="no live version"):
        registry.rollback("tools", **WHO)


def test_rollback_to_a_named_version(registry: Registry) -> None:
    three(registry)
    put_live(registry, V1)
    put_live(registry, V2)
    with pytest.raises(AdapterStateError, match="tools@3 is candidate"):
        registry.rollback("tools", to=3, **WHO)
    with pytest.raises(AdapterStateError, match="tools@2 is live"):
        registry.rollback("tools", to=2, **WHO)
    with pytest.raises(VersionNotFoundError, match="tools@4"):
        registry.rollback("tools", to=4, **WHO)
    put_live(registry, V3)
    assert registry.rollback("tools", to=1, **WHO).live.ref == V1  # type: ignore[union-attr]
    assert registry.rollback("tools", to=3, **WHO).live.ref == V3  # type: ignore[union-attr]
    assert registry.rollback("tools", **WHO).live.ref == V2  # type: ignore[union-attr]


ACTS: dict[Action, Callable[[Registry, VersionRef], object]] = {
    Action.SHADOW: lambda registry, ref: registry.start_shadow(ref, **WHO),
    Action.CANARY: lambda registry, ref: registry.start_canary(ref, share=0.5, **WHO),
    Action.PROMOTE: lambda registry, ref: registry.promote(ref, **WHO),
    Action.OVERRIDE: lambda registry, ref: registry.promote(ref, override=True, **WHO),
    Action.REJECT: lambda registry, ref: registry.reject(ref, **WHO),
}
WAYS: dict[State, list[Action]] = {
    State.CANDIDATE: [],
    State.SHADOW: [Action.SHADOW],
    State.CANARY: [Action.CANARY],
    State.LIVE: [Action.OVERRIDE],
    State.RETIRED: [Action.OVERRIDE],  # and then rolled back
    State.REJECTED: [Action.REJECT],
}


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("action", ACTS)
def test_every_pair_of_state_and_action(sqlite_database: Database, state: State, action: Action) -> None:
    registry = Registry(sqlite_database)
    add(registry)
    for step in WAYS[state]:
        ACTS[step](registry, V1)
    if state is State.RETIRED:
        registry.rollback("tools", **WHO)
    assert registry.version(V1).state is state
    before = registry.latest_change()
    sources, target = TRANSITIONS[action]
    if state in sources:
        ACTS[action](registry, V1)
        assert registry.version(V1).state is target
    else:
        with pytest.raises(AdapterStateError, match=f"tools@1 is {state}; '{action}' needs"):
            ACTS[action](registry, V1)
        assert registry.latest_change() == before


def test_the_table_of_transitions_is_the_design() -> None:
    pairs = {(str(source), str(target)) for sources, target in TRANSITIONS.values() for source in sources}
    assert pairs == {
        ("candidate", "shadow"), ("candidate", "canary"), ("candidate", "live"), ("candidate", "rejected"),
        ("shadow", "canary"), ("shadow", "live"), ("shadow", "rejected"),
        ("canary", "live"), ("canary", "rejected"), ("live", "retired"), ("retired", "live"),
    }  # fmt: skip
    assert TRANSITIONS[Action.PROMOTE][0] == {State.CANARY}  # only an override skips the test


@pytest.mark.parametrize("state", EXCLUSIVE)
def test_the_database_itself_allows_one_of_each(database: Database, registry: Registry, state: State) -> None:
    three(registry)
    with pytest.raises(IntegrityError), database.write() as connection:
        connection.execute(update(versions).values(state=state.value))
    with pytest.raises(IntegrityError), database.write() as connection:
        connection.execute(update(versions).values(state="almost"))
    with database.write() as connection:  # and does not mind several of the others
        connection.execute(update(versions).values(state="retired"))


def test_a_second_canary_is_refused_as_a_conflict(registry: Registry) -> None:
    three(registry)
    registry.start_canary(V1, share=0.1, **WHO)
    with pytest.raises(AdapterConflictError):
        registry.start_canary(V2, share=0.1, **WHO)
    assert states(registry) == {1: "canary", 2: "candidate", 3: "candidate"}
    assert registry.adapter("tools").canary_share == 0.1


def test_who_decided_on_an_older_state_loses(registry: Registry) -> None:
    three(registry)
    seen = registry.adapter("tools").change
    registry.promote(V1, override=True, expected_change=seen, **WHO)
    for act in (
        lambda: registry.promote(V2, override=True, expected_change=seen, **WHO),
        lambda: registry.rollback("tools", expected_change=seen, **WHO),
        lambda: registry.reject(V2, expected_change=seen, **WHO),
        lambda: registry.start_canary(V2, share=0.1, expected_change=seen, **WHO),
        lambda: registry.set_share("tools", State.LIVE, 0.1, expected_change=seen, **WHO),
    ):
        with pytest.raises(AdapterConflictError, match=r"at change 4, not 3 any more"):
            act()
    add(registry, "other")  # another adapter's changes do not disturb
    registry.promote(V2, override=True, expected_change=4, **WHO)


def test_an_import_is_claimed_finished_or_given_up(registry: Registry) -> None:
    with pytest.raises(AdapterConflictError, match="given up"):
        registry.add_version(new(), **WHO)
    registry.begin_import("tools/a")
    registry.begin_import("tools/b")
    assert registry.directories() == {"tools/a", "tools/b"}
    registry.add_version(new(directory="tools/a"), **WHO)
    registry.end_imports(started_before=datetime.now(UTC) + timedelta(seconds=1))
    assert registry.directories() == {"tools/a"}
    with pytest.raises(AdapterConflictError, match="given up"):
        registry.add_version(new(content="2", directory="tools/b"), **WHO)
    registry.reject(V1, **WHO)
    registry.mark_deleted(V1, **WHO)
    assert registry.directories() == set()


def in_parallel(*acts: Callable[[], Any]) -> list[Any]:
    """Results or exceptions, in order; all start together."""
    barrier = threading.Barrier(len(acts))

    def run(act: Callable[[], Any]) -> Any:
        barrier.wait()
        try:
            return act()
        except AdapterConflictError as error:
            return error

    with ThreadPoolExecutor(len(acts)) as pool:
        return list(pool.map(run, acts))


def test_servers_that_race_have_one_winner(database_url: str) -> None:
    databases = [open_database(database_url) for _ in range(4)]
    registries = [Registry(database) for database in databases]
    refs = [add(registries[0], content=str(number)) for number in range(4)]
    seen = registries[0].adapter("tools").change

    def promotes(registry: Registry, ref: VersionRef) -> Callable[[], object]:
        return lambda: registry.promote(ref, override=True, expected_change=seen, **WHO)

    results = in_parallel(*(promotes(*pair) for pair in zip(registries, refs, strict=True)))
    assert sum(isinstance(result, AdapterConflictError) for result in results) == 3
    assert sorted(states(registries[0]).values()) == ["candidate", "candidate", "candidate", "live"]
    rollbacks = in_parallel(*(lambda registry=one: registry.rollback("tools", **WHO) for one in registries))
    assert sum(isinstance(result, AdapterConflictError) for result in rollbacks) == 3  # nothing live any more
    numbers = [change.number for change in registries[0].changes_since(0)]
    assert numbers == list(range(1, len(numbers) + 1))
    for database in databases:
        database.close()


def test_imports_that_race_are_one_version(database_url: str) -> None:
    databases = [open_database(database_url) for _ in range(3)]
    acts = [lambda one=one: put(Registry(one), new()) for one in databases]
    results = in_parallel(*acts)
    assert [version.ref for version, _ in results] == [V1] * 3
    assert sum(is_new for _, is_new in results) == 1
    for database in databases:
        database.close()


def test_a_poller_sees_every_change_once_and_in_order(database_url: str) -> None:
    writers = [open_database(database_url) for _ in range(3)]
    poller_database = open_database(database_url)
    poller = Registry(poller_database)
    done = threading.Event()
    seen: list[int] = []

    def poll() -> None:
        while True:
            is_last = done.is_set()
            seen.extend(change.number for change in poller.changes_since(seen[-1] if seen else 0, limit=3))
            if is_last and poller.latest_change() == len(seen):
                return

    def write(index: int) -> None:
        registry = Registry(writers[index])
        for number in range(6):
            add(registry, f"adapter{index}", str(number))

    with ThreadPoolExecutor(4) as pool:
        polling = pool.submit(poll)
        writing = [pool.submit(write, index) for index in range(3)]
        for task in writing:
            task.result()
        done.set()
        polling.result()
    assert seen == list(range(1, 19))
    for database in (*writers, poller_database):
        database.close()


def test_a_restart_brings_back_exactly_the_state(database_url: str) -> None:
    database = open_database(database_url)
    registry = Registry(database)
    three(registry)
    put_live(registry, V1)
    put_live(registry, V2, hold_back_share=0.25)
    registry.start_canary(V3, share=0.125, **WHO)
    registry.pin(V1, **WHO)
    before = (registry.adapters(), registry.changes_since(0), registry.draw_key())
    database.close()
    database = open_database(database_url)
    registry = Registry(database)
    assert (registry.adapters(), registry.changes_since(0), registry.draw_key()) == before
    database.close()


def test_order_does_not_come_from_the_clock(database: Database) -> None:
    times: Iterator[datetime] = (datetime(2026, 1, 1, tzinfo=UTC) - timedelta(days=day) for day in range(100))
    registry = Registry(database, clock=lambda: next(times))
    three(registry)
    put_live(registry, V1)
    put_live(registry, V2)
    assert [change.number for change in registry.changes_since(0)] == [1, 2, 3, 4, 5, 6]
    assert registry.adapter("tools").previous.ref == V1  # type: ignore[union-attr]


def test_shares(registry: Registry) -> None:
    three(registry)
    for state in (State.LIVE, State.CANARY, State.SHADOW, State.RETIRED):
        with pytest.raises(AdapterStateError, match=f"no {state} version"):
            registry.set_share("tools", state, 0.5, **WHO)
    put_live(registry, V1)
    registry.start_canary(V2, share=0.1, **WHO)
    registry.start_shadow(V3, **WHO)
    registry.set_share("tools", State.LIVE, 0.3, **WHO)
    registry.set_share("tools", State.CANARY, 0.2, **WHO)
    adapter = registry.set_share("tools", State.SHADOW, 0.0, **WHO)
    assert (adapter.hold_back_share, adapter.canary_share, adapter.shadow_share) == (0.3, 0.2, 0.0)
    assert [(c.ref, c.action, c.share) for c in registry.changes_since(6)] == [
        (V1, "share", 0.3), (V2, "share", 0.2), (V3, "share", 0.0),
    ]  # fmt: skip
    for share in (-0.1, 1.1, float("nan"), float("inf")):
        with pytest.raises(InvalidRequestError, match="between 0 and 1"):
            registry.set_share("tools", State.CANARY, share, **WHO)


def test_what_is_needed_cannot_be_deleted(registry: Registry) -> None:
    three(registry)
    for ref in (V1, V2):
        with pytest.raises(AdapterStateError, match=r"tools@. is candidate; only"):
            registry.mark_deleted(ref, **WHO)
        put_live(registry, ref)
    with pytest.raises(AdapterStateError, match="rollback would bring back"):
        registry.mark_deleted(V1, **WHO)
    put_live(registry, V3)
    registry.pin(V1, **WHO)
    with pytest.raises(AdapterStateError, match="pinned"):
        registry.mark_deleted(V1, **WHO)
    registry.pin(V1, is_pinned=False, **WHO)
    changes = registry.latest_change()
    registry.pin(V1, is_pinned=False, **WHO)  # twice is once
    assert registry.latest_change() == changes
    assert registry.mark_deleted(V1, **WHO).is_deleted
    assert registry.mark_deleted(V1, **WHO).is_deleted
    assert [change.action for change in registry.changes_since(changes)] == ["delete"]
    for act in (lambda: registry.pin(V1, **WHO), lambda: registry.rollback("tools", to=1, **WHO)):
        with pytest.raises(AdapterStateError, match="was deleted"):
            act()


def test_a_rollback_passes_over_what_was_deleted(registry: Registry) -> None:
    three(registry)
    for ref in (V1, V2, V3):
        put_live(registry, ref)
    registry.mark_deleted(V1, **WHO)  # not the next one back
    registry.rollback("tools", **WHO)
    assert registry.adapter("tools").live.ref == V2  # type: ignore[union-attr]
    assert registry.rollback("tools", **WHO).live is None


def test_deleted_content_comes_back_under_a_new_number(registry: Registry) -> None:
    three(registry)
    registry.reject(V1, **WHO)
    registry.mark_deleted(V1, **WHO)
    assert add(registry, content="1") == VersionRef("tools", 4)
    assert registry.version(V1).is_deleted


@pytest.mark.parametrize("name", ["", "Tools", "a/b", "..", "../a", ".a", "a@1", "a" * 65, "a b", "a\0", "ä", "-a"])
def test_names_that_no_adapter_may_have(registry: Registry, name: str) -> None:
    with pytest.raises(AdapterError, match="no adapter name"):
        add(registry, name)
    with pytest.raises(VersionNotFoundError, match="there is no adapter"):
        registry.adapter(name)
    assert registry.adapters([name]) == []
    assert registry.latest_change() == 0


def test_unknown_adapters_and_versions(registry: Registry) -> None:
    add(registry)
    for act in (
        lambda: registry.promote(VersionRef("other", 1), **WHO),
        lambda: registry.promote(V2, **WHO),
        lambda: registry.rollback("other", **WHO),
        lambda: registry.version(V2),
    ):
        with pytest.raises(VersionNotFoundError, match=r"no adapter 'other'|no version tools@2"):
            act()


@pytest.mark.parametrize("text", ["", "  ", "a\0b", "\ud800", "x" * 2001])
def test_every_change_names_who_and_why(registry: Registry, text: str) -> None:
    for changed in ("asked_by", "reason"):
        with pytest.raises(InvalidRequestError, match=changed):
            registry.add_version(new(), **(WHO | {changed: text}))
    assert registry.latest_change() == 0


def test_an_adapter_without_a_version(registry: Registry) -> None:
    adapter, is_new = registry.create("tools", **WHO)
    assert is_new
    assert (adapter.name, adapter.versions, adapter.live, adapter.change) == ("tools", {}, None, 1)
    assert registry.create("tools", **WHO) == (adapter, False)
    assert [(change.adapter, change.ref, change.action.value) for change in registry.changes_since(0)] == [
        ("tools", None, "create")
    ]
    with pytest.raises(VersionNotFoundError, match="it has none yet"):
        registry.version(VersionRef("tools", 1))
    ref = add(registry)
    assert [one.name for one in registry.adapters()] == ["tools"]
    assert ref == VersionRef("tools", 1)
    with pytest.raises(AdapterError, match="no adapter name"):
        registry.create("../tools", **WHO)
