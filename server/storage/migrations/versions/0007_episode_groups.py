"""The first episode of a group is found by one look into an index, however many the group has."""

from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.drop_index("ix_episodes_group_digest", "episodes")
    op.create_index("ix_episodes_group", "episodes", ["group_digest", "seq"])
