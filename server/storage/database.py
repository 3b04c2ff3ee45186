"""Opens the database by URL and hands out transactions; knows the few facts in which SQLite and PostgreSQL differ.

    database = open_database("sqlite:///traces.db")           # migrated when this returns
    with database.write(lock="traces") as connection: ...     # committed at the end, rolled back on an exception
    with database.read() as connection: ...

Every fault of the database itself (gone, locked, full, damaged) is a DatabaseUnavailableError. Violated constraints
stay SQLAlchemy's IntegrityError. Synchronous: call it from a thread, never from the event loop.
"""

import hashlib
import logging
import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import sqlalchemy
from sqlalchemy import URL, Connection, Engine, Table, make_url, select, text
from sqlalchemy.dialects import sqlite as sqlite_dialect
from sqlalchemy.exc import (
    ArgumentError,
    DataError,
    DBAPIError,
    IntegrityError,
    NoSuchModuleError,
    ProgrammingError,
)

from server.errors import ConfigError
from server.storage.errors import DatabaseUnavailableError
from server.storage.metadata import secrets_table
from server.storage.migrate import migrate
from server.storage.postgres import open_postgres
from server.storage.sqlite import file_identity, open_sqlite, opened_file

logger = logging.getLogger(__name__)

_TIDY = """
PRAGMA analysis_limit=1000;  -- rows an index: milliseconds, and good enough
ANALYZE;
PRAGMA incremental_vacuum(10000);
PRAGMA wal_checkpoint(PASSIVE);  -- most of the copying, without the write lock
PRAGMA busy_timeout=0;  -- the next one holds the write lock while it waits for readers: all commits would wait too
PRAGMA wal_checkpoint(TRUNCATE);
"""

Dialect = Literal["sqlite", "postgresql"]

BUSY_TIMEOUT_SECONDS = 5.0
"""How long a transaction waits for somebody else's lock. Our own transactions take milliseconds."""


class Database:
    """One engine with its pool. Safe to use from several threads."""

    def __init__(self, engine: Engine, path: Path | None) -> None:
        self.engine = engine
        self.dialect: Dialect = "sqlite" if path is not None else "postgresql"
        self._path = path
        self._writing = engine.execution_options(write=True)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that sees one state of the database (PostgreSQL: one state a statement)."""
        with self._faults_named(), self.engine.begin() as connection:
            yield connection

    @contextmanager
    def write(self, *, lock: str | None = None) -> Iterator[Connection]:
        """A transaction that commits at the end. Those with the same `lock` run one after the other, on all servers.

        On SQLite every write runs alone.
        """
        with self._faults_named():
            with self._writing.begin() as connection:
                if lock is not None and self.dialect == "postgresql":
                    connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _lock_number(lock)})
                opened = opened_file(connection) if self._path is not None else None
                yield connection
            if self._path is not None and file_identity(self._path) != opened:
                raise DatabaseUnavailableError(f"the database file {self._path} was moved or deleted")

    def insert(self, table: Table) -> Any:
        """An INSERT that knows `on_conflict_do_nothing` and `on_conflict_do_update`, alike on both dialects."""
        if self.dialect == "sqlite":
            return sqlite_dialect.insert(table)
        from sqlalchemy.dialects import postgresql  # 40 ms of every start, for nothing with SQLite

        return postgresql.insert(table)

    def secret(self, name: str) -> bytes:
        """32 random bytes, the same ones for ever and for all servers on this database."""
        with self.write() as connection:
            fresh = self.insert(secrets_table).values(name=name, value=secrets.token_bytes(32))
            connection.execute(fresh.on_conflict_do_nothing())
            value: bytes = connection.execute(
                select(secrets_table.c.value).where(secrets_table.c.name == name)
            ).scalar_one()
            return value

    def tidy(self) -> None:
        """After deletions: frees space, empties the write-ahead log, refreshes the planner's statistics.

        SQLite only; PostgreSQL's autovacuum does all that. Takes its turn as a writer, but waits for no reader: what is
        read meanwhile is left for next time.
        """
        if self._path is None:
            return
        with self._faults_named():
            connection = self.engine.raw_connection()
            try:
                driver = cast(sqlite3.Connection, connection.driver_connection)
                (patience,) = driver.execute("PRAGMA busy_timeout").fetchone()
                try:
                    driver.executescript(_TIDY)  # not execute, which steps a PRAGMA once: one page of the vacuum
                finally:
                    driver.execute(f"PRAGMA busy_timeout={patience}").close()
            except sqlite3.OperationalError as error:
                logger.info("the database was not tidied: %s", error)
            finally:
                connection.close()

    def close(self) -> None:
        self.engine.dispose()

    @contextmanager
    def _faults_named(self) -> Iterator[None]:
        try:
            yield
        except (IntegrityError, DataError, ProgrammingError):
            raise  # a constraint, or our bug
        except DBAPIError as error:
            raise DatabaseUnavailableError(f"the database failed: {_one_line(error.orig)}") from error
        except sqlalchemy.exc.TimeoutError as error:
            raise DatabaseUnavailableError("the database failed: every connection is in use") from error


def open_database(
    url: str, *, must_exist: bool = False, busy_timeout_seconds: float = BUSY_TIMEOUT_SECONDS
) -> Database:
    """`sqlite:///relative.db`, `sqlite:////absolute.db` or `postgresql://user@host/name`; brings the schema up to date.

    `must_exist`: an SQLite file that is not there is refused instead of made. Raises ConfigError for that, for a URL we
    cannot use and for a schema newer than we know, DatabaseUnavailableError otherwise.
    """
    parsed = _parse(url)
    if must_exist and parsed.drivername == "sqlite" and not _path(parsed).exists():
        raise ConfigError(f"there is no database {_path(parsed)} yet; a server makes it when it starts")
    database = _connect(parsed, busy_timeout_seconds)
    try:
        with database._faults_named():
            migrate(database.engine, database.write)
    except BaseException:
        database.close()
        raise
    return database


def make_private_directory(path: Path, setting: str) -> None:
    """For the default database: traces hold what users wrote, and nobody else on this machine reads them.

    Raises ConfigError, which names the setting.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{setting} {path} cannot be made: {error.strerror}") from error


def _parse(url: str) -> URL:
    accepted = "accepted are sqlite:///file.db and postgresql://user:password@host/database"
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise ConfigError(f"the database URL cannot be read; {accepted}") from None
    shown = parsed.render_as_string(hide_password=True)
    if parsed.drivername not in ("sqlite", "postgresql", "postgres"):
        raise ConfigError(f"database {shown}: {accepted}")
    if parsed.drivername == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise ConfigError(f"database {shown}: SQLite needs a file; traces in memory would not outlive the server")
    return parsed


def _connect(url: URL, busy_timeout_seconds: float) -> Database:
    if url.drivername != "sqlite":
        try:
            return Database(open_postgres(url, busy_timeout_seconds), None)
        except (NoSuchModuleError, ImportError) as error:
            raise ConfigError(f"PostgreSQL needs psycopg (pip install 'psycopg[binary]'): {error}") from error
    path = _path(url)
    try:
        return Database(open_sqlite(path, busy_timeout_seconds), path)
    except (OSError, sqlite3.Error) as error:
        raise DatabaseUnavailableError(f"the database {path} cannot be opened: {error}") from error


def _path(url: URL) -> Path:
    return Path(str(url.database)).expanduser().absolute()


def _lock_number(name: str) -> int:
    """PostgreSQL's advisory locks are named by a signed 64-bit number."""
    return int.from_bytes(hashlib.blake2b(b"sterna:" + name.encode(), digest_size=8).digest(), "big", signed=True)


def _one_line(error: BaseException | None) -> str:
    return " ".join(str(error).split())[:300]
