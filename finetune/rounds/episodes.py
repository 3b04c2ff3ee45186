"""Episodes as the watch wants them: what the log tells of each that was drawn to a version, once it has ended.

Only requests for the adapter by its plain name count: who asked for `tools@8` was not drawn. An episode has ended when
nothing came for `idle`, or when it has lasted six times that; what comes afterwards is not waited for. They are given
in the order in which they began, and the first that has not ended holds back those after it, so that which are seen
does not depend on how they went.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Row, func, select

from finetune.watch.watch import Episode
from server.storage.database import Database
from server.tools.well_formed import judge_calls
from server.traces.tables import episodes, feedback, tool_calls, trace_contents, traces

MAX_IDLES = 6
BATCH = 200


@dataclass(frozen=True, slots=True)
class Arms:
    """Which two versions are compared (None: the base), and with what chance an episode was drawn to the new one."""

    adapter: str
    new: str
    old: str | None
    share_new: float


def newest_trace(database: Database) -> int:
    with database.read() as connection:
        return connection.scalar(select(func.max(traces.c.seq))) or 0


def ended_episodes(
    database: Database, arms: Arms, *, after_seq: int, idle: timedelta, now: datetime
) -> Iterator[Episode]:
    """Those that began after trace `after_seq`, oldest first; their position is that of their first trace."""
    while True:
        found = _starts(database, arms, after_seq)
        for start in found:
            rows = _traces(database, arms, start.episode_seq, start.first)
            after_seq = start.first
            if not rows:  # deleted since
                continue
            is_over = now - rows[-1].created_at >= idle or now - rows[0].created_at >= MAX_IDLES * idle
            if not is_over:
                return
            version = rows[0].version
            if start.first == start.first_of_all and version in (arms.new, arms.old):
                yield _episode(database, arms, rows, is_new=version == arms.new)
        if len(found) < BATCH:
            return


def _starts(database: Database, arms: Arms, after_seq: int) -> Sequence[Any]:
    """Episodes by their first trace after `after_seq` that was drawn, and their first trace ever."""
    of_all = select(func.min(traces.c.seq)).where(traces.c.episode_seq == episodes.c.seq).scalar_subquery()
    drawn = (
        select(traces.c.episode_seq, func.min(traces.c.seq).label("first"))
        .where(traces.c.adapter == arms.adapter, traces.c.seq > after_seq)
        .where(traces.c.requested_model == arms.adapter, traces.c.purpose == "user", traces.c.endpoint != "import")
        .group_by(traces.c.episode_seq)
        .order_by(func.min(traces.c.seq))
        .limit(BATCH)
        .subquery()
    )
    query = select(drawn.c.episode_seq, drawn.c.first, of_all.label("first_of_all")).join(
        episodes, episodes.c.seq == drawn.c.episode_seq
    )
    with database.read() as connection:
        return connection.execute(query.order_by(drawn.c.first)).all()


def _traces(database: Database, arms: Arms, episode_seq: int, first: int) -> Sequence[Row[Any]]:
    query = (
        select(traces, trace_contents.c.request, trace_contents.c.answers)
        .join(trace_contents)
        .where(traces.c.episode_seq == episode_seq, traces.c.seq >= first, traces.c.requested_model == arms.adapter)
        .order_by(traces.c.seq)
    )
    with database.read() as connection:
        return connection.execute(query).all()


def _episode(database: Database, arms: Arms, rows: Sequence[Row[Any]], *, is_new: bool) -> Episode:
    asked = [row for row in rows if row.has_tools and row.status == "ok" and row.endpoint == "chat"]
    seqs = [row.seq for row in rows]
    num_errors, num_retries = _calls(database, seqs)
    durations = [row.duration_seconds for row in rows if row.duration_seconds is not None and row.status == "ok"]
    return Episode(
        position=rows[0].seq,
        is_new=is_new,
        share_new=arms.share_new,
        stratum=_stratum(rows[0].request),
        call_rate=_mean([float(row.has_tool_calls) for row in asked]),
        tool_errors=num_errors / len(asked) if asked else None,
        retries=num_retries / len(asked) if asked else None,
        malformed=_mean([float(_is_malformed(row)) for row in asked]),
        feedback=_score(database, seqs, rows[0].episode_seq),
        latency_seconds=_mean(durations),
    )


def _calls(database: Database, seqs: Sequence[int]) -> tuple[int, int]:
    """Results that report an error, and calls of a tool that had reported one before in this episode."""
    query = select(tool_calls.c.name, tool_calls.c.outcome).where(tool_calls.c.trace_seq.in_(seqs))
    failed: set[str] = set()
    num_errors = num_retries = 0
    with database.read() as connection:
        for call in connection.execute(query.order_by(tool_calls.c.trace_seq, tool_calls.c.position)):
            num_retries += call.name in failed
            if call.outcome == "error":
                num_errors += 1
                failed.add(call.name)
    return num_errors, num_retries


def _score(database: Database, seqs: Sequence[int], episode_seq: int) -> float | None:
    mine = feedback.c.trace_seq.in_(seqs) | (feedback.c.episode_seq == episode_seq)
    with database.read() as connection:
        mean = connection.scalar(select(func.avg(feedback.c.score)).where(mine))
    return None if mean is None else float(mean)


def _is_malformed(row: Row[Any]) -> bool:
    tools = row.request.get("tools") or ()
    return any(
        judge_calls({**answer["message"], "content": answer["message"].get("content") or ""}, tools).num_malformed
        for answer in row.answers
    )


def _stratum(request: dict[str, Any]) -> str:
    """The tools that were offered at first."""
    return " ".join(sorted(tool["function"]["name"] for tool in request.get("tools") or ())) or "no tools"


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
