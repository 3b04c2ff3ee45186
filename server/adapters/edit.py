"""The writing half of the registry: one transaction's changes to one adapter, each with its row in the history."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, func, insert, select, update

from server.adapters.errors import AdapterConflictError
from server.adapters.states import Action, State, target_state
from server.adapters.tables import adapters, changes, versions
from server.adapters.version import NewVersion, Version, VersionRef


@dataclass
class Edit:
    """Used under the registry's lock, by which change numbers appear in the order in which they are given out."""

    connection: Connection
    asked_by: str
    reason: str
    now: datetime

    def create(self, name: str) -> None:
        """An adapter without a version."""
        self._insert_adapter(name)
        self._record(self._next_number(), name, None, Action.CREATE, None, None, None)

    def add(self, ref: VersionRef, new: NewVersion, *, is_first: bool) -> None:
        """A new version, and with the first one its adapter, if nobody made it before."""
        change = self._next_number()
        if is_first:
            self._insert_adapter(ref.adapter)
        self.connection.execute(
            insert(versions).values(
                adapter=ref.adapter,
                number=ref.number,
                state=State.CANDIDATE.value,
                digest=new.digest,
                base_digest=new.base_digest,
                rank=new.rank,
                size_bytes=new.size_bytes,
                memory_bytes=new.memory_bytes,
                origin=new.origin,
                parent=new.parent,
                directory=new.directory,
                created_at=self.now,
                state_change=change,
                is_pinned=False,
                is_deleted=False,
            )
        )
        self._record(change, ref.adapter, ref, Action.IMPORT, None, State.CANDIDATE, None)

    def move(self, version: Version, action: Action, *, share: float | None = None, **values: Any) -> None:
        """Take a step of states.py. Raises AdapterStateError when there is no such step."""
        target = target_state(version.ref, version.state, action)
        change = self._next_number()
        self._set(version, state=target.value, state_change=change, **values)
        self._record(change, version.ref.adapter, version.ref, action, version.state, target, share)

    def note(self, version: Version, action: Action, *, share: float | None = None, **values: Any) -> None:
        """Record what changes no state."""
        if values:
            self._set(version, **values)
        number = self._next_number()
        self._record(number, version.ref.adapter, version.ref, action, version.state, version.state, share)

    def set_shares(self, name: str, **shares: float) -> None:
        self.connection.execute(update(adapters).where(adapters.c.name == name).values(**shares))

    def _insert_adapter(self, name: str) -> None:
        shares = {"canary_share": 0.0, "shadow_share": 0.0, "hold_back_share": 0.0}
        self.connection.execute(insert(adapters).values(name=name, change=0, created_at=self.now, **shares))

    def _set(self, version: Version, **values: Any) -> None:
        where = (
            versions.c.adapter == version.ref.adapter,
            versions.c.number == version.ref.number,
            versions.c.state == version.state.value,
        )
        if self.connection.execute(update(versions).where(*where).values(**values)).rowcount != 1:
            raise AdapterConflictError(f"{version.ref} was changed by somebody else at the same moment")

    def _next_number(self) -> int:
        return (self.connection.scalar(select(func.max(changes.c.number))) or 0) + 1

    def _record(
        self,
        number: int,
        adapter: str,
        ref: VersionRef | None,
        action: Action,
        before: State | None,
        after: State | None,
        share: float | None,
    ) -> None:
        self.connection.execute(
            insert(changes).values(
                number=number,
                adapter=adapter,
                version=None if ref is None else ref.number,
                action=action.value,
                from_state=None if before is None else before.value,
                to_state=None if after is None else after.value,
                share=share,
                reason=self.reason,
                asked_by=self.asked_by,
                at=self.now,
            )
        )
        self.connection.execute(update(adapters).where(adapters.c.name == adapter).values(change=number))
