"""Opening, transactions and their order, the shared secret, and how faults are named."""

import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from sqlalchemy import insert, select, text
from sqlalchemy.exc import IntegrityError

from server.errors import ConfigError, ServerUnavailableError
from server.storage.database import open_database
from server.storage.errors import DatabaseUnavailableError
from server.storage.metadata import secrets_table
from server.storage.types import CompressedJson, TokenIds, UtcDateTime
from tests.patience import PATIENCE_SECONDS


def test_a_write_is_seen_by_others_and_a_failed_one_by_nobody(database_url: str) -> None:
    ours, theirs = open_database(database_url), open_database(database_url)
    with ours.write() as connection:
        connection.execute(insert(secrets_table).values(name="kept", value=b"1"))

    def lose() -> None:
        with ours.write() as connection:
            connection.execute(insert(secrets_table).values(name="lost", value=b"1"))
            connection.execute(insert(secrets_table).values(name="kept", value=b"2"))

    with pytest.raises(IntegrityError):
        lose()
    with theirs.read() as connection:
        assert connection.scalars(select(secrets_table.c.name)).all() == ["kept"]
    ours.close()
    theirs.close()


def test_writes_under_one_lock_take_turns(database_url: str) -> None:
    """Each thread reads a counter and writes it back plus one: without turns, some would be lost."""
    database = open_database(database_url)
    with database.write() as connection:
        connection.execute(insert(secrets_table).values(name="n", value=b"0"))

    def add_ten() -> None:
        for _ in range(10):
            with database.write(lock="counter") as connection:
                number = int(connection.execute(text("SELECT value FROM storage_secrets")).scalar_one())
                connection.execute(secrets_table.update().values(value=str(number + 1).encode()))

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(add_ten) for _ in range(4)]:
            done.result()
    with database.read() as connection:
        assert connection.execute(text("SELECT value FROM storage_secrets")).scalar_one() == b"40"
    database.close()


def test_the_secret_is_random_once_and_then_the_same(database_url: str) -> None:
    ours, theirs = open_database(database_url), open_database(database_url)
    assert len(ours.secret("episodes")) == 32
    assert ours.secret("episodes") == theirs.secret("episodes") != ours.secret("audit")
    ours.close()
    theirs.close()


def test_commits_are_on_disk_before_they_return(database_url: str) -> None:
    database = open_database(database_url)
    with database.read() as connection:
        if database.dialect == "sqlite":
            assert connection.execute(text("PRAGMA synchronous")).scalar() == 2
            assert connection.execute(text("PRAGMA journal_mode")).scalar() == "wal"
            assert connection.execute(text("PRAGMA foreign_keys")).scalar() == 1
        else:
            assert connection.execute(text("SHOW synchronous_commit")).scalar() == "on"
    database.close()


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("mysql://localhost/x", "accepted are"),
        ("sqlite://", "needs a file"),
        ("sqlite:///:memory:", "needs a file"),
        ("traces.db", "cannot be read"),
        ("postgresql+asyncpg://u:hunter2@localhost/x", "accepted are"),
    ],
)
def test_a_url_we_cannot_use_is_a_config_error(url: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        open_database(url)
    assert "hunter2" not in str(caught.value)


def test_a_database_that_is_not_there_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(ServerUnavailableError, match="database"):
        open_database("postgresql://nobody@127.0.0.1:9/none")
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ServerUnavailableError, match="cannot be opened"):
        open_database(f"sqlite:///{tmp_path}/file/test.db")


def test_a_file_is_made_unless_it_must_exist(sqlite_url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no database .*test\.db"):
        open_database(sqlite_url, must_exist=True)
    assert list(tmp_path.iterdir()) == []
    open_database(sqlite_url).close()
    open_database(sqlite_url, must_exist=True).close()


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "test.db").write_bytes(b"x" * 5000)
    with pytest.raises(DatabaseUnavailableError, match="not a database"):
        open_database(f"sqlite:///{tmp_path}/test.db")


def test_a_lock_held_too_long_is_unavailable_and_then_over(sqlite_url: str) -> None:
    database = open_database(sqlite_url, busy_timeout_seconds=0.01)
    other = sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(DatabaseUnavailableError, match="locked"), database.write():
        pass
    other.execute("ROLLBACK")
    with database.write() as connection:
        connection.execute(insert(secrets_table).values(name="a", value=b"1"))
    other.close()
    database.close()


def test_a_file_moved_away_takes_no_writes_and_comes_back(sqlite_url: str, tmp_path: Path) -> None:
    """Without the check, SQLite would go on committing to the moved file, or to an unlinked one."""
    database = open_database(sqlite_url)
    with database.write() as connection:
        connection.execute(insert(secrets_table).values(name="before", value=b"1"))
    path, away = tmp_path / "test.db", tmp_path / "away.db"
    path.rename(away)
    with pytest.raises(DatabaseUnavailableError), database.write() as connection:
        connection.execute(insert(secrets_table).values(name="lost", value=b"1"))
    assert not path.exists(), "a reconnect must not start an empty database"
    away.rename(path)
    with database.write() as connection:
        connection.execute(insert(secrets_table).values(name="after", value=b"1"))
    with database.read() as connection:
        assert set(connection.scalars(select(secrets_table.c.name))) == {"before", "after"}
    database.close()


def test_a_file_moved_away_inside_a_transaction_fails_it(sqlite_url: str, tmp_path: Path) -> None:
    database = open_database(sqlite_url)

    def write() -> None:
        with database.write() as connection:
            connection.execute(insert(secrets_table).values(name="lost", value=b"1"))
            (tmp_path / "test.db").rename(tmp_path / "away.db")

    with pytest.raises(DatabaseUnavailableError, match="moved or deleted"):
        write()
    database.close()


def test_types_keep_what_the_databases_cannot() -> None:
    from sqlalchemy.dialects import postgresql, sqlite

    for dialect in (sqlite.dialect(), postgresql.dialect()):
        value = {"text": "nul \x00, surrogate \ud800, é", "list": [1, 2.5, None]}
        json_type = CompressedJson()
        assert json_type.process_result_value(json_type.process_bind_param(value, dialect), dialect) == value
        ids = [0, 1, 49151, 2**32 - 1]
        assert TokenIds().process_result_value(TokenIds().process_bind_param(ids, dialect), dialect) == ids
        assert TokenIds().process_result_value(TokenIds().process_bind_param([], dialect), dialect) == []
        moment = datetime(2026, 1, 2, 3, tzinfo=timezone(timedelta(hours=2)))
        stored = UtcDateTime().process_bind_param(moment, dialect)
        assert UtcDateTime().process_result_value(stored, dialect) == moment
        assert UtcDateTime().process_result_value(stored, dialect).tzinfo is UTC  # type: ignore[union-attr]


def test_tidying_waits_for_no_reader(sqlite_url: str) -> None:
    """Or it would hold the write lock meanwhile, and every commit would wait with it."""
    database = open_database(sqlite_url, busy_timeout_seconds=10 * PATIENCE_SECONDS)
    tidying = threading.Thread(target=database.tidy, daemon=True)
    with database.read() as reader:
        reader.execute(select(secrets_table.c.name)).all()  # from here on this state must stay
        with database.write() as connection:
            connection.execute(insert(secrets_table).values(name="a", value=b"1"))
        tidying.start()
        tidying.join(PATIENCE_SECONDS)
        assert not tidying.is_alive()
    with database.write() as connection:
        assert connection.execute(text("PRAGMA busy_timeout")).scalar_one() == 10_000 * PATIENCE_SECONDS
    database.close()
