"""The tables of traces, episodes and feedback.

`traces` is narrow, so that a million rows can be listed and filtered; what was said is in `trace_contents`, compressed,
one row a trace. Order is `seq`, which the database hands out in commit order (writers take turns), never the clock.
`key_id` is '' where no key was needed, so that "same key" is one comparison. A deleted trace leaves its id behind in
`trace_tombstones` and nothing else: all other rows go with it.
"""

from sqlalchemy import Boolean, Column, Float, ForeignKey, Index, Integer, LargeBinary, String, Table, Text, text

from server.storage.metadata import metadata
from server.storage.types import CompressedJson, SequenceNumber, TokenIds, UtcDateTime

MAX_NAME_LENGTH = 256
"""Of ids and names that clients choose (user, session, episode); longer ones are cut, see text.py."""

episodes = Table(
    "episodes",
    metadata,
    Column("seq", SequenceNumber, primary_key=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("key_id", String(32), nullable=False),
    Column("name", String(MAX_NAME_LENGTH)),  # the client's own, from X-Sterna-Episode
    Column("side", String(8), nullable=False),
    Column("group_digest", LargeBinary, nullable=False),
    Column("merged_into", SequenceNumber, ForeignKey("episodes.seq", ondelete="CASCADE"), index=True),
    Column("created_at", UtcDateTime, nullable=False),
    Index("ix_episodes_group", "group_digest", "seq"),
    sqlite_autoincrement=True,
)

traces = Table(
    "traces",
    metadata,
    Column("seq", SequenceNumber, primary_key=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("response_id", String(128), index=True),
    Column("episode_seq", SequenceNumber, ForeignKey("episodes.seq"), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("endpoint", String(16), nullable=False),
    Column("purpose", String(16), nullable=False),
    Column("status", String(16), nullable=False),
    Column("finish_reason", String(32)),
    Column("requested_model", String(MAX_NAME_LENGTH), nullable=False),
    Column("adapter", String(MAX_NAME_LENGTH)),
    Column("version", String(MAX_NAME_LENGTH)),
    Column("key_id", String(32), nullable=False),
    Column("user_id", String(MAX_NAME_LENGTH)),
    Column("session_id", String(MAX_NAME_LENGTH)),
    Column("has_tools", Boolean, nullable=False),
    Column("has_tool_calls", Boolean, nullable=False),
    Column("has_tool_error", Boolean, nullable=False),  # a call of this trace came back as an error, later
    Column("was_constrained", Boolean, nullable=False),
    Column("has_feedback", Boolean, nullable=False),
    Column("is_audit", Boolean, nullable=False),
    Column("is_redacted", Boolean, nullable=False),
    Column("num_prompt_tokens", Integer, nullable=False),
    Column("num_completion_tokens", Integer, nullable=False),
    Column("num_cached_tokens", Integer, nullable=False),
    Column("ttft_seconds", Float),
    Column("duration_seconds", Float),
    Column("num_bytes", Integer, nullable=False),
    sqlite_autoincrement=True,
)

# One index a filter of `sterna traces list`, each in the list's order. What is rare has a partial index: it costs the
# usual trace nothing. queries.py spells their conditions literally and tells SQLite which one to use.
TRACE_INDEXES = (
    Index("ix_traces_episode", traces.c.episode_seq, traces.c.seq),
    Index("ix_traces_time", traces.c.created_at, traces.c.seq),
    Index("ix_traces_key", traces.c.key_id, traces.c.seq),
    Index("ix_traces_adapter", traces.c.adapter, traces.c.seq),
    Index("ix_traces_version", traces.c.version, traces.c.seq),
    *(
        Index(name, *columns, sqlite_where=text(condition), postgresql_where=text(condition))
        for name, columns, condition in (
            ("ix_traces_user", (traces.c.user_id, traces.c.seq), "user_id IS NOT NULL"),
            ("ix_traces_not_ok", (traces.c.seq,), "status <> 'ok'"),
            ("ix_traces_not_user", (traces.c.seq,), "purpose <> 'user'"),
            ("ix_traces_tool_calls", (traces.c.seq,), "has_tool_calls"),
            ("ix_traces_tool_errors", (traces.c.seq,), "has_tool_error"),
            ("ix_traces_feedback", (traces.c.seq,), "has_feedback"),
            ("ix_traces_audit", (traces.c.seq,), "is_audit"),
        )
    ),
)


def _trace_key(*, primary: bool = False) -> Column[int]:
    reference = ForeignKey("traces.seq", ondelete="CASCADE")
    return Column("trace_seq", SequenceNumber, reference, primary_key=primary, autoincrement=False, nullable=False)


trace_contents = Table(
    "trace_contents",
    metadata,
    _trace_key(primary=True),
    Column("request", CompressedJson, nullable=False),
    Column("answers", CompressedJson, nullable=False),
    Column("details", CompressedJson, nullable=False),
    Column("prompt_token_ids", TokenIds),
    Column("completion_token_ids", TokenIds),
)

episode_anchors = Table(
    "episode_anchors",
    metadata,
    Column("digest", LargeBinary, primary_key=True),
    _trace_key(primary=True),
    Index("ix_episode_anchors_trace_seq", "trace_seq"),
    sqlite_with_rowid=False,
)
"""What a later request shows when it continues a trace: see digests.py."""

tool_calls = Table(
    "tool_calls",
    metadata,
    _trace_key(primary=True),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("call_id", String(MAX_NAME_LENGTH), nullable=False, index=True),
    Column("name", String(MAX_NAME_LENGTH), nullable=False),
    Column("outcome", String(8)),  # NULL: no result was ever sent back
    Column("result_trace_seq", SequenceNumber),
)

feedback = Table(
    "feedback",
    metadata,
    Column("seq", SequenceNumber, primary_key=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("trace_seq", SequenceNumber, ForeignKey("traces.seq", ondelete="CASCADE"), index=True),
    Column("episode_seq", SequenceNumber, ForeignKey("episodes.seq", ondelete="CASCADE"), index=True),
    Column("key_id", String(32), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("source", String(16), nullable=False),
    Column("score", Float),
    Column("label", String(MAX_NAME_LENGTH)),
    Column("comment", Text),
    Column("correction", CompressedJson),
    Column("claim_digest", LargeBinary, nullable=False, unique=True),
    Column("body_digest", LargeBinary, nullable=False),
    sqlite_autoincrement=True,
)
"""`claim_digest` makes a repetition the same row: see feedback.py. One of `trace_seq`, `episode_seq` is set."""

trace_tombstones = Table(
    "trace_tombstones",
    metadata,
    Column("seq", SequenceNumber, primary_key=True, autoincrement=False),
    Column("id", String(64), nullable=False, unique=True),
    Column("deleted_at", UtcDateTime, nullable=False, index=True),
    Column("reason", String(16), nullable=False),
)

snapshots = Table(
    "snapshots",
    metadata,
    Column("seq", SequenceNumber, primary_key=True),
    Column("digest", String(80), nullable=False, unique=True),
    Column("adapter", String(MAX_NAME_LENGTH), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    sqlite_autoincrement=True,
)
"""The frozen datasets of training rounds (finetune/dataset/snapshot.py)."""

snapshot_traces = Table(
    "snapshot_traces",
    metadata,
    # No foreign key to traces: who saw a trace must be known after it was deleted. Its number is never used again.
    Column("trace_seq", SequenceNumber, primary_key=True, autoincrement=False),
    Column("snapshot_seq", SequenceNumber, ForeignKey("snapshots.seq"), primary_key=True, autoincrement=False),
    Column("part", String(8), nullable=False),
    Index("ix_snapshot_traces_snapshot_seq", "snapshot_seq"),
    sqlite_with_rowid=False,
)

snapshot_versions = Table(
    "snapshot_versions",
    metadata,
    Column("adapter", String(64), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("snapshot_seq", SequenceNumber, ForeignKey("snapshots.seq"), primary_key=True, autoincrement=False),
    Index("ix_snapshot_versions_snapshot_seq", "snapshot_seq"),
    sqlite_with_rowid=False,
)
"""Which snapshots a version learned from: its own, and all of the version that it was warm-started from."""
