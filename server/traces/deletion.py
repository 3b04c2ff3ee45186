"""Deletes traces: by user, key, episode, age, or whatever else the filter can say.

Content, feedback, anchors and tool calls go; an episode goes with its last trace. What stays is a tombstone: id, time
and reason, so that snapshots leave the trace out and the versions that were trained on it can be listed. In batches, so
that the log never waits long; on SQLite the freed pages are overwritten (secure_delete).
"""

from collections.abc import Callable, Sequence
from typing import Literal

from sqlalchemy import ColumnElement, delete, exists, func, insert, select

from server.errors import InvalidRequestError
from server.storage.clock import Clock, utc_now
from server.storage.database import Database
from server.traces.filters import TraceFilter, conditions
from server.traces.store import LOCK
from server.traces.tables import episodes, trace_tombstones, traces
from server.traces.viewer import Viewer

Reason = Literal["requested", "age", "size"]
BATCH = 200
"""Traces a transaction deletes: a few tens of milliseconds, which the next commit waits for at most."""


class TraceDeletion:
    """Synchronous: call it from a thread."""

    def __init__(self, database: Database, *, clock: Clock = utc_now) -> None:
        self._database = database
        self._clock = clock

    def delete(
        self, viewer: Viewer, where: TraceFilter, *, on_progress: Callable[[int], object] = lambda num_deleted: None
    ) -> list[str]:
        """The ids of what was deleted: all that matched when it began. An empty filter is refused.

        `on_progress` hears how many more are gone, after each of the transactions.
        """
        if where.is_empty:
            raise InvalidRequestError("say which traces to delete: a user, a key, an episode, an age or another filter")
        deleted = self.delete_where(conditions(viewer, where), "requested", on_progress=on_progress)
        self._database.tidy()
        return deleted

    def delete_where(
        self,
        matching: list[ColumnElement[bool]],
        reason: Reason,
        *,
        limit: int | None = None,
        on_progress: Callable[[int], object] = lambda num_deleted: None,
    ) -> list[str]:
        """Oldest first, at most `limit`. Finding them may take long, so it happens outside of the log's lock."""
        with self._database.read() as connection:
            last = connection.scalar(select(func.max(traces.c.seq))) or 0
        query = select(traces.c.seq).where(*matching).order_by(traces.c.seq)
        deleted: list[str] = []
        first = 0
        while limit is None or len(deleted) < limit:
            size = BATCH if limit is None else min(BATCH, limit - len(deleted))
            with self._database.read() as connection:
                seqs = connection.scalars(query.where(traces.c.seq.between(first, last)).limit(size)).all()
            batch = self._delete_batch(seqs, reason) if seqs else []
            deleted += batch
            on_progress(len(batch))
            if len(seqs) < size:
                break
            first = seqs[-1] + 1
        return deleted

    def _delete_batch(self, seqs: Sequence[int], reason: Reason) -> list[str]:
        query = select(traces.c.seq, traces.c.id, traces.c.episode_seq).where(traces.c.seq.in_(seqs))
        with self._database.write(lock=LOCK) as connection:
            rows = connection.execute(query.order_by(traces.c.seq)).all()
            if not rows:  # somebody else was faster
                return []
            now = self._clock()
            stones = [{"seq": row.seq, "id": row.id, "deleted_at": now, "reason": reason} for row in rows]
            connection.execute(insert(trace_tombstones), stones)
            connection.execute(delete(traces).where(traces.c.seq.in_([row.seq for row in rows])))  # the rest cascades
            is_left = exists().where(traces.c.episode_seq == episodes.c.seq)
            touched = episodes.c.seq.in_({row.episode_seq for row in rows})
            connection.execute(delete(episodes).where(touched, ~is_left))
        return [row.id for row in rows]
