"""From the registry's rows to its words (version.py). Reading only; edit.py writes."""

from collections.abc import Iterable
from typing import Any

from sqlalchemy import Connection, Row, select

from server.adapters.errors import VersionNotFoundError
from server.adapters.states import Action, State
from server.adapters.tables import adapters, versions
from server.adapters.version import Adapter, Change, Version, VersionRef

_ADAPTER_COLUMNS = (
    adapters.c.name,
    adapters.c.change,
    adapters.c.canary_share,
    adapters.c.shadow_share,
    adapters.c.hold_back_share,
)
_COLUMNS = (*_ADAPTER_COLUMNS, *(column for column in versions.c if column.name != "adapter"))


def read_adapter(connection: Connection, name: str) -> Adapter:
    found = read_adapters(connection, [name])
    if not found:
        raise VersionNotFoundError(f"there is no adapter '{name[:200]}'")
    return found[0]


def read_adapters(connection: Connection, names: Iterable[str] | None) -> list[Adapter]:
    """One statement: on PostgreSQL two could see two states."""
    query = select(*_COLUMNS).outerjoin_from(adapters, versions).order_by(adapters.c.name, versions.c.number)
    if names is not None:
        # A name that nobody can have must not reach the database: PostgreSQL refuses NUL.
        query = query.where(adapters.c.name.in_([name for name in names if name.isascii() and "\0" not in name]))
    grouped: dict[str, list[Row[Any]]] = {}
    for row in connection.execute(query):
        grouped.setdefault(row.name, []).append(row)
    return [
        Adapter(
            name,
            change=rows[0].change,
            canary_share=rows[0].canary_share,
            shadow_share=rows[0].shadow_share,
            hold_back_share=rows[0].hold_back_share,
            versions={row.number: _version(row) for row in rows if row.number is not None},
        )
        for name, rows in grouped.items()
    ]


def version_of(adapter: Adapter, ref: VersionRef) -> Version:
    """Raises VersionNotFoundError."""
    version = adapter.versions.get(ref.number)
    if version is None:
        newest = f"the newest of {adapter.name} is {max(adapter.versions)}" if adapter.versions else "it has none yet"
        raise VersionNotFoundError(f"there is no version {ref}; {newest}")
    return version


def change_of(row: Row[Any]) -> Change:
    return Change(
        number=row.number,
        adapter=row.adapter,
        ref=None if row.version is None else VersionRef(row.adapter, row.version),
        action=Action(row.action),
        from_state=None if row.from_state is None else State(row.from_state),
        to_state=None if row.to_state is None else State(row.to_state),
        share=row.share,
        reason=row.reason,
        asked_by=row.asked_by,
        at=row.at,
    )


def _version(row: Row[Any]) -> Version:
    return Version(
        ref=VersionRef(row.name, row.number),
        state=State(row.state),
        digest=row.digest,
        base_digest=row.base_digest,
        rank=row.rank,
        size_bytes=row.size_bytes,
        memory_bytes=row.memory_bytes,
        origin=row.origin,
        parent=row.parent,
        directory=row.directory,
        created_at=row.created_at,
        predecessor=row.predecessor,
        state_change=row.state_change,
        is_pinned=row.is_pinned,
        is_deleted=row.is_deleted,
    )
