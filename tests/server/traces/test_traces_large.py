"""What must not grow with the log: counted in steps of SQLite's machine, because tests assert no times.

How long it takes with a million traces is in benchmarks/million_traces.py.
"""

import sqlite3
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import insert

from server.storage.database import Database, open_database
from server.traces.filters import TraceFilter
from server.traces.queries import TraceQueries
from server.traces.store import TraceStore
from server.traces.tables import episodes
from server.traces.viewer import ADMIN, Viewer
from tests.server.traces.builders import START, make_record, user

NUM = 1500
STEPS = 10


@pytest.fixture
def database(sqlite_url: str) -> Iterator[Database]:
    opened = open_database(sqlite_url)
    yield opened
    opened.close()


def steps_of(database: Database, act: Callable[[], object]) -> int:
    """How many instructions SQLite's machine runs for it, on the pool's one connection."""
    raw = database.engine.raw_connection()
    driver = raw.driver_connection
    raw.close()
    assert isinstance(driver, sqlite3.Connection)
    seen = [0]

    def count() -> int:
        seen[0] += STEPS
        return 0

    driver.set_progress_handler(count, STEPS)
    act()
    driver.set_progress_handler(None, STEPS)
    return seen[0]


def test_a_short_time_is_found_without_passing_what_is_outside(database: Database) -> None:
    same = {"adapter": "tools", "version": "tools@1", "key_id": "key-a"}
    TraceStore(database).write(
        [make_record(created_at=START + timedelta(minutes=number), **same) for number in range(NUM)]
    )
    queries = TraceQueries(database)
    last, middle = START + timedelta(minutes=NUM - 5), START + timedelta(minutes=NUM // 3)
    times: list[dict[str, Any]] = [{"since": last}, {"since": middle, "until": middle + timedelta(minutes=5)}]
    for time in times:
        for where, viewer in (
            ({"adapter": "tools"}, ADMIN),
            ({"version": "tools@1"}, ADMIN),
            ({"has_tool_calls": False}, ADMIN),
            ({}, Viewer("key-a")),
            ({}, ADMIN),
        ):
            wanted = TraceFilter(**where, **time)
            assert len(queries.list(viewer, wanted).traces) == 5
            assert steps_of(database, lambda wanted=wanted, viewer=viewer: queries.list(viewer, wanted)) < NUM  # type: ignore[misc]


def test_a_first_message_that_thousands_had_slows_no_commit(database: Database) -> None:
    store = TraceStore(database)
    often = make_record([user("every hour")])
    with database.write() as connection:
        group = store._draw.group_digest(often.episode.group)
        same = {"key_id": "", "side": "train", "group_digest": group, "created_at": START}
        connection.execute(insert(episodes), [same | {"id": f"ep-{number}"} for number in range(NUM)])
    store.write([make_record()])
    fresh = steps_of(database, lambda: store.write([make_record([user("new")])]))
    assert steps_of(database, lambda: store.write([often])) < fresh + NUM
