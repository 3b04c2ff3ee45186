"""When a round begins: enough new traces with a label, so many hours after the last one, or because somebody asked.

Not while a round of the adapter is unfinished (that one is taken up first), and not while its canary is undecided: what
a new candidate would be compared with is not known yet.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import distinct, func, or_, select

from finetune.rounds.round import Round
from finetune.rounds.store import RoundStore
from server.storage.database import Database
from server.traces.tables import episodes, feedback, traces


@dataclass(frozen=True, slots=True)
class Due:
    """A round is to begin; `cause` goes into its row."""

    adapter: str
    cause: str


def due(
    database: Database,
    adapter: str,
    *,
    min_new_traces: int,
    every: timedelta | None,
    keep_unlabelled: bool = False,
    now: datetime,
) -> Due | None:
    """By count or schedule; None: not yet. `keep_unlabelled`: traces that nobody has judged count too."""
    last = _last(RoundStore(database).list(adapter, limit=1))
    num_new = count_new(database, adapter, last, keep_unlabelled=keep_unlabelled)
    what = f"{num_new} new {'' if keep_unlabelled else 'labelled '}traces"
    if num_new >= min_new_traces:
        return Due(adapter, what)
    if every is not None and num_new and (last is None or now - last.created_at >= every):
        return Due(adapter, f"schedule, {what}")
    return None


def count_new(database: Database, adapter: str, last: Round | None, *, keep_unlabelled: bool) -> int:
    """Traces of the training side that somebody has judged, or that have come, since the last round began."""
    after_trace = 0 if last is None else last.last_seq
    after_feedback = 0 if last is None else last.facts["begin"]["last_feedback_seq"]
    judged = select(traces.c.seq).join(
        feedback, or_(feedback.c.trace_seq == traces.c.seq, feedback.c.episode_seq == traces.c.episode_seq)
    )
    judged = judged.where(feedback.c.seq > after_feedback, traces.c.adapter == adapter)
    is_new = traces.c.seq > after_trace
    if not keep_unlabelled:
        is_new &= traces.c.endpoint == "import"
    query = (
        select(func.count(distinct(traces.c.seq)))
        .join(episodes, episodes.c.seq == traces.c.episode_seq)
        .where(traces.c.adapter == adapter, traces.c.purpose == "user", episodes.c.side == "train")
        .where(or_(traces.c.seq.in_(judged), is_new))
    )
    with database.read() as connection:
        return connection.scalar(query) or 0


def _last(found: Sequence[Round]) -> Round | None:
    return found[0] if found else None
