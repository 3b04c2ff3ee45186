"""API keys, traces, episodes and feedback. (The registry's tables are 0003.)"""

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    pass
