"""The trace log as the server uses it: records go in on the event loop, one thread of its own writes them.

    log.check()                  # before the first byte: raises when a durable log could not keep the answer
    await log.append(record)     # before the last byte: returns when the record is on disk
    log.submit(record)           # nobody waits (the client left): kept until it can be written

Durable: `append` returns after the commit, or raises, and the record is kept as that of a failed answer. Relaxed: it
returns at once; what finds the queue full is dropped and counted, and nothing fails. Group commit: whatever is queued
when the thread comes round goes into one transaction. A broken database is tried again with growing pauses until it is
back; records that nobody waits for are kept meanwhile. Not here: what a record looks like in the database (store.py).
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from server.errors import ServerUnavailableError
from server.storage.errors import DatabaseUnavailableError
from server.traces.episodes import Episodes
from server.traces.log_stats import CommitClock, LogStats
from server.traces.record import TraceRecord
from server.traces.store import TraceStore

logger = logging.getLogger(__name__)

MAX_QUEUE = 4096
"""Records of about 10 KB: some 40 MB. At a thousand requests a second, four seconds of a stalled disk."""
MAX_QUEUE_BYTES = 256 * 2**20
"""A request may have 16 MB: so much of what was said, and of its token ids, waits at most."""
TOKEN_BYTES = 36
"""A number in a list of Python's."""
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
    num_bytes: int
    was_tried: bool = False
    refusal: str | None = None
    """What was told whoever waited: the trace is that of a failed answer."""

    def as_written(self) -> TraceRecord:
        return self.record if self.refusal is None else replace(self.record, status="failed", error=self.refusal)


class TraceLog:
    """`start` and `stop` by whoever builds the process; the rest on the event loop."""

    def __init__(
        self,
        store: TraceStore,
        episodes: Episodes,
        *,
        is_durable: bool = True,
        max_queue: int = MAX_QUEUE,
        max_queue_bytes: int = MAX_QUEUE_BYTES,
    ) -> None:
        self._store = store
        self._episodes = episodes
        self._is_durable = is_durable
        self._max_queue = max_queue
        self._max_queue_bytes = max_queue_bytes
        self._queued_bytes = 0
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
                self._num_dropped += sum(entry.refusal is None for entry in self._queue)
                self._queue.clear()

    def check(self) -> None:
        """Raises ServerUnavailableError when a request that starts now could not be logged. Never waits."""
        if not self._is_durable:
            return
        fault = self._present_fault()
        if fault is not None:
            raise ServerUnavailableError(f"The trace log cannot be written, so nothing is answered: {fault}.")
        if self._is_full():
            raise ServerUnavailableError("The trace log is behind: its queue is full.")

    async def append(self, record: TraceRecord) -> None:
        """Durable: raises ServerUnavailableError when the record could not be written. Relaxed: same as `submit`."""
        if not self._is_durable:
            self.submit(record)
            return
        entry = _Entry(record, asyncio.get_running_loop().create_future(), _num_bytes(record))
        if not self._put(entry):
            self._num_failed += 1
            raise ServerUnavailableError("The trace log cannot take the answer: its queue is full.")
        assert entry.waiter is not None
        try:
            async with asyncio.timeout(2 * STALL_SECONDS):  # a failure is told by the writer, a silence by nobody
                await entry.waiter
        except TimeoutError:
            reason = "The trace log cannot be written: the database does not answer."
            if self._refuse([entry], reason):  # otherwise it was written at the last moment
                raise ServerUnavailableError(reason) from None

    def submit(self, record: TraceRecord) -> None:
        """Never fails and never waits; dropped and counted when the queue is full."""
        if not self._put(_Entry(record, None, _num_bytes(record))):
            self._num_dropped += 1

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
            if self._is_stopping or self._is_full():
                return False
            self._queue.append(entry)
            self._queued_bytes += entry.num_bytes
            self._changed.notify()
            return True

    def _is_full(self) -> bool:
        return len(self._queue) >= self._max_queue or self._queued_bytes >= self._max_queue_bytes

    def _refuse(self, entries: Sequence[_Entry], reason: str) -> list[_Entry]:
        """Those still in the queue become traces of failed answers, and those who waited for them are to be told."""
        with self._changed:
            queued = set(map(id, self._queue))
            refused = [entry for entry in entries if id(entry) in queued and entry.refusal is None]
            for entry in refused:
                entry.refusal = reason
            self._num_failed += len(refused)
        return refused

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
        return self._is_stopping or any(_is_awaited(entry) for entry in self._queue)

    def _serve(self, batch: list[_Entry]) -> None:
        """The batch stays in the queue until it is done, so that a full queue counts it."""
        try:
            if batch:
                self._commit(batch)
            elif self._fault is None:
                self._store.ping()
            else:
                self._store.probe()
            self._done(batch)
        except DatabaseUnavailableError as error:
            self._broke(batch, str(error))
        else:
            self._mended()

    def _commit(self, batch: list[_Entry]) -> None:
        start = time.perf_counter()
        try:
            written = self._store.write(
                [entry.as_written() for entry in batch], is_retry=any(entry.was_tried for entry in batch)
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
                self._store.write([entry.as_written()], is_retry=True)
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
                self._done([entry])

    def _done(self, entries: Sequence[_Entry]) -> None:
        """They are written; those that were refused meanwhile (or by a commit that was done all the same) as failed."""
        with self._changed:
            refused = [entry for entry in entries if entry.refusal is not None]
            good = [entry for entry in entries if entry.refusal is None]
            self._take(good)
        _settle(good, None)
        if refused:
            self._store.mark_failed([entry.record.id for entry in refused])
            self._take(refused)

    def _broke(self, batch: list[_Entry], reason: str) -> None:
        if self._fault is None:
            logger.error("the trace log is broken: %s", reason)
        else:
            self._pause_seconds = min(2 * self._pause_seconds, LAST_PAUSE_SECONDS)
        self._fault = reason
        for entry in batch:
            entry.was_tried = True
        told = f"The trace log cannot be written: {reason}."
        _settle(self._refuse([entry for entry in batch if _is_awaited(entry)], told), ServerUnavailableError(told))

    def _mended(self) -> None:
        if self._fault is not None:
            logger.warning("the trace log is written again")
        self._fault = None
        self._pause_seconds = FIRST_PAUSE_SECONDS

    def _take(self, done: Sequence[_Entry]) -> int:
        """Out of the queue, those that are still in it; returns how many were."""
        gone = set(map(id, done))
        with self._changed:
            taken = [entry for entry in self._queue if id(entry) in gone]
            self._queue = deque(entry for entry in self._queue if id(entry) not in gone)
            self._queued_bytes -= sum(entry.num_bytes for entry in taken)
            return len(taken)


def _is_awaited(entry: _Entry) -> bool:
    """False: nobody waited, the client left, or it was told that the answer failed."""
    return entry.waiter is not None and not entry.waiter.done() and entry.refusal is None


def _num_bytes(record: TraceRecord) -> int:
    ids = [record.prompt_token_ids, *(answer.token_ids for answer in record.answers)]
    return record.num_request_bytes + TOKEN_BYTES * sum(len(one) for one in ids if one is not None)


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
