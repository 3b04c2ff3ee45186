"""The adapter registry: what versions there are, in which state, and every change with time, reason and who asked.

Changes are numbered one by one over all adapters, in the order in which they commit, so that any number of servers can
ask "what changed since n". A caller that decided on what it read passes that adapter's `change` as `expected_change`:
of two that race, one wins and the other gets an AdapterConflictError.

Synchronous: call it from a thread. Not here: the files (store.py), who decides, which requests go where (router.py).
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime

from sqlalchemy import Connection, delete, func, insert, select, union
from sqlalchemy.exc import IntegrityError

from server.adapters.checks import cause_of, check_deletable, check_not_deleted, check_share
from server.adapters.edit import Edit
from server.adapters.errors import AdapterConflictError, AdapterStateError
from server.adapters.rows import change_of, read_adapter, read_adapters, version_of
from server.adapters.states import Action, State, target_state
from server.adapters.tables import changes, imports, versions
from server.adapters.version import Adapter, Change, NewVersion, Version, VersionRef, check_adapter_name
from server.errors import AdapterError
from server.storage.clock import Clock, utc_now
from server.storage.database import Database

LOCK = "adapters"


class Registry:
    """One registry, used by any number of servers, sidecars and commands at once."""

    def __init__(self, database: Database, *, clock: Clock = utc_now) -> None:
        self._database = database
        self._clock = clock

    # -- reading ------------------------------------------------------------------------------------------------------

    def draw_key(self) -> bytes:
        """The key of the draws that share traffic: the same for every server."""
        return self._database.secret("adapter_draws")

    def adapters(self, names: Iterable[str] | None = None) -> list[Adapter]:
        """By name; all of them, or those of `names` that exist."""
        with self._database.read() as connection:
            return read_adapters(connection, names)

    def adapter(self, name: str) -> Adapter:
        """Raises VersionNotFoundError."""
        with self._database.read() as connection:
            return read_adapter(connection, name)

    def version(self, ref: VersionRef) -> Version:
        """Also a deleted one: its row stays. Raises VersionNotFoundError."""
        return version_of(self.adapter(ref.adapter), ref)

    def latest_change(self) -> int:
        """0 while nothing has happened."""
        with self._database.read() as connection:
            return connection.scalar(select(func.max(changes.c.number))) or 0

    def changes_since(self, number: int, *, limit: int = 1000) -> list[Change]:
        """Oldest first, after change `number`."""
        query = select(changes).where(changes.c.number > number).order_by(changes.c.number).limit(limit)
        with self._database.read() as connection:
            return [change_of(row) for row in connection.execute(query)]

    def history(self, name: str, *, limit: int = 1000) -> list[Change]:
        """One adapter's changes, newest first."""
        query = select(changes).where(changes.c.adapter == name).order_by(changes.c.number.desc()).limit(limit)
        with self._database.read() as connection:
            return [change_of(row) for row in connection.execute(query)]

    # -- adapters -----------------------------------------------------------------------------------------------------

    def create(self, name: str, *, asked_by: str, reason: str) -> tuple[Adapter, bool]:
        """An adapter that the base answers for until it has a live version. One that exists is itself, and False."""
        check_adapter_name(name)
        cause = cause_of(asked_by, reason)
        with self._locked() as connection:
            found = read_adapters(connection, [name])
            if not found:
                Edit(connection, *cause, self._clock()).create(name)
        return (found[0], False) if found else (self.adapter(name), True)

    # -- imports ------------------------------------------------------------------------------------------------------

    def begin_import(self, directory: str) -> None:
        """Claim a directory of the store, `<adapter>/<unique name>`, before any file is there."""
        check_adapter_name(directory.partition("/")[0])
        with self._locked() as connection:
            connection.execute(insert(imports).values(directory=directory, started_at=self._clock()))

    def add_version(self, new: NewVersion, *, asked_by: str, reason: str) -> tuple[Version, bool]:
        """Number a version whose files are in its claimed directory, as a candidate.

        The same content again is the version that it already is (and False): its own directory is no longer claimed.
        """
        check_adapter_name(new.adapter)
        cause = cause_of(asked_by, reason)
        with self._locked() as connection:
            found = read_adapters(connection, [new.adapter])
            versions_now = found[0].versions.values() if found else ()
            same = _same_content(versions_now, new.digest, new.base_digest)
            if same is not None:
                return same, False
            if not connection.execute(delete(imports).where(imports.c.directory == new.directory)).rowcount:
                raise AdapterConflictError(
                    f"the import of {new.directory} was given up and its files removed; try again"
                )
            ref = VersionRef(new.adapter, 1 + max((version.ref.number for version in versions_now), default=0))
            Edit(connection, *cause, self._clock()).add(ref, new, is_first=not found)
            return version_of(read_adapter(connection, new.adapter), ref), True

    def find_content(self, name: str, digest: str, base_digest: str) -> Version | None:
        """The version with this content, if it is there. Raises AdapterError when it is there for another base."""
        with self._database.read() as connection:
            found = read_adapters(connection, [name])
        return _same_content(found[0].versions.values(), digest, base_digest) if found else None

    def end_imports(self, *, started_before: datetime) -> None:
        """Give up older imports as those of processes that died. One that lives fails after all and can be repeated."""
        with self._locked() as connection:
            connection.execute(delete(imports).where(imports.c.started_at < started_before))

    def directories(self) -> frozenset[str]:
        """Every directory that a version or an import needs."""
        kept = select(versions.c.directory).where(versions.c.is_deleted.is_(False))
        with self._database.read() as connection:
            return frozenset(connection.scalars(union(kept, select(imports.c.directory))))

    # -- states -------------------------------------------------------------------------------------------------------

    def start_shadow(
        self, ref: VersionRef, *, share: float = 1.0, asked_by: str, reason: str, expected_change: int | None = None
    ) -> Adapter:
        """Also run this share of episodes on a candidate, unseen."""
        with self._edit(ref.adapter, asked_by, reason, expected_change) as (edit, adapter):
            check_share(share)
            edit.move(version_of(adapter, ref), Action.SHADOW, share=share)
            edit.set_shares(ref.adapter, shadow_share=share)
        return self.adapter(ref.adapter)

    def start_canary(
        self, ref: VersionRef, *, share: float, asked_by: str, reason: str, expected_change: int | None = None
    ) -> Adapter:
        """Let a candidate (or shadow) answer this share of episodes. The gate's act."""
        with self._edit(ref.adapter, asked_by, reason, expected_change) as (edit, adapter):
            check_share(share)
            edit.move(version_of(adapter, ref), Action.CANARY, share=share)
            edit.set_shares(ref.adapter, canary_share=share)
        return self.adapter(ref.adapter)

    def promote(
        self,
        ref: VersionRef,
        *,
        asked_by: str,
        reason: str,
        hold_back_share: float = 0.0,
        override: bool = False,
        expected_change: int | None = None,
    ) -> Adapter:
        """Make a canary live; what was live is retired. `override`: a named human may take any unfinished version."""
        with self._edit(ref.adapter, asked_by, reason, expected_change) as (edit, adapter):
            check_share(hold_back_share)
            version, live = version_of(adapter, ref), adapter.live
            action = Action.OVERRIDE if override else Action.PROMOTE
            target_state(version.ref, version.state, action)  # refuse before anything is written
            if live is not None:
                edit.move(live, Action.SUPERSEDE)
            edit.move(version, action, share=hold_back_share, predecessor=None if live is None else live.ref.number)
            edit.set_shares(ref.adapter, hold_back_share=hold_back_share)
        return self.adapter(ref.adapter)

    def reject(self, ref: VersionRef, *, asked_by: str, reason: str, expected_change: int | None = None) -> Adapter:
        """It will not go live."""
        with self._edit(ref.adapter, asked_by, reason, expected_change) as (edit, adapter):
            edit.move(version_of(adapter, ref), Action.REJECT)
        return self.adapter(ref.adapter)

    def rollback(
        self, name: str, *, to: int | None = None, asked_by: str, reason: str, expected_change: int | None = None
    ) -> Adapter:
        """Retire the live version; its predecessor (or the retired version `to`) is live again, or the base."""
        with self._edit(name, asked_by, reason, expected_change) as (edit, adapter):
            live = adapter.live
            if live is None:
                raise AdapterStateError(f"{name} has no live version to roll back")
            target = adapter.previous if to is None else version_of(adapter, VersionRef(name, to))
            if target is not None:
                target_state(target.ref, target.state, Action.RESTORE)
                check_not_deleted(target)
            edit.move(live, Action.ROLLBACK)
            if target is not None:
                edit.move(target, Action.RESTORE)
            edit.set_shares(name, hold_back_share=0.0)
        return self.adapter(name)

    # -- what changes no state ----------------------------------------------------------------------------------------

    def set_share(
        self, name: str, state: State, share: float, *, asked_by: str, reason: str, expected_change: int | None = None
    ) -> Adapter:
        """Of the shadow, the canary, or (LIVE) of the episodes held back on the live version's predecessor."""
        with self._edit(name, asked_by, reason, expected_change) as (edit, adapter):
            check_share(share)
            columns = {State.SHADOW: "shadow_share", State.CANARY: "canary_share", State.LIVE: "hold_back_share"}
            version = adapter.in_state(state)
            if state not in columns or version is None:
                raise AdapterStateError(f"{name} has no {state} version whose share could be set")
            edit.note(version, Action.SHARE, share=share)
            edit.set_shares(name, **{columns[state]: share})
        return self.adapter(name)

    def pin(self, ref: VersionRef, *, is_pinned: bool = True, asked_by: str, reason: str) -> Version:
        """Keep a version from being deleted, or no longer. Twice is once."""
        with self._edit(ref.adapter, asked_by, reason, None) as (edit, adapter):
            version = version_of(adapter, ref)
            check_not_deleted(version)
            if version.is_pinned != is_pinned:
                edit.note(version, Action.PIN if is_pinned else Action.UNPIN, is_pinned=is_pinned)
        return self.version(ref)

    def mark_deleted(self, ref: VersionRef, *, asked_by: str, reason: str) -> Version:
        """Its files are about to go; the row stays. Twice is once. Raises AdapterStateError for one that is needed."""
        with self._edit(ref.adapter, asked_by, reason, None) as (edit, adapter):
            version = version_of(adapter, ref)
            if not version.is_deleted:
                check_deletable(adapter, version)
                edit.note(version, Action.DELETE, is_deleted=True)
        return self.version(ref)

    def _locked(self) -> AbstractContextManager[Connection]:
        """A transaction during which nobody else changes the registry."""
        return self._database.write(lock=LOCK)

    @contextmanager
    def _edit(
        self, name: str, asked_by: str, reason: str, expected_change: int | None
    ) -> Iterator[tuple[Edit, Adapter]]:
        cause = cause_of(asked_by, reason)
        try:
            with self._locked() as connection:
                adapter = read_adapter(connection, name)
                if expected_change is not None and adapter.change != expected_change:
                    raise AdapterConflictError(
                        f"{name} is at change {adapter.change}, not {expected_change} any more: somebody else changed "
                        "it; read it again"
                    )
                yield Edit(connection, *cause, self._clock()), adapter
        except IntegrityError as error:  # the constraints are the last word, whatever this module thinks
            raise AdapterConflictError(f"{name} was changed by somebody else at the same moment") from error


def _same_content(known: Iterable[Version], digest: str, base_digest: str) -> Version | None:
    for version in known:
        if version.digest == digest and not version.is_deleted:
            if version.base_digest != base_digest:
                raise AdapterError(f"{version.ref} is the same content for another base, {version.base_digest}")
            return version
    return None
