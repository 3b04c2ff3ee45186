"""Runs on shadow versions, off the critical path: a few at a time, a short queue, and nothing while serving is busy.

A job is offered when its live answer is complete, and never waits: it is taken or dropped, and either is counted. What
fails or is cut off disturbs nobody. One event loop. What a job does is not known here (server/openai/shadow.py).
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Generic, Literal, TypeVar

from server.errors import SternaError

logger = logging.getLogger(__name__)

Job = TypeVar("Job")
Outcome = Literal["done", "failed", "dropped"]

MAX_RUNNING = 2
"""Two more sequences are a small part of a busy server's batch, and half a second behind on an idle one."""
MAX_QUEUED = 16
"""A queue bridges a burst. A shadow is a sample: more would only be older when it runs."""


class ShadowRunner(Generic[Job]):
    """`is_busy`: requests wait for a place, so that a shadow would take it from them."""

    def __init__(
        self,
        run: Callable[[Job], Awaitable[None]],
        *,
        is_busy: Callable[[], bool],
        on_end: Callable[[Outcome], None] = lambda outcome: None,
        max_running: int = MAX_RUNNING,
        max_queued: int = MAX_QUEUED,
    ) -> None:
        self._run = run
        self._is_busy = is_busy
        self._on_end = on_end
        self._max_running = max_running
        self._max_queued = max_queued
        self._queue: deque[Job] = deque()
        self._workers: set[asyncio.Task[None]] = set()
        self._is_stopped = False

    def offer(self, job: Job) -> bool:
        """Whether it was taken. Returns at once."""
        if self._is_stopped or self._is_busy() or len(self._queue) >= self._max_queued:
            self._on_end("dropped")
            return False
        self._queue.append(job)
        if len(self._workers) < self._max_running:
            worker = asyncio.create_task(self._work(), name="shadow")
            self._workers.add(worker)
            worker.add_done_callback(self._workers.discard)
        return True

    async def stop(self) -> None:
        """Take nothing more, and cut off what runs; returns when that has ended. The engine stops after this."""
        self._is_stopped = True
        self._drop_queue()
        workers = list(self._workers)
        for worker in workers:
            worker.cancel()
        if workers:
            await asyncio.wait(workers)

    def _drop_queue(self) -> None:
        while self._queue:
            self._queue.popleft()
            self._on_end("dropped")

    async def _work(self) -> None:
        while self._queue:
            if self._is_busy():
                self._drop_queue()
                return
            await self._run_one(self._queue.popleft())

    async def _run_one(self, job: Job) -> None:
        outcome: Outcome = "failed"
        try:
            await self._run(job)
            outcome = "done"
        except SternaError as error:
            logger.debug("a shadow's run failed: %s", error)
        except Exception:  # top of this task: the next job must run whatever this one met
            logger.exception("a shadow's run failed")
        finally:
            self._on_end(outcome)
