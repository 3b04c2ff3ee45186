"""SQLite as we use it: WAL, every commit on disk before it returns, one writer at a time that waits for its turn.

A database file that is moved away or deleted stays open under its old name in the connections that have it: commits
would succeed and be lost. So every connection remembers which file it opened (`file_identity`), and both the pool (at
checkout) and `Database.write` (after the commit) compare. A new file is made only when the server opens the database,
never by a later reconnect.
"""

import os
import sqlite3
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import Connection, Engine, FromClause, create_engine, event
from sqlalchemy.dialects.sqlite.base import SQLiteCompiler
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.pool import ConnectionPoolEntry, QueuePool

WAL_LIMIT_BYTES = 64 * 2**20
"""What a log grown by a burst or a long reader shrinks back to."""

_PRAGMAS = (
    "PRAGMA synchronous=FULL",  # a commit is on disk when it returns; NORMAL loses the last ones with the power
    "PRAGMA foreign_keys=ON",
    "PRAGMA secure_delete=ON",  # deleted traces are overwritten, not only unlinked
    f"PRAGMA journal_size_limit={WAL_LIMIT_BYTES}",
)


def open_sqlite(path: Path, busy_timeout_seconds: float) -> Engine:
    """An engine on an existing or new file. `write` execution option: the transaction takes the write lock at once."""
    uri = f"file:{quote(str(path.absolute()))}"
    _create(path, uri, busy_timeout_seconds)

    def connect() -> sqlite3.Connection:
        # isolation_level None: we say BEGIN ourselves (sqlite3 would begin deferred, and fail to upgrade when busy).
        return sqlite3.connect(
            f"{uri}?mode=rw", uri=True, timeout=busy_timeout_seconds, isolation_level=None, check_same_thread=False
        )

    # hide_parameters: errors are logged, and parameters are what people said.
    engine = create_engine("sqlite+pysqlite://", creator=connect, poolclass=QueuePool, hide_parameters=True)
    engine.dialect.statement_compiler = _HintCompiler

    @event.listens_for(engine, "connect")
    def on_connect(connection: sqlite3.Connection, entry: ConnectionPoolEntry) -> None:
        for pragma in _PRAGMAS:
            connection.execute(pragma).close()
        entry.info["file"] = file_identity(path)

    @event.listens_for(engine, "checkout")
    def on_checkout(connection: sqlite3.Connection, entry: ConnectionPoolEntry, proxy: Any) -> None:
        if entry.info["file"] != file_identity(path):
            raise DisconnectionError(f"{path} is no longer the file that was opened")

    @event.listens_for(engine, "begin")
    def on_begin(connection: Connection) -> None:
        is_write = connection.get_execution_options().get("write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if is_write else "BEGIN")

    return engine


class _HintCompiler(SQLiteCompiler):
    """SQLAlchemy leaves SQLite's table hints (`with_hint(table, "INDEXED BY ...", "sqlite")`) out by default."""

    def get_from_hint_text(self, table: FromClause, text: str | None) -> str | None:
        return text


def _create(path: Path, uri: str, busy_timeout_seconds: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(f"{uri}?mode=rwc", uri=True, timeout=busy_timeout_seconds)
    try:
        connection.execute("PRAGMA auto_vacuum=INCREMENTAL").close()  # has an effect on an empty file only
        connection.execute("PRAGMA journal_mode=WAL").close()
    finally:
        connection.close()


def file_identity(path: Path) -> tuple[int, int] | None:
    """Device and inode; None when there is no such file now."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def opened_file(connection: Connection) -> tuple[int, int] | None:
    """The identity of the file that this connection has open."""
    identity: tuple[int, int] | None = connection.connection.info["file"]
    return identity
