"""Reading the log: a filtered list page by page, one trace with everything, totals.

Pages go by sequence number (newest first): a page costs the same wherever it is and whatever is written meanwhile.
Which index a list uses is in filters.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, case, func, select

from server.errors import InvalidRequestError
from server.storage.database import Database
from server.traces.errors import TraceNotFoundError
from server.traces.feedback import FeedbackStore, StoredFeedback
from server.traces.filters import TraceFilter, conditions, rows_in_time, sqlite_index
from server.traces.tables import MAX_NAME_LENGTH, episodes, feedback, tool_calls, trace_contents, traces
from server.traces.text import short
from server.traces.viewer import Viewer

MAX_PAGE = 1000


@dataclass(frozen=True, slots=True)
class TraceSummary:
    """One row of the list."""

    seq: int
    id: str
    response_id: str | None
    episode_id: str
    side: str
    created_at: datetime
    endpoint: str
    purpose: str
    status: str
    finish_reason: str | None
    requested_model: str
    adapter: str | None
    version: str | None
    key_id: str
    user_id: str | None
    session_id: str | None
    has_tools: bool
    has_tool_calls: bool
    has_tool_error: bool
    was_constrained: bool
    has_feedback: bool
    is_audit: bool
    is_redacted: bool
    num_prompt_tokens: int
    num_completion_tokens: int
    num_cached_tokens: int
    ttft_seconds: float | None
    duration_seconds: float | None
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Page:
    traces: Sequence[TraceSummary]
    next_before: int | None
    """Pass as `before` for the next page; None: this was the last."""


@dataclass(frozen=True, slots=True)
class ToolCallOutcome:
    call_id: str
    name: str
    outcome: str | None
    """"ok", "error", or None: no result came back."""


@dataclass(frozen=True, slots=True)
class FullTrace:
    summary: TraceSummary
    request: dict[str, Any]
    """messages or prompt, tools, tool_choice, response_format, sampling: what was given."""
    answers: list[dict[str, Any]]
    """message, finish_reason, num_tokens of each choice."""
    details: dict[str, Any]
    """model, digests, client metadata, error."""
    prompt_token_ids: list[int] | None
    completion_token_ids: list[list[int]] | None
    """One list a choice."""
    tool_calls: list[ToolCallOutcome]
    feedback: list[StoredFeedback]


_SUMMARY: list[Any] = [
    {"episode_id": episodes.c.id.label("episode_id"), "side": episodes.c.side}.get(field.name, traces.c.get(field.name))
    for field in fields(TraceSummary)
]


class TraceQueries:
    """Synchronous: call it from a thread."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._feedback = FeedbackStore(database)

    def list(self, viewer: Viewer, where: TraceFilter, *, limit: int = 50, before: int | None = None) -> Page:
        if not 1 <= limit <= MAX_PAGE:
            raise InvalidRequestError(f"a page has 1 to {MAX_PAGE} traces, not {limit}", param="limit")
        if before is not None and not 0 < before < 2**63:
            raise InvalidRequestError(f"'before' is the next_before of a page, not {before}", param="before")
        # Two steps: which rows, from the index alone where that is enough, and then those rows.
        seqs = select(traces.c.seq).where(*conditions(viewer, where)).order_by(traces.c.seq.desc()).limit(limit + 1)
        if before is not None:
            seqs = seqs.where(traces.c.seq < before)
        with self._database.read() as connection:
            ends = rows_in_time(connection, where)
            if ends is not None:
                seqs = seqs.where(traces.c.seq.between(*ends))
            index = sqlite_index(where)
            if index is not None:
                seqs = seqs.with_hint(traces, f"INDEXED BY {index}", "sqlite")
            found_seqs = connection.scalars(seqs).all()
            query = select(*_SUMMARY).select_from(traces.join(episodes)).where(traces.c.seq.in_(found_seqs))
            rows = connection.execute(query.order_by(traces.c.seq.desc())).all()
        found = [_summary(row) for row in rows[:limit]]
        return Page(found, found[-1].seq if len(rows) > limit else None)

    def show(self, viewer: Viewer, trace_id: str) -> FullTrace:
        """Raises TraceNotFoundError."""
        query = (
            select(*_SUMMARY, trace_contents)
            .select_from(traces.join(episodes).join(trace_contents))
            .where(traces.c.id == short(trace_id, MAX_NAME_LENGTH), *viewer.sees(traces))
        )
        with self._database.read() as connection:
            row = connection.execute(query).one_or_none()
            if row is None:
                raise TraceNotFoundError(f"There is no trace with the id '{trace_id[:80]}'.")
            calls = select(tool_calls.c.call_id, tool_calls.c.name, tool_calls.c.outcome)
            calls = calls.where(tool_calls.c.trace_seq == row.seq).order_by(tool_calls.c.position)
            outcomes = [ToolCallOutcome(*call) for call in connection.execute(calls)]
        given = self._feedback.list_for_trace(viewer, trace_id)
        return full_trace(row, outcomes, given)

    def stats(self, viewer: Viewer, where: TraceFilter) -> dict[str, Any]:
        """Totals over what the filter matches; reads every such row, about a second a million."""
        matching = select(traces).where(*conditions(viewer, where)).subquery()
        count = func.count()
        columns = matching.c
        totals = select(
            count.label("num_traces"),
            func.coalesce(func.sum(columns.num_bytes), 0).label("num_bytes"),
            func.coalesce(func.sum(columns.num_prompt_tokens), 0).label("num_prompt_tokens"),
            func.coalesce(func.sum(columns.num_completion_tokens), 0).label("num_completion_tokens"),
            *(
                func.coalesce(func.sum(case((columns[name], 1), else_=0)), 0).label(f"num_{name}")
                for name in ("has_tools", "has_tool_calls", "has_feedback", "is_audit", "is_redacted")
            ),
            func.min(columns.created_at).label("oldest"),
            func.max(columns.created_at).label("newest"),
        )
        with self._database.read() as connection:

            def counted(query: Any) -> dict[str, int]:
                return {str(name): number for name, number in connection.execute(query)}

            def by(column: ColumnElement[Any]) -> dict[str, int]:
                return counted(select(column, count).select_from(matching).group_by(column))

            outcomes = select(func.coalesce(tool_calls.c.outcome, "none"), count).join(
                matching, tool_calls.c.trace_seq == columns.seq
            )
            sides = select(episodes.c.side, func.count(columns.episode_seq.distinct())).join(
                matching, columns.episode_seq == episodes.c.seq
            )
            scores = select(func.count(), func.avg(feedback.c.score)).join(
                matching, feedback.c.trace_seq == columns.seq
            )
            scores = scores.where(*viewer.sees(feedback))
            num_feedback, mean_score = connection.execute(scores).one()
            return {
                **connection.execute(totals).one()._mapping,
                "by_status": by(columns.status),
                "by_version": by(func.coalesce(columns.version, columns.adapter, "base")),
                "by_purpose": by(columns.purpose),
                "tool_calls": counted(outcomes.group_by(tool_calls.c.outcome)),
                "episodes": counted(sides.group_by(episodes.c.side)),
                "num_feedback": num_feedback,
                "mean_score": mean_score,
            }


def full_trace(row: Any, outcomes: list[ToolCallOutcome], given: list[StoredFeedback]) -> FullTrace:
    """`row`: the summary's columns and those of `trace_contents`."""
    return FullTrace(
        _summary(row),
        row.request,
        row.answers,
        row.details,
        row.prompt_token_ids,
        _by_choice(row.answers, row.completion_token_ids),
        outcomes,
        given,
    )


def _by_choice(answers: list[dict[str, Any]], token_ids: list[int] | None) -> list[list[int]] | None:
    """The ids are stored in one row after the other."""
    if token_ids is None:
        return None
    lists, start = [], 0
    for answer in answers:
        end = start + answer.get("num_tokens", 0)
        lists.append(token_ids[start:end])
        start = end
    return lists


def _summary(row: Any) -> TraceSummary:
    return TraceSummary(*row[: len(_SUMMARY)])
