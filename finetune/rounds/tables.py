"""Tables: rounds and requests for them, the leases under which they run, watched versions, what webhooks were told."""

from sqlalchemy import BigInteger, Boolean, Column, Index, Integer, String, Table, Text

from server.storage.metadata import metadata
from server.storage.types import CompressedJson, UtcDateTime

rounds = Table(
    "rounds",
    metadata,
    Column("adapter", String(64), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("phase", String(16), nullable=False),
    Column("result", String(24)),  # NULL: unfinished
    Column("reason", Text, nullable=False),
    Column("cause", Text, nullable=False),
    Column("parent", Integer),  # the version that a warm start begins with
    Column("base_digest", String(80), nullable=False),
    Column("settings", CompressedJson, nullable=False),
    # Traces up to this sequence number: what came later belongs to the next round, also after a restart.
    Column("last_seq", BigInteger, nullable=False),
    Column("snapshot", String(80)),
    Column("version", Integer),
    Column("facts", CompressedJson, nullable=False),
    Column("decision", CompressedJson),
    Column("num_restarts", Integer, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("updated_at", UtcDateTime, nullable=False),
)

_is_unfinished = rounds.c.result.is_(None)
Index(
    "uq_rounds_unfinished",
    rounds.c.adapter,
    unique=True,
    sqlite_where=_is_unfinished,
    postgresql_where=_is_unfinished,
)
"""One round at a time per adapter, whatever the leases say."""

requests = Table(
    "finetune_requests",
    metadata,
    # One an adapter: asking twice before the round begins is asking once, with the later parent.
    Column("adapter", String(64), primary_key=True),
    Column("parent", Integer),
    Column("created_at", UtcDateTime, nullable=False),
)

leases = Table(
    "finetune_leases",
    metadata,
    Column("name", String(80), primary_key=True),
    Column("token", BigInteger, nullable=False),  # grows with every holder: what a write is fenced by
    Column("holder", Text, nullable=False),  # '': free
    Column("beat", BigInteger, nullable=False),  # grows while the holder lives
)

watches = Table(
    "finetune_watches",
    metadata,
    Column("adapter", String(64), primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("state", CompressedJson, nullable=False),  # finetune/watch, and which episodes it may count
    Column("is_over", Boolean, nullable=False),
    Column("updated_at", UtcDateTime, nullable=False),
)

webhook_places = Table(
    "finetune_webhook_places",
    metadata,
    # The registry's changes are the outbox: what an endpoint has been told is a place in their numbers.
    Column("endpoint", String(80), primary_key=True),
    Column("last_change", BigInteger, nullable=False),
)
