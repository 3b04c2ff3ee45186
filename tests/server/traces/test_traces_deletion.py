"""Deletion leaves an id and nothing else; retention takes the oldest, and no step of a clock empties the log."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, event, text

from server.errors import InvalidRequestError
from server.storage.database import Database, open_database
from server.traces import deletion as deletion_module
from server.traces.deletion import TraceDeletion
from server.traces.feedback import Feedback, FeedbackStore, Target
from server.traces.filters import TraceFilter
from server.traces.queries import TraceQueries
from server.traces.retention import Retention
from server.traces.store import TraceStore
from server.traces.viewer import ADMIN, Viewer
from tests.server.traces.builders import START, Client, assistant, call, make_record, user

CONTENT_TABLES = ("traces", "trace_contents", "episode_anchors", "tool_calls", "feedback", "episodes")


def counts(database: Database) -> dict[str, int]:
    with database.read() as connection:
        return {
            name: int(connection.execute(text(f"SELECT count(*) FROM {name}")).scalar_one())
            for name in (*CONTENT_TABLES, "trace_tombstones")
        }


def left(database: Database) -> list[str]:
    return [one.id for one in TraceQueries(database).list(ADMIN, TraceFilter(), limit=1000).traces][::-1]


def test_nothing_but_the_id_is_left(client: Client, database: Database) -> None:
    record = client.ask([user("x")], assistant("a long answer, so that it leaves a hint too", call("s")), user_id="eve")
    kept = client.ask([user("y")], assistant("z"), user_id="adam")
    given = Feedback(source="thumbs", score=0, comment="bad")
    FeedbackStore(database).add(ADMIN, Target("trace", record.id), given)
    FeedbackStore(database).add(ADMIN, Target("episode", record.episode.id), given)
    deletion = TraceDeletion(database)
    assert deletion.delete(ADMIN, TraceFilter(user_id="eve")) == [record.id]
    after = counts(database)
    assert after == dict.fromkeys(CONTENT_TABLES, 1) | {"tool_calls": 0, "feedback": 0, "trace_tombstones": 1}
    assert left(database) == [kept.id]
    client.forget()
    again = client.ask([user("x"), assistant("a long answer, so that it leaves a hint too"), user("?")], assistant("!"))
    assert again.episode.id != record.episode.id


def test_the_bytes_are_gone_from_the_file(sqlite_url: str, tmp_path: Path) -> None:
    database = open_database(sqlite_url)
    secret = "user-who-wants-to-be-forgotten"
    TraceStore(database).write([make_record(user_id=secret) for _ in range(20)])
    assert any(secret.encode() in path.read_bytes() for path in tmp_path.glob("test.db*"))
    TraceDeletion(database).delete(ADMIN, TraceFilter(user_id=secret))
    assert not any(secret.encode() in path.read_bytes() for path in tmp_path.glob("test.db*"))
    database.close()


def test_by_user_key_episode_and_age(client: Client, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deletion_module, "BATCH", 2)
    records = [
        client.ask([user(f"{n}")], assistant("a"), key_id=f"key-{n % 2}", user_id=f"u{n % 3}",
                   created_at=START + timedelta(days=n))
        for n in range(12)
    ]  # fmt: skip
    deletion = TraceDeletion(database)
    for where in (
        TraceFilter(user_id="u0", key_id="key-0"),
        TraceFilter(episode_id=records[1].episode.id),
        TraceFilter(until=START + timedelta(days=5)),
        TraceFilter(key_id="key-1"),
    ):
        expected = {one.id for one in TraceQueries(database).list(ADMIN, where).traces}
        assert expected
        steps: list[int] = []
        assert set(deletion.delete(ADMIN, where, on_progress=steps.append)) == expected
        assert (sum(steps), max(steps)) == (len(expected), min(2, len(expected)))
        assert deletion.delete(ADMIN, where) == []
    assert left(database) == [records[8].id, records[10].id]
    assert counts(database)["trace_tombstones"] == 10


def test_an_empty_filter_deletes_nothing_and_a_key_only_its_own(client: Client, database: Database) -> None:
    record = client.ask([user("x")], assistant("y"), key_id="key-a", user_id="eve")
    with pytest.raises(InvalidRequestError, match="which traces"):
        TraceDeletion(database).delete(ADMIN, TraceFilter())
    assert TraceDeletion(database).delete(Viewer("key-b"), TraceFilter(user_id="eve")) == []
    assert left(database) == [record.id]


def test_an_episode_stays_while_it_has_a_trace(client: Client, database: Database) -> None:
    first = client.ask([user("x")], assistant("y"), user_id="eve")
    second = client.ask([user("x"), assistant("y"), user("z")], assistant("w"))
    TraceDeletion(database).delete(ADMIN, TraceFilter(user_id="eve"))
    assert client.rows() == {second.id: (first.episode.id, client.side_of(second))}


# -- retention -----------------------------------------------------------------------------------------------------


class Clocks:
    """A wall clock that can be stepped, and a monotonic one that cannot."""

    def __init__(self) -> None:
        self.wall = START + timedelta(days=100)
        self.ticks = 0.0

    def go(self, **time: Any) -> None:
        self.wall += timedelta(**time)
        self.ticks += timedelta(**time).total_seconds()


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


@pytest.fixture
def retention(database: Database, clocks: Clocks) -> Callable[..., Retention]:
    return lambda **limits: Retention(database, clock=lambda: clocks.wall, monotonic=lambda: clocks.ticks, **limits)


def test_the_old_go(store: TraceStore, database: Database, clocks: Clocks, retention: Callable[..., Retention]) -> None:
    records = [make_record(created_at=clocks.wall - timedelta(days=days)) for days in (40, 31, 29, 0)]
    store.write(records)
    keeper = retention(max_age=timedelta(days=30))
    assert keeper.run_once() == 0, "the first pass learns the clock"
    clocks.go(minutes=5)
    assert keeper.run_once() == 2
    assert left(database) == [record.id for record in records[2:]]
    clocks.go(days=2)
    assert keeper.run_once() == 1


def test_a_step_of_the_clock_deletes_nothing(
    store: TraceStore, database: Database, clocks: Clocks, retention: Callable[..., Retention]
) -> None:
    store.write([make_record(created_at=clocks.wall)])
    keeper = retention(max_age=timedelta(days=30))
    keeper.run_once()
    for step in (timedelta(days=1000), -timedelta(days=1000)):
        clocks.wall += step
        clocks.go(minutes=5)
        assert keeper.run_once() == 0
    clocks.go(minutes=5)
    assert keeper.run_once() == 0
    assert len(left(database)) == 1


def test_a_clock_that_stays_where_it_was_set_is_believed(
    store: TraceStore, clocks: Clocks, retention: Callable[..., Retention]
) -> None:
    store.write([make_record(created_at=clocks.wall)])
    keeper = retention(max_age=timedelta(days=30))
    keeper.run_once()
    clocks.wall += timedelta(days=1000)
    assert keeper.run_once() == 0
    clocks.go(minutes=5)
    assert keeper.run_once() == 1


def test_too_many_bytes_take_the_oldest(
    store: TraceStore, database: Database, retention: Callable[..., Retention], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deletion_module, "BATCH", 2)
    records = [make_record() for _ in range(10)]
    for record in records:
        store.write([record])
    size = TraceQueries(database).stats(ADMIN, TraceFilter())["num_bytes"]
    keeper = retention(max_bytes=size // 2)
    assert keeper.run_once() == 5
    assert left(database) == [record.id for record in records[5:]]
    assert keeper.run_once() == 0
    assert retention().run_once() == 0


def test_space_comes_back(sqlite_url: str, tmp_path: Path) -> None:
    database = open_database(sqlite_url)
    store = TraceStore(database)
    big = [user("".join(chr(33 + (n * n) % 90) for n in range(20_000)) + str(n)) for n in range(40)]
    store.write([make_record([message], prompt_token_ids=list(range(30_000))) for message in big])
    database.tidy()
    before = (tmp_path / "test.db").stat().st_size
    TraceDeletion(database).delete(ADMIN, TraceFilter(status="ok"))
    assert (tmp_path / "test.db").stat().st_size < before / 2
    database.close()


def test_the_old_are_looked_for_outside_of_the_lock(
    store: TraceStore, database: Database, clocks: Clocks, retention: Callable[..., Retention]
) -> None:
    """At every pass somebody's whole log was read while its next commit waited."""
    store.write([make_record(created_at=clocks.wall - timedelta(days=days)) for days in (40, 0)])
    keeper = retention(max_age=timedelta(days=30))
    keeper.run_once()
    clocks.go(minutes=5)
    locked: list[str] = []

    @event.listens_for(database.engine, "before_cursor_execute")
    def seen(connection: Connection, cursor: Any, statement: str, *_: Any) -> None:
        if connection.get_execution_options().get("write"):
            locked.append(statement)

    assert keeper.run_once() == 1
    assert any(statement.startswith("DELETE FROM traces") for statement in locked)
    assert not any("created_at <" in statement for statement in locked)
