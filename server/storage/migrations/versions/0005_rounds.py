"""Training rounds, the leases under which they run, watched versions, and how far each webhook has been told."""

import sqlalchemy as sa
from alembic import op

from server.storage.types import CompressedJson, UtcDateTime

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.create_table(
        "rounds",
        sa.Column("adapter", sa.String(64), nullable=False),
        sa.Column("number", sa.Integer, nullable=False, autoincrement=False),
        sa.Column("phase", sa.String(16), nullable=False),
        sa.Column("result", sa.String(24)),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("cause", sa.Text, nullable=False),
        sa.Column("parent", sa.Integer),
        sa.Column("base_digest", sa.String(80), nullable=False),
        sa.Column("settings", CompressedJson(), nullable=False),
        sa.Column("last_seq", sa.BigInteger, nullable=False),
        sa.Column("snapshot", sa.String(80)),
        sa.Column("version", sa.Integer),
        sa.Column("facts", CompressedJson(), nullable=False),
        sa.Column("decision", CompressedJson()),
        sa.Column("num_restarts", sa.Integer, nullable=False),
        sa.Column("created_at", UtcDateTime, nullable=False),
        sa.Column("updated_at", UtcDateTime, nullable=False),
        sa.PrimaryKeyConstraint("adapter", "number", name="pk_rounds"),
    )
    is_unfinished = sa.text("result IS NULL")
    op.create_index(
        "uq_rounds_unfinished",
        "rounds",
        ["adapter"],
        unique=True,
        sqlite_where=is_unfinished,
        postgresql_where=is_unfinished,
    )
    op.create_table(
        "finetune_leases",
        sa.Column("name", sa.String(80), nullable=False),
        sa.Column("token", sa.BigInteger, nullable=False),
        sa.Column("holder", sa.Text, nullable=False),
        sa.Column("beat", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_finetune_leases"),
    )
    op.create_table(
        "finetune_watches",
        sa.Column("adapter", sa.String(64), nullable=False),
        sa.Column("version", sa.Integer, nullable=False, autoincrement=False),
        sa.Column("state", CompressedJson(), nullable=False),
        sa.Column("is_over", sa.Boolean, nullable=False),
        sa.Column("updated_at", UtcDateTime, nullable=False),
        sa.PrimaryKeyConstraint("adapter", "version", name="pk_finetune_watches"),
    )
    op.create_table(
        "finetune_webhook_places",
        sa.Column("endpoint", sa.String(80), nullable=False),
        sa.Column("last_change", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("endpoint", name="pk_finetune_webhook_places"),
    )
