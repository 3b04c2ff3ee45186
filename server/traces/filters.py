"""What `sterna traces list` and its relatives can filter by, as SQL conditions on `traces`.

Every filter has an index in the list's order (tables.py). The conditions of partial indexes are spelled out literally,
or the planners would not see that they fit; SQLite, which guesses badly without statistics, is told which to use.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import cast

from sqlalchemy import ColumnElement, Connection, func, select, text

from server.traces.episodes import named_id
from server.traces.record import Purpose, Status
from server.traces.tables import MAX_NAME_LENGTH, episodes, traces
from server.traces.text import short
from server.traces.viewer import Viewer


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceFilter:
    """None: any. Several conditions must all hold."""

    trace_id: str | None = None
    adapter: str | None = None
    version: str | None = None
    key_id: str | None = None
    user_id: str | None = None
    episode_id: str | None = None
    """Ours, or the name that the key (`key_id`, else the viewer's) has for it."""
    purpose: Purpose | None = None
    status: Status | None = None
    since: datetime | None = None
    until: datetime | None = None
    has_tool_calls: bool | None = None
    has_tool_error: bool | None = None
    has_feedback: bool | None = None
    is_audit: bool | None = None

    @property
    def is_empty(self) -> bool:
        return self == TraceFilter()


def conditions(viewer: Viewer, where: TraceFilter) -> list[ColumnElement[bool]]:
    """For a query on `traces`."""
    found = viewer.sees(traces)
    if where.trace_id is not None:
        found.append(traces.c.id == short(where.trace_id, MAX_NAME_LENGTH))
    for name in ("adapter", "version", "key_id", "user_id"):
        value = getattr(where, name)
        if value is not None:
            found.append(traces.c[name] == short(value, MAX_NAME_LENGTH))
    if where.user_id is not None:
        found.append(_literal("traces.user_id IS NOT NULL"))
    for name, usual in (("status", "ok"), ("purpose", "user")):
        value = getattr(where, name)
        if value == usual:
            found.append(traces.c[name] == value)
        elif value is not None:
            # Not a plain "=": SQLite would put its constant into the other condition and lose sight of the index.
            found += [_literal(f"traces.{name} <> '{usual}'"), traces.c[name] + "" == value]
    for name in ("has_tool_calls", "has_tool_error", "has_feedback", "is_audit"):
        value = getattr(where, name)
        if value is not None:
            found.append(_literal(f"traces.{name}" if value else f"NOT traces.{name}"))
    found += _in_time(where)
    if where.episode_id is not None:
        found.append(traces.c.episode_seq == episode_seq(viewer, where.episode_id, key_id=where.key_id))
    return found


def episode_seq(viewer: Viewer, wanted: str, *, key_id: str | None = None) -> ColumnElement[int]:
    """The row of an episode that the viewer sees, by our id or by its key's own name; merged ones at their goal.

    `key_id`: whose name it is; None: the viewer's.
    """
    found = select(func.coalesce(episodes.c.merged_into, episodes.c.seq)).where(*viewer.sees(episodes))
    by_id = found.where(episodes.c.id == short(wanted, MAX_NAME_LENGTH)).scalar_subquery()
    by_name = found.where(
        episodes.c.id == named_id(viewer.key_id if key_id is None else key_id, wanted)
    ).scalar_subquery()
    return func.coalesce(by_id, by_name)


def sqlite_index(where: TraceFilter) -> str | None:
    """The one that leaves the fewest rows, by what the filters mean; None: SQLite may choose."""
    if where.trace_id is not None:
        return None
    if where.episode_id is not None:
        return "ix_traces_episode"
    if where.user_id is not None:
        return "ix_traces_user"
    if where.status not in (None, "ok"):
        return "ix_traces_not_ok"
    for name, index in (("has_tool_error", "tool_errors"), ("is_audit", "audit"), ("has_feedback", "feedback")):
        if getattr(where, name):
            return f"ix_traces_{index}"
    if where.purpose not in (None, "user"):
        return "ix_traces_not_user"
    if where.has_tool_calls and not (where.key_id or where.version or where.adapter):
        return "ix_traces_tool_calls"
    return None


def rows_in_time(connection: Connection, where: TraceFilter) -> tuple[int, int] | None:
    """The lowest and highest sequence number within `since` and `until`; None: they would not restrict much.

    Without them a list whose other filters match many rows outside of that time passes all of these. Time and number
    run together, but a clock may have been stepped, so neither is derived from the other: what is found here is exact,
    and only whether it pays is estimated from the times of the first and last trace. Half a million entries of the
    index are read in some 20 ms.
    """
    if where.since is None and where.until is None:
        return None
    oldest = connection.scalar(select(func.min(traces.c.created_at)))
    newest = connection.scalar(select(func.max(traces.c.created_at)))
    if oldest is None or newest is None:
        return None
    begin, end = max(where.since or oldest, oldest), min(where.until or newest, newest)
    if end - begin > (newest - oldest) / 2:
        return None
    # "+ 0": else the planners may look for the lowest number from the start of the log, row by row.
    ends = select(func.min(traces.c.seq + 0), func.max(traces.c.seq + 0)).where(*_in_time(where))
    first, last = connection.execute(ends.with_hint(traces, "INDEXED BY ix_traces_time", "sqlite")).one()
    return (1, 0) if first is None else (first, last)


def _in_time(where: TraceFilter) -> list[ColumnElement[bool]]:
    found = []
    if where.since is not None:
        found.append(traces.c.created_at >= where.since)
    if where.until is not None:
        found.append(traces.c.created_at < where.until)
    return found


def _literal(condition: str) -> ColumnElement[bool]:
    """A condition of a partial index, word for word."""
    return cast(ColumnElement[bool], text(condition))
