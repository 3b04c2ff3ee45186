"""Keeps the log within its age and size: the oldest traces go first, as if somebody had deleted them.

A step of the clock must not empty the log. So an age is believed only when the wall clock has moved as much as the
monotonic clock did since the last pass; a pass that finds a jump (and the first one after start) deletes nothing by age
and waits for the next. Not here: when passes happen (every few minutes, on a thread).
"""

import logging
import time
from collections.abc import Callable
from datetime import datetime, timedelta

from sqlalchemy import func, select, true

from server.storage.clock import Clock, utc_now
from server.storage.database import Database
from server.traces.deletion import BATCH, TraceDeletion
from server.traces.tables import traces

logger = logging.getLogger(__name__)

CLOCK_TOLERANCE = timedelta(minutes=1)
"""Between two passes; NTP slews by half a millisecond a second at most."""


class Retention:
    """None keeps for ever. Synchronous: call it from a thread, one pass at a time."""

    def __init__(
        self,
        database: Database,
        *,
        max_age: timedelta | None = None,
        max_bytes: int | None = None,
        clock: Clock = utc_now,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database = database
        self._deletion = TraceDeletion(database, clock=clock)
        self._max_age = max_age
        self._max_bytes = max_bytes
        self._clock = clock
        self._monotonic = monotonic
        self._last: tuple[datetime, float] | None = None

    def run_once(self) -> int:
        """One pass; returns how many traces went. Raises DatabaseUnavailableError."""
        num_deleted = self._by_age() + self._by_size()
        if num_deleted:
            logger.info("%d traces were older or more than the log keeps", num_deleted)
        self._database.tidy()
        return num_deleted

    def _by_age(self) -> int:
        now = self._steady_now()
        if self._max_age is None or now is None:
            return 0
        is_old = traces.c.created_at < now - self._max_age
        with self._database.read() as connection:  # the few that are new since the last pass, not the whole table
            query = select(func.max(traces.c.seq + 0)).where(is_old)
            last = connection.scalar(query.with_hint(traces, "INDEXED BY ix_traces_time", "sqlite"))
        return 0 if last is None else len(self._deletion.delete_where([is_old, traces.c.seq <= last], "age"))

    def _by_size(self) -> int:
        if self._max_bytes is None:
            return 0
        num_deleted = 0
        while (excess := self._total_bytes() - self._max_bytes) > 0:
            with self._database.read() as connection:
                oldest = connection.scalars(select(traces.c.num_bytes).order_by(traces.c.seq).limit(50 * BATCH)).all()
            num_over, size = 0, 0
            while num_over < len(oldest) and size < excess:
                size += oldest[num_over]
                num_over += 1
            num_deleted += len(self._deletion.delete_where([true()], "size", limit=num_over))
        return num_deleted

    def _total_bytes(self) -> int:
        with self._database.read() as connection:
            return connection.scalar(select(func.sum(traces.c.num_bytes))) or 0

    def _steady_now(self) -> datetime | None:
        """The wall clock's time, or None when it cannot be relied on in this pass."""
        now, ticks = self._clock(), self._monotonic()
        last, self._last = self._last, (now, ticks)
        if last is None:
            return None
        moved, elapsed = now - last[0], timedelta(seconds=ticks - last[1])
        if abs(moved - elapsed) > CLOCK_TOLERANCE:
            logger.warning("the clock jumped by %s; no trace is deleted for its age in this pass", moved - elapsed)
            return None
        return now
