"""The runner of shadow jobs: bounded, first come first run, gone when serving is busy, and never in anybody's way."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import pytest

from server.adapters.shadow import Outcome, ShadowRunner
from server.errors import QueueFullError
from tests.server.adapters.fake_engine import settle


@dataclass
class World:
    """Jobs are numbers; each ends when the test opens its gate."""

    is_busy: bool = False
    started: list[int] = field(default_factory=list)
    ended: list[Outcome] = field(default_factory=list)
    gates: dict[int, "asyncio.Future[None]"] = field(default_factory=dict)

    def runner(self, **limits: int) -> "ShadowRunner[int]":
        return ShadowRunner(self.run, is_busy=lambda: self.is_busy, on_end=self.ended.append, **limits)

    async def run(self, job: int) -> None:
        self.started.append(job)
        self.gates[job] = asyncio.get_running_loop().create_future()
        await self.gates[job]


def async_test(function: Callable[..., Any]) -> Callable[..., None]:
    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(function(*args, **kwargs))

    return run


@async_test
async def test_so_many_at_once_so_many_in_the_queue_in_order() -> None:
    world = World()
    runner = world.runner(max_running=2, max_queued=3)
    taken = []
    for job in range(7):
        taken.append(runner.offer(job))
        await settle()
    assert taken == [True] * 5 + [False] * 2
    assert world.started == [0, 1]
    assert world.ended == ["dropped", "dropped"]
    for job in (1, 0, 2, 3, 4):
        world.gates[job].set_result(None)
        await settle()
    assert world.started == [0, 1, 2, 3, 4]
    assert world.ended[2:] == ["done"] * 5
    assert runner.offer(9)  # and from idle again
    await settle()
    assert world.started[-1] == 9
    await runner.stop()


@async_test
async def test_busy_serving_drops_what_is_offered_and_what_waits_but_not_what_runs() -> None:
    world = World()
    runner = world.runner(max_running=1)
    assert [runner.offer(job) for job in range(3)] == [True] * 3
    await settle()
    world.is_busy = True
    assert not runner.offer(3)
    world.gates[0].set_result(None)
    await settle()
    assert world.started == [0]
    assert world.ended == ["dropped", "done", "dropped", "dropped"]
    world.is_busy = False
    assert runner.offer(4)
    await settle()
    assert world.started == [0, 4]
    await runner.stop()


@async_test
async def test_a_failure_is_counted_and_the_next_job_runs(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    runner = world.runner(max_running=1)
    assert [runner.offer(job) for job in range(3)] == [True] * 3
    await settle()
    world.gates[0].set_exception(QueueFullError("full", retry_after_seconds=1))
    await settle()
    assert not caplog.records  # the server's state, no bug
    world.gates[1].set_exception(RuntimeError("a bug"))
    await settle()
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    world.gates[2].set_result(None)
    await settle()
    assert world.ended == ["failed", "failed", "done"]


@async_test
async def test_stop_cuts_off_what_runs_and_takes_nothing_more() -> None:
    world = World()
    runner = world.runner(max_running=2)
    for job in range(5):
        runner.offer(job)
    await settle()
    await runner.stop()
    assert all(world.gates[job].cancelled() for job in (0, 1))
    assert not runner.offer(5)
    assert sorted(world.ended) == ["dropped"] * 4 + ["failed"] * 2
    await runner.stop()
    assert world.started == [0, 1]
