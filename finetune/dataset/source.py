"""Reads one adapter's traces from the log for a snapshot: newest first, in batches, with all feedback on them.

Only `purpose` user and one side of the split; what was imported for the adapter is among them. Not here: which of them
are learned from (filters.py).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, func, or_, select

from server.storage.database import Database
from server.traces.feedback import Feedback
from server.traces.record import Side
from server.traces.tables import episodes, feedback, trace_contents, traces

BATCH = 200
"""Traces a query: some megabytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedTrace:
    """One trace, as far as learning from it goes."""

    seq: int
    id: str
    created_at: datetime
    endpoint: str
    status: str
    version: str | None
    key_id: str
    side: Side
    group: str
    """Hex digest of the episode's first user message and tools: episodes with the same question share it."""
    is_redacted: bool
    is_audit: bool
    has_tool_error: bool
    request: Mapping[str, Any]
    answers: Sequence[Mapping[str, Any]]
    template_digest: str | None
    tokenizer_digest: str | None
    prompt_ids: Sequence[int] | None
    completion_ids: Sequence[Sequence[int]] | None
    """One list an answer."""
    feedback: Sequence[Feedback]
    """On the trace, oldest first."""
    episode_feedback: Sequence[Feedback]
    """On its whole episode, oldest first."""


def last_seq(database: Database) -> int:
    """Of the newest trace: what comes later belongs to the next snapshot. 0: there is none."""
    with database.read() as connection:
        return connection.scalar(select(func.max(traces.c.seq))) or 0


def has_traces(database: Database, adapter: str) -> bool:
    with database.read() as connection:
        return connection.scalar(select(traces.c.seq).where(traces.c.adapter == adapter).limit(1)) is not None


def count_traces(database: Database, adapter: str, side: Side, *, until_seq: int) -> int:
    with database.read() as connection:
        query = select(func.count()).select_from(traces.join(episodes))
        return connection.scalar(query.where(*_of(adapter, side), traces.c.seq <= until_seq)) or 0


def count_by_key(database: Database, adapter: str, side: Side, *, until_seq: int) -> dict[str, int]:
    query = select(traces.c.key_id, func.count()).select_from(traces.join(episodes)).group_by(traces.c.key_id)
    with database.read() as connection:
        rows = connection.execute(query.where(*_of(adapter, side), traces.c.seq <= until_seq))
        return {str(key): int(count) for key, count in rows}


def read_traces(
    database: Database, adapter: str, side: Side, *, until_seq: int, until_feedback: int | None = None
) -> Iterator[LoggedTrace]:
    """Newest first. A trace that is deleted meanwhile is left out; `until_feedback`: the newest that counts."""
    before = until_seq + 1
    while True:
        where = and_(*_of(adapter, side), traces.c.seq < before)
        with database.read() as connection:
            found = _read(connection, where, newest_first=BATCH, until_feedback=until_feedback)
        yield from found
        if len(found) < BATCH:
            return
        before = found[-1].seq


def read_by_seq(
    database: Database, seqs: Sequence[int], *, until_feedback: int | None = None
) -> dict[int, LoggedTrace]:
    """Those of the traces that are still there, whatever side they are on by now."""
    found: dict[int, LoggedTrace] = {}
    for start in range(0, len(seqs), BATCH):
        with database.read() as connection:
            rows = _read(connection, traces.c.seq.in_(seqs[start : start + BATCH]), until_feedback=until_feedback)
        found |= {row.seq: row for row in rows}
    return found


def existing_seqs(database: Database, seqs: Sequence[int]) -> set[int]:
    """Those whose traces are still there."""
    found: set[int] = set()
    for start in range(0, len(seqs), BATCH):
        query = select(traces.c.seq).where(traces.c.seq.in_(seqs[start : start + BATCH]))
        with database.read() as connection:
            found.update(connection.scalars(query))
    return found


def _of(adapter: str, side: Side) -> list[ColumnElement[bool]]:
    return [traces.c.adapter == adapter, traces.c.purpose == "user", episodes.c.side == side]


def _read(
    connection: Connection,
    where: ColumnElement[bool],
    *,
    newest_first: int | None = None,
    until_feedback: int | None = None,
) -> list[LoggedTrace]:
    query = (
        select(traces, episodes.c.side, episodes.c.group_digest, trace_contents)
        .select_from(traces.join(episodes).join(trace_contents))
        .where(where)
        .order_by(traces.c.seq.desc())
    )
    if newest_first is not None:
        # SQLite guesses badly without statistics: it would pass every trace of every adapter.
        query = query.limit(newest_first).with_hint(traces, "INDEXED BY ix_traces_adapter", "sqlite")
    rows = connection.execute(query).all()
    given = or_(
        feedback.c.trace_seq.in_([row.seq for row in rows]),
        feedback.c.episode_seq.in_({row.episode_seq for row in rows}),
    )
    if until_feedback is not None:
        given = and_(given, feedback.c.seq <= until_feedback)
    of_trace: dict[int, list[Feedback]] = {}
    of_episode: dict[int, list[Feedback]] = {}
    for row in connection.execute(select(feedback).where(given).order_by(feedback.c.seq)):
        mine = of_episode if row.trace_seq is None else of_trace
        mine.setdefault(row.episode_seq if row.trace_seq is None else row.trace_seq, []).append(
            Feedback(
                source=row.source, score=row.score, correction=row.correction, label=row.label, comment=row.comment
            )
        )
    return [_trace(row, of_trace.get(row.seq, ()), of_episode.get(row.episode_seq, ())) for row in rows]


def _trace(row: Any, given: Sequence[Feedback], episode_feedback: Sequence[Feedback]) -> LoggedTrace:
    return LoggedTrace(
        seq=row.seq,
        id=row.id,
        created_at=row.created_at,
        endpoint=row.endpoint,
        status=row.status,
        version=row.version,
        key_id=row.key_id,
        side=row.side,
        group=bytes(row.group_digest).hex(),
        is_redacted=row.is_redacted,
        is_audit=row.is_audit,
        has_tool_error=row.has_tool_error,
        request=row.request,
        answers=row.answers,
        template_digest=row.details.get("template_digest"),
        tokenizer_digest=row.details.get("tokenizer_digest"),
        prompt_ids=row.prompt_token_ids,
        completion_ids=_by_answer(row.answers, row.completion_token_ids),
        feedback=given,
        episode_feedback=episode_feedback,
    )


def _by_answer(answers: Sequence[Mapping[str, Any]], token_ids: Sequence[int] | None) -> list[list[int]] | None:
    """The ids are stored in one row after the other."""
    if token_ids is None:
        return None
    lists, start = [], 0
    for answer in answers:
        end = start + answer.get("num_tokens", 0)
        lists.append(list(token_ids[start:end]))
        start = end
    return lists
