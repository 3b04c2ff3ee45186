"""Rounds that somebody asked for and that have not begun."""

import sqlalchemy as sa
from alembic import op

from server.storage.types import UtcDateTime

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.create_table(
        "finetune_requests",
        sa.Column("adapter", sa.String(64), nullable=False),
        sa.Column("parent", sa.Integer),
        sa.Column("created_at", UtcDateTime, nullable=False),
        sa.PrimaryKeyConstraint("adapter", name="pk_finetune_requests"),
    )
