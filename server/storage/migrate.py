"""Brings a database's schema up to date when it is opened: Alembic's history in `migrations/`, one line.

The revisions are the numbers of their files (`0002_traces.py` is "0002"), so that a database that is up to date is
recognized without importing Alembic (0.1 s of every start). Servers that start together take turns under a lock, and
the whole upgrade is one transaction.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from sqlalchemy import Connection, Engine, inspect, text

from server.errors import ConfigError

MIGRATIONS = Path(__file__).parent / "migrations"


def known_revisions() -> list[str]:
    """Oldest first."""
    return sorted(path.name.partition("_")[0] for path in (MIGRATIONS / "versions").glob("[0-9]*.py"))


def migrate(engine: Engine, write: Callable[..., AbstractContextManager[Connection]]) -> None:
    """`write` is `Database.write`. Raises ConfigError for a database of a newer Sterna."""
    known = known_revisions()
    with engine.connect() as connection:
        current = current_revision(connection)
    if current == known[-1]:
        return
    with write(lock="migrations") as connection:
        current = current_revision(connection)
        if current is not None and current not in known:
            raise ConfigError(
                f"the database has schema {current}, this Sterna knows up to {known[-1]}: use the newer Sterna"
            )
        if current != known[-1]:
            upgrade(connection, "head")


def current_revision(connection: Connection) -> str | None:
    """None: an empty database."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    revision: str | None = connection.scalar(text("SELECT version_num FROM alembic_version"))
    return revision


def upgrade(connection: Connection, target: str) -> None:
    """In the caller's transaction."""
    logging.getLogger("alembic").setLevel(logging.WARNING)  # it tells of its own plugins at every new database
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, target)
