"""The schema: made from nothing, made once by two that start together, equal to the tables in code."""

import importlib
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, inspect, text

from server.errors import ConfigError
from server.storage.database import open_database
from server.storage.metadata import metadata
from server.storage.migrate import known_revisions

ROOMS = Path(__file__).parents[3] / "server"
for tables in ROOMS.glob("*/tables.py"):
    importlib.import_module(f"server.{tables.parent.name}.tables")
importlib.import_module("finetune.rounds.tables")


def test_from_nothing_and_again(database_url: str) -> None:
    for _ in range(2):
        database = open_database(database_url)
        with database.read() as connection:
            assert connection.execute(text("SELECT version_num FROM alembic_version")).scalars().all() == [
                known_revisions()[-1]
            ]
        database.close()


def test_two_servers_that_start_together(database_url: str) -> None:
    barrier = threading.Barrier(4)

    def start() -> None:
        barrier.wait()
        open_database(database_url).close()

    with ThreadPoolExecutor(4) as pool:
        for started in [pool.submit(start) for _ in range(4)]:
            started.result()


def test_the_migrations_make_what_the_code_says(database_url: str) -> None:
    database = open_database(database_url)
    with database.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
        assert set(inspect(connection).get_table_names()) == {*metadata.tables, "alembic_version"}
    database.close()


def test_the_history_is_one_line() -> None:
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(ROOMS / "storage" / "migrations"))
    history = [script.revision for script in ScriptDirectory.from_config(config).walk_revisions()]
    assert history[::-1] == known_revisions()


def test_a_newer_schema_is_refused(sqlite_url: str) -> None:
    open_database(sqlite_url).close()
    engine = create_engine(sqlite_url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    with pytest.raises(ConfigError, match=r"9999.*newer"):
        open_database(sqlite_url)


def test_a_migration_that_fails_leaves_nothing(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from server.storage import migrate

    def upgrade_then_fail(connection: object, target: str) -> None:
        real_upgrade(connection, target)  # type: ignore[arg-type]
        raise RuntimeError("power cut")

    real_upgrade = migrate.upgrade
    monkeypatch.setattr(migrate, "upgrade", upgrade_then_fail)
    with pytest.raises(RuntimeError):
        open_database(sqlite_url)
    engine = create_engine(sqlite_url)
    assert inspect(engine).get_table_names() == []
    engine.dispose()


def test_an_up_to_date_database_opens_without_alembic(sqlite_url: str) -> None:
    open_database(sqlite_url).close()
    code = f"""
import sys
from server.storage.database import open_database
open_database({sqlite_url!r}).close()
sys.exit("alembic" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOMS.parent)
