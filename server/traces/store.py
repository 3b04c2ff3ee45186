"""Writes traces: a list of records in one transaction, with the episodes, anchors and tool calls that come with them.

Redaction and packing happen before the transaction begins, so that the database is locked for as short as possible.
All servers' writers take turns, so sequence numbers appear in order: who has read up to n misses nothing below it.
Synchronous; called by the log's thread (log.py), by import, and by tests.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection, bindparam, insert, select, text, update

from server.storage.database import Database
from server.storage.metadata import secrets_table
from server.storage.types import pack_json, pack_token_ids
from server.traces.episode_rows import ensure_episodes
from server.traces.episodes import answer_anchors
from server.traces.record import TraceRecord
from server.traces.redaction import Redactor
from server.traces.sides import DEFAULT_HELD_OUT_SHARE, SideDraw
from server.traces.tables import MAX_NAME_LENGTH, episode_anchors, tool_calls, trace_contents, trace_tombstones, traces
from server.traces.text import short

LOCK = "traces"
"""The name under which everything that writes or deletes traces takes turns."""
ROW_BYTES = 600
"""About what a trace takes besides its contents: its narrow row, indexes and anchors (measured on SQLite)."""

# Built once: building a statement takes longer than running it.
_INSERT_TRACES = insert(traces).returning(traces.c.id, traces.c.seq, sort_by_parameter_order=True)
_INSERT_CONTENTS = insert(trace_contents)
_INSERT_ANCHORS = insert(episode_anchors)
_INSERT_CALLS = insert(tool_calls)

ToolOutcome = Callable[[str | None, str | None, bool], None]
"""(adapter, version, is an error) of a tool call whose result came back. Called on the writer's thread."""


@dataclass(frozen=True, slots=True)
class _Prepared:
    record: TraceRecord
    row: dict[str, Any]
    contents: dict[str, Any]
    anchors: frozenset[bytes]
    calls: Sequence[dict[str, Any]]


class TraceStore:
    def __init__(
        self,
        database: Database,
        *,
        redactor: Redactor | None = None,
        held_out_share: float = DEFAULT_HELD_OUT_SHARE,
        audit_share: float = 0.0,
        on_tool_outcome: ToolOutcome | None = None,
    ) -> None:
        """`audit_share`: of traces marked at random for labelling, so that some labels do not depend on the answer."""
        self.database = database
        self.redactor = redactor or Redactor()
        self._draw = SideDraw(database.secret("episode_sides"), held_out_share)
        self._audit_secret = database.secret("audit")
        self._audit_limit = audit_share * 2**64
        self._on_tool_outcome = on_tool_outcome

    def write(self, records: Sequence[TraceRecord], *, is_retry: bool = False) -> list[str]:
        """All or none; returns the ids that were written. `is_retry`: leaves out what an earlier try did commit."""
        prepared = [self._prepare(record) for record in records]
        outcomes: list[tuple[str | None, str | None, bool]] = []
        with self.database.write(lock=LOCK) as connection:
            if is_retry:
                known = _known_ids(connection, [one.record.id for one in prepared])
                prepared = [one for one in prepared if one.record.id not in known]
            if prepared:
                seqs = self._insert(connection, prepared)
                for one in prepared:
                    outcomes += _join_results(connection, one.record, seqs[one.record.id], self._stored_call_id)
        if self._on_tool_outcome is not None:
            for outcome in outcomes:
                self._on_tool_outcome(*outcome)
        return [one.record.id for one in prepared]

    def mark_failed(self, ids: Sequence[str]) -> None:
        """Those whose client was told so, perhaps while (or although) they were committed as answered."""
        with self.database.write(lock=LOCK) as connection:
            answered = traces.c.id.in_(ids), traces.c.status == "ok"
            connection.execute(update(traces).where(*answered).values(status="failed"))

    def probe(self) -> None:
        """Raises DatabaseUnavailableError when nothing can be written now; writes one small row to find out."""
        with self.database.write() as connection:
            fresh = self.database.insert(secrets_table).values(name="probe", value=b"")
            connection.execute(fresh.on_conflict_do_update(index_elements=["name"], set_={"value": b""}))

    def ping(self) -> None:
        """Raises DatabaseUnavailableError when the database is plainly gone. Cheap enough for every second."""
        with self.database.read() as connection:
            connection.execute(text("SELECT 1"))

    def _insert(self, connection: Connection, prepared: Sequence[_Prepared]) -> dict[str, int]:
        roots, judged = ensure_episodes(connection, [one.record for one in prepared], self._draw)
        episode_seqs = [roots[one.record.episode.id] for one in prepared]
        rows = [
            one.row | {"episode_seq": seq, "has_feedback": seq in judged}
            for one, seq in zip(prepared, episode_seqs, strict=True)
        ]
        seqs: dict[str, int] = {row[0]: row[1] for row in connection.execute(_INSERT_TRACES, rows)}
        by_seq = [(seqs[one.record.id], one) for one in prepared]
        connection.execute(_INSERT_CONTENTS, [{"trace_seq": seq} | one.contents for seq, one in by_seq])
        anchors = [{"trace_seq": seq, "digest": digest} for seq, one in by_seq for digest in one.anchors]
        if anchors:
            connection.execute(_INSERT_ANCHORS, anchors)
        calls = [{"trace_seq": seq} | call for seq, one in by_seq for call in one.calls]
        if calls:
            connection.execute(_INSERT_CALLS, calls)
        return seqs

    def _prepare(self, record: TraceRecord) -> _Prepared:
        said = {
            "request": _without_nulls(
                messages=record.messages,
                prompt=record.prompt,
                tools=record.tools,
                tool_choice=record.tool_choice,
                response_format=record.response_format,
                sampling=record.sampling or None,
            ),
            "answers": [
                _without_nulls(
                    message=answer.message,
                    finish_reason=answer.finish_reason,
                    num_tokens=None if answer.token_ids is None else len(answer.token_ids),
                )
                for answer in record.answers
            ],
            "client": _without_nulls(
                user_id=record.user_id, session_id=record.session_id, metadata=record.metadata, error=record.error
            ),
            "names": {"episode": record.episode.name, "model": record.requested_model},
        }
        said, is_redacted = self.redactor.redact(said)
        if is_redacted:
            names, episode = said["names"], replace(record.episode, name=said["names"]["episode"])
            record = replace(record, episode=episode, requested_model=names["model"])
            if record.prompt is not None:
                said["request"]["prompt"] = _without_token_ids(said["request"]["prompt"])
        client = said["client"]
        details = client | _without_nulls(
            model=record.model,
            model_digest=record.model_digest,
            template_digest=record.template_digest,
            tokenizer_digest=record.tokenizer_digest,
            version_digest=record.version_digest,
        )
        completion_ids = [answer.token_ids for answer in record.answers if answer.token_ids is not None]
        has_ids = not is_redacted and record.prompt_token_ids is not None
        contents = {
            "request": pack_json(said["request"]),
            "answers": pack_json(said["answers"]),
            "details": pack_json(details),
            "prompt_token_ids": pack_token_ids(record.prompt_token_ids or ()) if has_ids else None,
            "completion_token_ids": (
                pack_token_ids([token for ids in completion_ids for token in ids])
                if completion_ids and not is_redacted
                else None
            ),
        }
        calls = self._calls(record)
        row = self._row(record, client) | {
            "has_tool_calls": bool(calls),
            "is_redacted": is_redacted,
            "num_bytes": ROW_BYTES + sum(len(blob) for blob in contents.values() if blob is not None),
        }
        anchors = answer_anchors(record) if record.episode.is_stitched else ()
        return _Prepared(record, row, contents, frozenset(anchor.digest for anchor in anchors), calls)

    def _calls(self, record: TraceRecord) -> list[dict[str, Any]]:
        calls = [call for answer in record.answers for call in answer.message.get("tool_calls") or ()]
        return [
            {
                "position": position,
                "call_id": self._stored_call_id(str(call["id"])),
                "name": short(str(self.redactor.redact(call["function"]["name"])[0]), MAX_NAME_LENGTH),
            }
            for position, call in enumerate(calls)
        ]

    def _stored_call_id(self, call_id: str) -> str:
        """By which a result finds its call. One that a rule matches goes by its digest, so that ids stay apart."""
        if self.redactor.redact(call_id)[1]:
            digest = hashlib.blake2b(call_id.encode(errors="replace"), key=self._audit_secret, digest_size=16)
            return "redacted-" + digest.hexdigest()
        return short(call_id, MAX_NAME_LENGTH)

    def _row(self, record: TraceRecord, client: dict[str, Any]) -> dict[str, Any]:
        audit = hashlib.blake2b(record.id.encode(), key=self._audit_secret, digest_size=8).digest()
        return {
            "id": record.id,
            "response_id": short(record.response_id, 128),
            "created_at": record.created_at,
            "endpoint": record.endpoint,
            "purpose": record.purpose,
            "status": record.status,
            "finish_reason": short(record.answers[0].finish_reason if record.answers else None, 32),
            "requested_model": short(record.requested_model, MAX_NAME_LENGTH),
            "adapter": record.adapter,
            "version": record.version,
            "key_id": record.key_id,
            "user_id": short(client.get("user_id"), MAX_NAME_LENGTH),
            "session_id": short(client.get("session_id"), MAX_NAME_LENGTH),
            "has_tools": bool(record.tools),
            "was_constrained": record.was_constrained,
            "has_tool_error": False,
            "is_audit": record.purpose == "user" and int.from_bytes(audit, "big") < self._audit_limit,
            "num_prompt_tokens": record.num_prompt_tokens,
            "num_completion_tokens": record.num_completion_tokens,
            "num_cached_tokens": record.num_cached_tokens,
            "ttft_seconds": record.ttft_seconds,
            "duration_seconds": record.duration_seconds,
        }


def _without_nulls(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _without_token_ids(prompt: Any) -> Any:
    """A completion's prompt, or its prompts, as far as they are text."""
    if isinstance(prompt, str):
        return prompt
    if all(isinstance(token, int) for token in prompt):
        return "[redacted:token_ids]"
    return [_without_token_ids(one) for one in prompt]


def _known_ids(connection: Connection, ids: Sequence[str]) -> set[str]:
    """Also those that were deleted: an import that is repeated does not bring back what somebody wanted gone."""
    columns = (traces.c.id, trace_tombstones.c.id)
    return {one for column in columns for one in connection.scalars(select(column).where(column.in_(ids)))}


def _join_results(
    connection: Connection, record: TraceRecord, seq: int, stored_call_id: Callable[[str], str]
) -> list[tuple[str | None, str | None, bool]]:
    """The results in the request become the outcomes of the calls that caused them; a call's first result stays."""
    if not record.episode.tool_results or not record.episode.is_stitched:
        return []
    is_error = {stored_call_id(call_id): error for call_id, error in reversed(record.episode.tool_results)}
    query = (
        select(tool_calls.c.trace_seq, tool_calls.c.position, tool_calls.c.call_id, traces.c.adapter, traces.c.version)
        .join(traces)
        .where(
            tool_calls.c.call_id.in_(is_error),
            tool_calls.c.outcome.is_(None),
            traces.c.key_id == record.key_id,
            traces.c.endpoint == "chat",  # imported histories have ids that somebody else made up
        )
    )
    open_calls = connection.execute(query).all()
    if open_calls:
        statement = (
            update(tool_calls)
            .where(tool_calls.c.trace_seq == bindparam("caller"), tool_calls.c.position == bindparam("place"))
            .values(outcome=bindparam("found"), result_trace_seq=seq)
        )
        connection.execute(
            statement,
            [
                {"caller": caller, "place": place, "found": "error" if is_error[call_id] else "ok"}
                for caller, place, call_id, _, _ in open_calls
            ],
        )
    failed = {caller for caller, _, call_id, _, _ in open_calls if is_error[call_id]}
    if failed:
        connection.execute(update(traces).where(traces.c.seq.in_(failed)).values(has_tool_error=True))
    return [(adapter, version, is_error[call_id]) for _, _, call_id, adapter, version in open_calls]
