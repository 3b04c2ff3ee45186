"""The trace log as the server uses it: records go in on the event loop, one thread of its own writes them.

    log.check()                  # before the first byte: raises when a durable log could not keep the answer
    await log.append(record)     # before the last byte: returns when the record is on disk
    log.submit(record)           # nobody waits (the client left): kept until it can be written

Durable: `append` returns after the commit, or raises and the record counts as not written. Relaxed: it returns at once;
what finds the queue full is dropped and counted, and nothing fails. Group commit: whatever is queued when the thread
comes round goes into one transaction. A broken database is tried again with growing pauses until it is back; records
that nobody waits for are kept meanwhile. Not here: what a record looks like in the database (store.py).
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from server.errors import ServerUnavailableError
from server.storage.errors import DatabaseUnavailableError
from server.traces.episodes import Episodes
from server.traces.log_stats import CommitClock, LogStats
from server.traces.record import TraceRecord
from server.traces.store import TraceStore

logger = logging.getLogger(__name__)

MAX_QUEUE = 4096
"""Records of about 10 KB: some 40 MB. At a thousand requests a second, four seconds of a stalled disk."""
PING_SECONDS = 1.0
"""How often an idle log looks whether its database is still there, so that `check` knows before a request does."""
STALL_SECONDS = 10.0
"""A commit takes milliseconds, and a lock is waited for 5 s: a database that is silent for longer counts as broken."""
FIRST_PAUSE_SECONDS, LAST_PAUSE_SECONDS = 0.1, 5.0
"""Between two tries on a broken database; doubled each time."""


@dataclass(slots=True, eq=False)
class _Entry:
    record: TraceRecord
    waiter: "asyncio.Future[None] | None"
    was_tried: bool = False


class TraceLog:
    """`start` and `stop` by whoever builds the process; the rest on the event loop."""

    def __init__(
        self, store: TraceStore, episodes: Episodes, *, is_durable: bool = True, max_queue: int = MAX_QUEUE
    ) -> None:
        self._store = store
        self._episodes = episodes
        self._is_durable = is_durable
        self._max_queue = max_queue
        self._queue: deque[_Entry] = deque()
        self._changed = threading.Condition()
        self._is_stopping = False
        self._fault: str | None = None
        self._pause_seconds = FIRST_PAUSE_SECONDS
        self._busy_since: float | None = None
        self._commits = CommitClock()
        self._num_dropped = 0
        self._num_failed = 0
        self._thread = threading.Thread(target=self._run, name="trace-log", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Writes what is queued and ends. What a broken database does not take now is dropped, counted and logged."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        self._thread.join()
        with self._changed:
            if self._queue:
                logger.error("%d traces were not written: %s", len(self._queue), self._fault)
                self._num_dropped += len(self._queue)
                self._queue.clear()

    def check(self) -> None:
        """Raises ServerUnavailableError when a request that starts now could not be logged. Never waits."""
        if not self._is_durable:
            return
        fault = self._present_fault()
        if fault is not None:
            raise ServerUnavailableError(f"The trace log cannot be written, so nothing is answered: {fault}.")
        if len(self._queue) >= self._max_queue:
            raise ServerUnavailableError("The trace log is behind: its queue is full.")

    async def append(self, record: TraceRecord) -> None:
        """Durable: raises ServerUnavailableError when the record could not be written. Relaxed: same as `submit`."""
        if not self._is_durable:
            self.submit(record)
            return
        waiter = asyncio.get_running_loop().create_future()
        if not self._put(_Entry(record, waiter)):
            raise ServerUnavailableError("The trace log cannot take the answer: its queue is full.")
        try:
            async with asyncio.timeout(2 * STALL_SECONDS):  # a failure is told by the writer, a silence by nobody
                await waiter
        except TimeoutError:
            raise ServerUnavailableError("The trace log cannot be written: the database does not answer.") from None

    def submit(self, record: TraceRecord) -> None:
        """Never fails and never waits; dropped and counted when the queue is full."""
        self._put(_Entry(record, None))

    def stats(self) -> LogStats:
        """For /metrics."""
        return LogStats(
            num_queued=len(self._queue),
            num_dropped=self._num_dropped,
            num_failed=self._num_failed,
            fault=self._present_fault(),
            commits=self._commits.snapshot(),
        )

    def _put(self, entry: _Entry) -> bool:
        self._episodes.remember(entry.record)
        with self._changed:
            if self._is_stopping or len(self._queue) >= self._max_queue:
                self._num_dropped += 1
                return False
            self._queue.append(entry)
            self._changed.notify()
            return True

    def _present_fault(self) -> str | None:
        since = self._busy_since
        if self._fault is None and since is not None and time.monotonic() - since > STALL_SECONDS:
            return f"the database has not answered for {STALL_SECONDS:g} s"
        return self._fault

    # -- the writer's thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            batch, is_last = self._next_batch()
            self._busy_since = time.monotonic()
            try:
                self._serve(batch)
            except Exception as error:
                logger.exception("the trace log failed on %d traces", len(batch))
                self._num_failed += self._take(batch)
                _settle(batch, ServerUnavailableError(f"The trace could not be written: {type(error).__name__}."))
            self._busy_since = None
            if is_last:
                return

    def _next_batch(self) -> tuple[list[_Entry], bool]:
        """Everything queued, once there is something to do: a fresh record, the end of a pause, an idle second."""
        with self._changed:
            if self._fault is None:
                self._changed.wait_for(lambda: self._queue or self._is_stopping, timeout=PING_SECONDS)
            else:
                self._changed.wait_for(self._is_awaited, timeout=self._pause_seconds)
            return list(self._queue), self._is_stopping

    def _is_awaited(self) -> bool:
        return self._is_stopping or any(entry.waiter is not None for entry in self._queue)

    def _serve(self, batch: list[_Entry]) -> None:
        """The batch stays in the queue until it is done, so that a full queue counts it."""
        try:
            if batch:
                self._commit(batch)
            elif self._fault is None:
                self._store.ping()
            else:
                self._store.probe()
        except DatabaseUnavailableError as error:
            self._broke(batch, str(error))
        else:
            self._take(batch)
            _settle(batch, None)
            self._mended()

    def _commit(self, batch: list[_Entry]) -> None:
        start = time.perf_counter()
        try:
            written = self._store.write(
                [entry.record for entry in batch], is_retry=any(entry.was_tried for entry in batch)
            )
        except DatabaseUnavailableError:
            raise
        except Exception:
            logger.exception("a transaction of %d traces failed; writing them one by one", len(batch))
            self._commit_singly(batch)
        else:
            self._commits.add(time.perf_counter() - start, len(written))

    def _commit_singly(self, batch: Sequence[_Entry]) -> None:
        for entry in batch:
            start = time.perf_counter()
            try:
                self._store.write([entry.record], is_retry=True)
            except DatabaseUnavailableError:
                raise
            except Exception as error:
                logger.exception("trace %s cannot be stored", entry.record.id)
                self._num_failed += 1
                reason = f"The trace could not be written: {type(error).__name__}."
                self._take([entry])
                _settle([entry], ServerUnavailableError(reason))
            else:
                self._commits.add(time.perf_counter() - start, 1)
                self._take([entry])
                _settle([entry], None)

    def _broke(self, batch: list[_Entry], reason: str) -> None:
        if self._fault is None:
            logger.error("the trace log is broken: %s", reason)
        else:
            self._pause_seconds = min(2 * self._pause_seconds, LAST_PAUSE_SECONDS)
        self._fault = reason
        awaited = [entry for entry in batch if entry.waiter is not None]
        for entry in batch:
            entry.was_tried = True
        self._num_failed += self._take(awaited)
        _settle(awaited, ServerUnavailableError(f"The trace log cannot be written: {reason}."))

    def _mended(self) -> None:
        if self._fault is not None:
            logger.warning("the trace log is written again")
        self._fault = None
        self._pause_seconds = FIRST_PAUSE_SECONDS

    def _take(self, done: Sequence[_Entry]) -> int:
        """Out of the queue, those that are still in it; returns how many were."""
        gone = set(map(id, done))
        with self._changed:
            before = len(self._queue)
            self._queue = deque(entry for entry in self._queue if id(entry) not in gone)
            return before - len(self._queue)


def _settle(entries: Sequence[_Entry], error: ServerUnavailableError | None) -> None:
    """Wakes those who wait: one call into each event loop, not one an entry."""
    waiters: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for entry in entries:
        if entry.waiter is not None:
            waiters.setdefault(entry.waiter.get_loop(), []).append(entry.waiter)
    for loop, futures in waiters.items():
        if not loop.is_closed():
            loop.call_soon_threadsafe(_finish, futures, error)


def _finish(futures: Sequence["asyncio.Future[None]"], error: ServerUnavailableError | None) -> None:
    for future in futures:
        if future.done():
            continue  # its request was cancelled meanwhile
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)
