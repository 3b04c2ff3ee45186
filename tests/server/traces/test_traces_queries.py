"""Listing, filtering, paging, totals, and who sees what."""

import sqlite3
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from server.errors import InvalidRequestError
from server.storage.database import Database, open_database
from server.traces.errors import TraceNotFoundError
from server.traces.feedback import Feedback, FeedbackStore, Target
from server.traces.filters import TraceFilter
from server.traces.queries import TraceQueries
from server.traces.record import TraceRecord
from server.traces.store import TraceStore
from server.traces.viewer import ADMIN, Viewer
from tests.server.traces.builders import START, Client, assistant, call, make_record, tool, user


@pytest.fixture
def queries(database: Database) -> TraceQueries:
    return TraceQueries(database)


def at(hours: int) -> dict[str, Any]:
    return {"created_at": START + timedelta(hours=hours)}


def test_newest_first_page_by_page_while_more_are_written(store: TraceStore, queries: TraceQueries) -> None:
    records = [make_record(**at(-number)) for number in range(7)]  # the clock runs backwards: order is not its matter
    store.write(records)
    seen: list[str] = []
    before = None
    while True:
        page = queries.list(ADMIN, TraceFilter(), limit=3, before=before)
        seen += [one.id for one in page.traces]
        store.write([make_record()])
        before = page.next_before
        if before is None:
            break
    assert seen == [record.id for record in reversed(records)]


def test_every_filter(client: Client, queries: TraceQueries) -> None:
    plain = client.ask([user("a")], assistant("b"), key_id="key-a", **at(1))
    called = client.ask(
        [user("c")], assistant(None, call("s")), tools=[tool("s")], adapter="tools", version="tools@2", user_id="eve",
        **at(2),
    )  # fmt: skip
    live = client.ask([user("d")], assistant("e"), adapter="tools", status="failed", error="x", **at(3))
    gate = client.ask([user("f")], assistant("g"), purpose="evaluation", episode="gate run", **at(4))
    FeedbackStore(client.store.database).add(ADMIN, Target("trace", live.id), Feedback(source="thumbs", score=1))

    def found(**where: Any) -> set[str]:
        return {one.id for one in queries.list(ADMIN, TraceFilter(**where)).traces}

    def named(*records: TraceRecord) -> set[str]:
        return {record.id for record in records}

    assert found(adapter="tools") == named(called, live)
    assert found(version="tools@2") == named(called)
    assert found(key_id="key-a") == named(plain)
    assert found(user_id="eve") == named(called)
    assert found(episode_id=plain.episode.id) == named(plain)
    assert found(episode_id="nonsense") == set()
    assert found(trace_id=called.id) == named(called)
    assert found(trace_id="nonsense") == set()
    assert found(purpose="evaluation") == named(gate)
    assert found(purpose="user") == named(plain, called, live)
    assert found(status="failed") == named(live)
    assert found(status="ok") == named(plain, called, gate)
    assert found(since=START + timedelta(hours=2), until=START + timedelta(hours=4)) == named(called, live)
    assert found(has_tool_calls=True) == named(called)
    assert found(has_tool_calls=False) == named(plain, live, gate)
    assert found(has_feedback=True) == named(live)
    assert found(has_feedback=False) == named(plain, called, gate)
    assert found(is_audit=False) == named(plain, called, live, gate)
    assert found(adapter="tools", status="failed", has_feedback=True) == named(live)
    assert found(adapter="tools", key_id="key-a") == set()


def test_each_key_sees_its_own_and_admin_all(client: Client, queries: TraceQueries) -> None:
    ours = client.ask([user("a")], assistant("b"), key_id="key-a")
    theirs = client.ask([user("a")], assistant("b"), key_id="key-b")
    assert [one.id for one in queries.list(Viewer("key-a"), TraceFilter()).traces] == [ours.id]
    assert queries.list(Viewer("key-a"), TraceFilter(key_id="key-b")).traces == []
    assert queries.list(Viewer("key-a"), TraceFilter(episode_id=theirs.episode.id)).traces == []
    assert {one.id for one in queries.list(ADMIN, TraceFilter()).traces} == {ours.id, theirs.id}
    assert queries.stats(Viewer("key-a"), TraceFilter())["num_traces"] == 1
    with pytest.raises(TraceNotFoundError):
        queries.show(Viewer("key-a"), theirs.id)
    with pytest.raises(TraceNotFoundError):
        queries.show(ADMIN, "trace-nonsense")


def test_by_time_whatever_the_clock_did(store: TraceStore, queries: TraceQueries) -> None:
    """Each way to the rows finds the same, also where the clock was stepped back and forth."""
    hours = [0, 1, 2, 50, 3, 4, 5, 6, 7, 8, 9, -40, 10, 11, 12]
    records = [make_record(adapter="tools" if number % 2 else None, **at(hour)) for number, hour in enumerate(hours)]
    store.write(records)
    for since in (None, -50, 0, 4, 11, 60):
        for until in (None, -50, 0, 3, 9, 60):
            where = TraceFilter(
                since=None if since is None else START + timedelta(hours=since),
                until=None if until is None else START + timedelta(hours=until),
            )
            low, high = (-99 if since is None else since), (99 if until is None else until)
            expected = [records[n].id for n, hour in enumerate(hours) if low <= hour < high][::-1]
            assert [one.id for one in queries.list(ADMIN, where).traces] == expected
            assert [one.id for one in queries.list(Viewer(), where).traces] == expected
            odd = [one.id for one in queries.list(ADMIN, replace(where, adapter="tools")).traces]
            assert odd == [name for name in expected if name in {record.id for record in records[1::2]}]


def test_an_episode_goes_by_our_id_and_by_its_own_keys_name(client: Client, queries: TraceQueries) -> None:
    mine, theirs = (
        client.ask([user("a")], assistant("b"), key_id=key, episode="run / é") for key in ("key-a", "key-b")
    )

    def found(viewer: Viewer, episode: str) -> list[str]:
        return [one.id for one in queries.list(viewer, TraceFilter(episode_id=episode)).traces]

    assert mine.episode.id != theirs.episode.id
    assert found(Viewer("key-a"), "run / é") == found(Viewer("key-a"), mine.episode.id) == [mine.id]
    assert found(Viewer("key-b"), "run / é") == found(ADMIN, theirs.episode.id) == [theirs.id]
    assert found(ADMIN, "run / é") == [], "whose?"
    of_b = queries.list(ADMIN, TraceFilter(episode_id="run / é", key_id="key-b")).traces
    assert [one.id for one in of_b] == [theirs.id]
    assert queries.list(Viewer("key-a"), TraceFilter(episode_id="run / é", key_id="key-b")).traces == []
    feedback = FeedbackStore(client.store.database)
    given = feedback.add(Viewer("key-b"), Target("episode", "run / é"), Feedback(source="thumbs", score=1))
    assert given.episode_id == theirs.episode.id


def test_text_that_no_row_can_hold_matches_none(queries: TraceQueries) -> None:
    """PostgreSQL refuses NUL and half surrogate pairs even in a question."""
    for odd in ("nul \0", "half \ud800", "x" * 100_000):
        for name in ("trace_id", "adapter", "version", "key_id", "user_id", "episode_id"):
            assert queries.list(ADMIN, TraceFilter(**{name: odd})).traces == []
        with pytest.raises(TraceNotFoundError):
            queries.show(ADMIN, odd)
        for kind in ("trace", "response", "episode"):
            with pytest.raises(TraceNotFoundError):
                FeedbackStore(queries._database).add(
                    ADMIN,
                    Target(kind, odd),
                    Feedback(source="thumbs", score=1),  # type: ignore[arg-type]
                )


def test_totals(client: Client, queries: TraceQueries) -> None:
    assert queries.stats(ADMIN, TraceFilter())["num_traces"] == 0
    asked = call("s")
    first = client.ask([user("a")], assistant(None, asked), tools=[tool("s")], adapter="tools", version="tools@1")
    client.ask([user("a"), {"role": "tool", "tool_call_id": asked["id"], "content": "ok"}], assistant("b"))
    client.ask([user("c")], assistant("d"), status="cancelled", adapter="tools")
    FeedbackStore(client.store.database).add(ADMIN, Target("trace", first.id), Feedback(source="thumbs", score=0.5))
    totals = queries.stats(ADMIN, TraceFilter())
    assert totals["num_traces"] == 3
    assert totals["num_bytes"] > 3 * 600
    assert (totals["num_prompt_tokens"], totals["num_completion_tokens"]) == (12, 9)
    assert (totals["num_has_tools"], totals["num_has_tool_calls"], totals["num_has_feedback"]) == (1, 1, 1)
    assert totals["by_status"] == {"ok": 2, "cancelled": 1}
    assert totals["by_version"] == {"tools@1": 1, "tools": 1, "base": 1}
    assert totals["tool_calls"] == {"ok": 1}
    assert sum(totals["episodes"].values()) == 2
    assert (totals["num_feedback"], totals["mean_score"]) == (1, 0.5)
    assert totals["oldest"] < totals["newest"]
    assert queries.stats(ADMIN, TraceFilter(status="cancelled"))["num_traces"] == 1


@pytest.mark.parametrize("limit", [0, -1, 1001])
def test_a_page_has_a_size(queries: TraceQueries, limit: int) -> None:
    with pytest.raises(InvalidRequestError, match="1 to 1000"):
        queries.list(ADMIN, TraceFilter(), limit=limit)


FILTERS: list[dict[str, Any]] = [
    {"key_id": "key-a"},
    {"adapter": "tools"},
    {"version": "tools@1"},
    {"user_id": "eve"},
    {"episode_id": "ep"},
    {"trace_id": "trace"},
    {"status": "failed"},
    {"purpose": "evaluation"},
    {"has_tool_calls": True},
    {"has_tool_error": True},
    {"has_feedback": True},
    {"is_audit": True},
    {"since": START},
    {},
]


@pytest.mark.parametrize("where", FILTERS, ids=str)
def test_every_filter_has_its_index_on_sqlite(
    sqlite_url: str, where: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No list may read the whole table: what the planner says for the very query that is sent."""
    database = open_database(sqlite_url)
    TraceStore(database).write([make_record()])
    statements: list[str] = []
    raw = database.engine.raw_connection()
    assert isinstance(raw.driver_connection, sqlite3.Connection)
    raw.driver_connection.set_trace_callback(statements.append)
    raw.close()
    TraceQueries(database).list(ADMIN, TraceFilter(**where))
    query = next(statement for statement in statements if "ORDER BY traces.seq DESC" in statement)
    with database.read() as connection:
        plan = [row.detail for row in connection.exec_driver_sql("EXPLAIN QUERY PLAN " + query.replace("%", "%%"))]
    of_traces = [line for line in plan if " traces" in line]
    assert of_traces
    if where and where != {"since": START}:
        assert all(line.startswith("SEARCH") or "USING INDEX" in line for line in of_traces), plan
    if where != {"since": START}:
        assert not any("TEMP B-TREE" in line for line in plan), plan
    database.close()
