"""Long questions take turns, so that what answers wait for finds a thread."""

import asyncio
import threading

import pytest

from server.admin import trace_routes
from server.admin.turns import Turns
from server.traces.queries import TraceQueries
from tests.patience import PATIENCE_SECONDS
from tests.server.openai.harness import async_test, serving

MANY = 40
"""More than the event loop has threads, on any machine."""


@async_test
async def test_totals_of_a_large_log_leave_threads_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, inside, done = [], [], threading.Event()
    stats, read_filter = TraceQueries.stats, trace_routes.read_filter

    def slow(*arguments: object) -> object:
        inside.append(1)
        done.wait(PATIENCE_SECONDS)
        return stats(*arguments)  # type: ignore[arg-type]

    def counted(query: dict[str, str]) -> object:
        asked.append(1)
        return read_filter(query)

    monkeypatch.setattr(TraceQueries, "stats", slow)
    monkeypatch.setattr(trace_routes, "read_filter", counted)
    async with serving() as h:
        asking = [asyncio.create_task(h.http.get("/v1/traces/stats")) for _ in range(MANY)]
        try:
            while len(asked) < MANY or len(inside) < trace_routes.NUM_AT_ONCE:  # noqa: ASYNC110 - other tasks' turns
                await asyncio.sleep(0.001)
            async with asyncio.timeout(PATIENCE_SECONDS / 2):
                assert await asyncio.to_thread(len, inside) == trace_routes.NUM_AT_ONCE
        finally:
            done.set()
        assert {(await one).status_code for one in asking} == {200}


@async_test
async def test_who_leaves_does_not_take_the_next_ones_turn_along() -> None:
    turns, begun, done = Turns(1), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        done.wait(PATIENCE_SECONDS)

    first = asyncio.create_task(turns.run(work))
    await asyncio.to_thread(begun.wait, PATIENCE_SECONDS)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    second = asyncio.create_task(turns.run(lambda: 2))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not second.done()
    done.set()
    assert await second == 2
