"""The registry's tables. What must never be wrong is a constraint here, not only a rule in registry.py."""

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    String,
    Table,
    Text,
)

from server.adapters.states import EXCLUSIVE, State
from server.storage.metadata import metadata
from server.storage.types import UtcDateTime

adapters = Table(
    "adapters",
    metadata,
    Column("name", String(64), primary_key=True),
    # The number of the adapter's last change: what a compare-and-set compares.
    Column("change", BigInteger, nullable=False),
    Column("canary_share", Float, nullable=False),
    Column("shadow_share", Float, nullable=False),
    Column("hold_back_share", Float, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
)

versions = Table(
    "adapter_versions",
    metadata,
    Column("adapter", String(64), ForeignKey("adapters.name"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("state", String(16), nullable=False),
    Column("digest", String(80), nullable=False),
    Column("base_digest", String(80), nullable=False),
    Column("rank", Integer, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("memory_bytes", BigInteger, nullable=False),
    Column("origin", Text, nullable=False),
    Column("parent", String(80)),
    Column("directory", Text, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("predecessor", Integer),
    Column("state_change", BigInteger, nullable=False),
    Column("is_pinned", Boolean, nullable=False),
    Column("is_deleted", Boolean, nullable=False),
    CheckConstraint("state IN ({})".format(", ".join(f"'{state}'" for state in State)), name="known_state"),
    ForeignKeyConstraint(
        ["adapter", "predecessor"],
        ["adapter_versions.adapter", "adapter_versions.number"],
        name="fk_adapter_versions_predecessor",
    ),
)

_is_exclusive = versions.c.state.in_([state.value for state in EXCLUSIVE])
Index(
    "uq_adapter_versions_exclusive_state",
    versions.c.adapter,
    versions.c.state,
    unique=True,
    sqlite_where=_is_exclusive,
    postgresql_where=_is_exclusive,
)
"""At most one live version an adapter, one canary and one shadow."""

_is_kept = versions.c.is_deleted.is_(False)
Index(
    "uq_adapter_versions_digest",
    versions.c.adapter,
    versions.c.digest,
    unique=True,
    sqlite_where=_is_kept,
    postgresql_where=_is_kept,
)
"""The same content is the same version, unless it was deleted in between."""

changes = Table(
    "adapter_changes",
    metadata,
    # Given out under the registry's lock, so that numbers appear in their order: a poller never misses one.
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("adapter", String(64), nullable=False),
    Column("version", Integer),  # NULL: of the adapter itself
    Column("action", String(16), nullable=False),
    Column("from_state", String(16)),
    Column("to_state", String(16)),
    Column("share", Float),
    Column("reason", Text, nullable=False),
    Column("asked_by", Text, nullable=False),
    Column("at", UtcDateTime, nullable=False),
    ForeignKeyConstraint(["adapter", "version"], ["adapter_versions.adapter", "adapter_versions.number"]),
    Index("ix_adapter_changes_adapter_number", "adapter", "number"),
)

imports = Table(
    "adapter_imports",
    metadata,
    # Claimed before any file appears there, so that a directory without a row here or above is garbage for certain.
    Column("directory", String(160), primary_key=True),
    Column("started_at", UtcDateTime, nullable=False),
)
