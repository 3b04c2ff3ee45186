"""Traces and feedback as JSON objects: what /v1/traces and `sterna traces --json` say. Times are ISO 8601 in UTC."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

from server.openai.protocol.chunks import Body
from server.traces.feedback import StoredFeedback
from server.traces.lineage import Sighting
from server.traces.queries import FullTrace, Page, TraceSummary


def page_body(page: Page) -> Body:
    return {
        "object": "list",
        "data": [summary_body(trace) for trace in page.traces],
        "next_before": page.next_before,
    }


def summary_body(trace: TraceSummary) -> Body:
    return {"object": "trace", **_plain(asdict(trace))}


def trace_body(trace: FullTrace) -> Body:
    return summary_body(trace.summary) | {
        "request": trace.request,
        "answers": trace.answers,
        "details": trace.details,
        "prompt_token_ids": trace.prompt_token_ids,
        "completion_token_ids": trace.completion_token_ids,
        "tool_calls": [asdict(call) for call in trace.tool_calls],
        "feedback": [feedback_body(given) for given in trace.feedback],
    }


def stats_body(totals: Mapping[str, Any]) -> Body:
    return {"object": "traces.stats", **_plain(totals)}


def deletion_body(num_deleted: int, versions: Sequence[str]) -> Body:
    """`versions`: those that were trained or tested on what is gone."""
    return {"object": "traces.deleted", "num_deleted": num_deleted, "versions": list(versions)}


def lineage_body(trace_id: str, sightings: Sequence[Sighting]) -> Body:
    return {"object": "trace.lineage", "trace_id": trace_id, "data": [asdict(one) for one in sightings]}


def feedback_body(stored: StoredFeedback) -> Body:
    given = stored.feedback
    return {
        "object": "feedback",
        "id": stored.id,
        "trace_id": stored.trace_id,
        "episode_id": stored.episode_id,
        "key_id": stored.key_id,
        "created_at": stored.created_at.isoformat(),
        "source": given.source,
        "score": given.score,
        "correction": given.correction,
        "label": given.label,
        "comment": given.comment,
    }


def taken_body(stored: StoredFeedback) -> Body:
    """The answer to who gave it."""
    return feedback_body(stored) | {"is_new": stored.is_new}


def _plain(values: Mapping[str, Any]) -> Body:
    """Moments as text."""
    return {name: value.isoformat() if isinstance(value, datetime) else value for name, value in values.items()}
