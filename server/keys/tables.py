"""The table of API keys. A key's text is never stored, only the SHA-256 of it (256 random bits need no salt)."""

from sqlalchemy import Column, LargeBinary, String, Table

from server.storage.metadata import metadata
from server.storage.types import SequenceNumber, UtcDateTime

api_keys = Table(
    "api_keys",
    metadata,
    Column("seq", SequenceNumber, primary_key=True),
    Column("id", String(32), nullable=False, unique=True),
    Column("name", String(128), nullable=False),
    Column("digest", LargeBinary, nullable=False, unique=True),
    Column("scopes", String(64), nullable=False),  # comma-separated, sorted
    Column("trace_policy", String(8), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("revoked_at", UtcDateTime),
    sqlite_autoincrement=True,
)
