"""The adapter registry: adapters, their versions, every change, and imports under way."""

import sqlalchemy as sa
from alembic import op

from server.storage.types import UtcDateTime

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "adapters",
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("change", sa.BigInteger, nullable=False),
        sa.Column("canary_share", sa.Float, nullable=False),
        sa.Column("shadow_share", sa.Float, nullable=False),
        sa.Column("hold_back_share", sa.Float, nullable=False),
        sa.Column("created_at", UtcDateTime, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_adapters"),
    )
    op.create_table(
        "adapter_versions",
        sa.Column("adapter", sa.String(64), nullable=False),
        sa.Column("number", sa.Integer, nullable=False, autoincrement=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("digest", sa.String(80), nullable=False),
        sa.Column("base_digest", sa.String(80), nullable=False),
        sa.Column("rank", sa.Integer, nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("memory_bytes", sa.BigInteger, nullable=False),
        sa.Column("origin", sa.Text, nullable=False),
        sa.Column("parent", sa.String(80)),
        sa.Column("directory", sa.Text, nullable=False),
        sa.Column("created_at", UtcDateTime, nullable=False),
        sa.Column("predecessor", sa.Integer),
        sa.Column("state_change", sa.BigInteger, nullable=False),
        sa.Column("is_pinned", sa.Boolean, nullable=False),
        sa.Column("is_deleted", sa.Boolean, nullable=False),
        sa.PrimaryKeyConstraint("adapter", "number", name="pk_adapter_versions"),
        sa.ForeignKeyConstraint(["adapter"], ["adapters.name"], name="fk_adapter_versions_adapter"),
        sa.ForeignKeyConstraint(
            ["adapter", "predecessor"],
            ["adapter_versions.adapter", "adapter_versions.number"],
            name="fk_adapter_versions_predecessor",
        ),
        sa.CheckConstraint(
            "state IN ('candidate', 'shadow', 'canary', 'live', 'retired', 'rejected')", name="known_state"
        ),
    )
    exclusive = sa.text("state IN ('shadow', 'canary', 'live')")
    op.create_index(
        "uq_adapter_versions_exclusive_state",
        "adapter_versions",
        ["adapter", "state"],
        unique=True,
        sqlite_where=exclusive,
        postgresql_where=exclusive,
    )
    op.create_index(
        "uq_adapter_versions_digest",
        "adapter_versions",
        ["adapter", "digest"],
        unique=True,
        sqlite_where=sa.text("is_deleted IS 0"),
        postgresql_where=sa.text("is_deleted IS false"),
    )
    op.create_table(
        "adapter_changes",
        sa.Column("number", sa.BigInteger, nullable=False, autoincrement=False),
        sa.Column("adapter", sa.String(64), nullable=False),
        sa.Column("version", sa.Integer),
        sa.Column("action", sa.String(16), nullable=False),
        sa.Column("from_state", sa.String(16)),
        sa.Column("to_state", sa.String(16)),
        sa.Column("share", sa.Float),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("asked_by", sa.Text, nullable=False),
        sa.Column("at", UtcDateTime, nullable=False),
        sa.PrimaryKeyConstraint("number", name="pk_adapter_changes"),
        sa.ForeignKeyConstraint(
            ["adapter", "version"],
            ["adapter_versions.adapter", "adapter_versions.number"],
            name="fk_adapter_changes_adapter_version",
        ),
    )
    op.create_index("ix_adapter_changes_adapter_number", "adapter_changes", ["adapter", "number"])
    op.create_table(
        "adapter_imports",
        sa.Column("directory", sa.String(160), nullable=False),
        sa.Column("started_at", UtcDateTime, nullable=False),
        sa.PrimaryKeyConstraint("directory", name="pk_adapter_imports"),
    )
