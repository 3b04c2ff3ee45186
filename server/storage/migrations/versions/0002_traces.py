"""API keys, traces, episodes and feedback."""

from typing import Any

import sqlalchemy as sa
from alembic import op

from server.storage.types import CompressedJson, SequenceNumber, TokenIds, UtcDateTime

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    _api_keys()
    _episodes()
    _traces()
    _trace_contents()
    _episode_anchors()
    _tool_calls()
    _feedback()
    _trace_tombstones()


def where(condition: str) -> dict[str, Any]:
    return {"sqlite_where": sa.text(condition), "postgresql_where": sa.text(condition)}


def _api_keys() -> None:
    op.create_table(
        "api_keys",
        sa.Column("seq", SequenceNumber, nullable=False),
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("name", sa.String(length=128), nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("scopes", sa.String(length=64), nullable=False),
        sa.Column("trace_policy", sa.String(length=8), nullable=False),
        sa.Column("created_at", UtcDateTime, nullable=False),
        sa.Column("revoked_at", UtcDateTime),
        sa.PrimaryKeyConstraint("seq", name="pk_api_keys"),
        sa.UniqueConstraint("digest", name="uq_api_keys_digest"),
        sa.UniqueConstraint("id", name="uq_api_keys_id"),
        sqlite_autoincrement=True,
    )


def _episodes() -> None:
    op.create_table(
        "episodes",
        sa.Column("seq", SequenceNumber, nullable=False),
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("key_id", sa.String(length=32), nullable=False),
        sa.Column("name", sa.String(length=256)),
        sa.Column("side", sa.String(length=8), nullable=False),
        sa.Column("group_digest", sa.LargeBinary(), nullable=False),
        sa.Column("merged_into", SequenceNumber),
        sa.Column("created_at", UtcDateTime, nullable=False),
        sa.ForeignKeyConstraint(["merged_into"], ["episodes.seq"], name="fk_episodes_merged_into", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("seq", name="pk_episodes"),
        sa.UniqueConstraint("id", name="uq_episodes_id"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_episodes_group_digest", "episodes", ["group_digest"])
    op.create_index("ix_episodes_merged_into", "episodes", ["merged_into"])


def _traces() -> None:
    op.create_table(
        "traces",
        sa.Column("seq", SequenceNumber, nullable=False),
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("response_id", sa.String(length=128)),
        sa.Column("episode_seq", SequenceNumber, nullable=False),
        sa.Column("created_at", UtcDateTime, nullable=False),
        sa.Column("endpoint", sa.String(length=16), nullable=False),
        sa.Column("purpose", sa.String(length=16), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("finish_reason", sa.String(length=32)),
        sa.Column("requested_model", sa.String(length=256), nullable=False),
        sa.Column("adapter", sa.String(length=256)),
        sa.Column("version", sa.String(length=256)),
        sa.Column("key_id", sa.String(length=32), nullable=False),
        sa.Column("user_id", sa.String(length=256)),
        sa.Column("session_id", sa.String(length=256)),
        sa.Column("has_tools", sa.Boolean(), nullable=False),
        sa.Column("has_tool_calls", sa.Boolean(), nullable=False),
        sa.Column("has_tool_error", sa.Boolean(), nullable=False),
        sa.Column("was_constrained", sa.Boolean(), nullable=False),
        sa.Column("has_feedback", sa.Boolean(), nullable=False),
        sa.Column("is_audit", sa.Boolean(), nullable=False),
        sa.Column("is_redacted", sa.Boolean(), nullable=False),
        sa.Column("num_prompt_tokens", sa.Integer(), nullable=False),
        sa.Column("num_completion_tokens", sa.Integer(), nullable=False),
        sa.Column("num_cached_tokens", sa.Integer(), nullable=False),
        sa.Column("ttft_seconds", sa.Float()),
        sa.Column("duration_seconds", sa.Float()),
        sa.Column("num_bytes", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["episode_seq"], ["episodes.seq"], name="fk_traces_episode_seq"),
        sa.PrimaryKeyConstraint("seq", name="pk_traces"),
        sa.UniqueConstraint("id", name="uq_traces_id"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_traces_adapter", "traces", ["adapter", "seq"])
    op.create_index("ix_traces_audit", "traces", ["seq"], **where("is_audit"))
    op.create_index("ix_traces_time", "traces", ["created_at", "seq"])
    op.create_index("ix_traces_episode", "traces", ["episode_seq", "seq"])
    op.create_index("ix_traces_feedback", "traces", ["seq"], **where("has_feedback"))
    op.create_index("ix_traces_key", "traces", ["key_id", "seq"])
    op.create_index("ix_traces_not_ok", "traces", ["seq"], **where("status <> 'ok'"))
    op.create_index("ix_traces_not_user", "traces", ["seq"], **where("purpose <> 'user'"))
    op.create_index("ix_traces_response_id", "traces", ["response_id"])
    op.create_index("ix_traces_tool_calls", "traces", ["seq"], **where("has_tool_calls"))
    op.create_index("ix_traces_tool_errors", "traces", ["seq"], **where("has_tool_error"))
    op.create_index("ix_traces_user", "traces", ["user_id", "seq"], **where("user_id IS NOT NULL"))
    op.create_index("ix_traces_version", "traces", ["version", "seq"])


def _trace_contents() -> None:
    op.create_table(
        "trace_contents",
        sa.Column("trace_seq", SequenceNumber, autoincrement=False, nullable=False),
        sa.Column("request", CompressedJson(), nullable=False),
        sa.Column("answers", CompressedJson(), nullable=False),
        sa.Column("details", CompressedJson(), nullable=False),
        sa.Column("prompt_token_ids", TokenIds()),
        sa.Column("completion_token_ids", TokenIds()),
        sa.ForeignKeyConstraint(["trace_seq"], ["traces.seq"], name="fk_trace_contents_trace_seq", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("trace_seq", name="pk_trace_contents"),
    )


def _episode_anchors() -> None:
    op.create_table(
        "episode_anchors",
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("trace_seq", SequenceNumber, autoincrement=False, nullable=False),
        sa.ForeignKeyConstraint(["trace_seq"], ["traces.seq"], name="fk_episode_anchors_trace_seq", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("digest", "trace_seq", name="pk_episode_anchors"),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_episode_anchors_trace_seq", "episode_anchors", ["trace_seq"])


def _tool_calls() -> None:
    op.create_table(
        "tool_calls",
        sa.Column("trace_seq", SequenceNumber, autoincrement=False, nullable=False),
        sa.Column("position", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("call_id", sa.String(length=256), nullable=False),
        sa.Column("name", sa.String(length=256), nullable=False),
        sa.Column("outcome", sa.String(length=8)),
        sa.Column("result_trace_seq", SequenceNumber),
        sa.ForeignKeyConstraint(["trace_seq"], ["traces.seq"], name="fk_tool_calls_trace_seq", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("trace_seq", "position", name="pk_tool_calls"),
    )
    op.create_index("ix_tool_calls_call_id", "tool_calls", ["call_id"])


def _feedback() -> None:
    op.create_table(
        "feedback",
        sa.Column("seq", SequenceNumber, nullable=False),
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("trace_seq", SequenceNumber),
        sa.Column("episode_seq", SequenceNumber),
        sa.Column("key_id", sa.String(length=32), nullable=False),
        sa.Column("created_at", UtcDateTime, nullable=False),
        sa.Column("source", sa.String(length=16), nullable=False),
        sa.Column("score", sa.Float()),
        sa.Column("label", sa.String(length=256)),
        sa.Column("comment", sa.Text()),
        sa.Column("correction", CompressedJson()),
        sa.Column("claim_digest", sa.LargeBinary(), nullable=False),
        sa.Column("body_digest", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["episode_seq"], ["episodes.seq"], name="fk_feedback_episode_seq", ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["trace_seq"], ["traces.seq"], name="fk_feedback_trace_seq", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("seq", name="pk_feedback"),
        sa.UniqueConstraint("claim_digest", name="uq_feedback_claim_digest"),
        sa.UniqueConstraint("id", name="uq_feedback_id"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_feedback_episode_seq", "feedback", ["episode_seq"])
    op.create_index("ix_feedback_trace_seq", "feedback", ["trace_seq"])


def _trace_tombstones() -> None:
    op.create_table(
        "trace_tombstones",
        sa.Column("seq", SequenceNumber, autoincrement=False, nullable=False),
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("deleted_at", UtcDateTime, nullable=False),
        sa.Column("reason", sa.String(length=16), nullable=False),
        sa.PrimaryKeyConstraint("seq", name="pk_trace_tombstones"),
        sa.UniqueConstraint("id", name="uq_trace_tombstones_id"),
    )
    op.create_index("ix_trace_tombstones_deleted_at", "trace_tombstones", ["deleted_at"])
