"""Lineage: the snapshots of training rounds, the traces in each, and the versions that learned from them."""

import sqlalchemy as sa
from alembic import op

from server.storage.types import SequenceNumber, UtcDateTime

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_table(
        "snapshots",
        sa.Column("seq", SequenceNumber, nullable=False),
        sa.Column("digest", sa.String(80), nullable=False),
        sa.Column("adapter", sa.String(256), nullable=False),
        sa.Column("created_at", UtcDateTime, nullable=False),
        sa.PrimaryKeyConstraint("seq", name="pk_snapshots"),
        sa.UniqueConstraint("digest", name="uq_snapshots_digest"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "snapshot_traces",
        sa.Column("trace_seq", SequenceNumber, nullable=False, autoincrement=False),
        sa.Column("snapshot_seq", SequenceNumber, nullable=False, autoincrement=False),
        sa.Column("part", sa.String(8), nullable=False),
        sa.PrimaryKeyConstraint("trace_seq", "snapshot_seq", name="pk_snapshot_traces"),
        sa.ForeignKeyConstraint(["snapshot_seq"], ["snapshots.seq"], name="fk_snapshot_traces_snapshot_seq"),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_snapshot_traces_snapshot_seq", "snapshot_traces", ["snapshot_seq"])
    op.create_table(
        "snapshot_versions",
        sa.Column("adapter", sa.String(64), nullable=False),
        sa.Column("number", sa.Integer, nullable=False, autoincrement=False),
        sa.Column("snapshot_seq", SequenceNumber, nullable=False, autoincrement=False),
        sa.PrimaryKeyConstraint("adapter", "number", "snapshot_seq", name="pk_snapshot_versions"),
        sa.ForeignKeyConstraint(["snapshot_seq"], ["snapshots.seq"], name="fk_snapshot_versions_snapshot_seq"),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_snapshot_versions_snapshot_seq", "snapshot_versions", ["snapshot_seq"])
