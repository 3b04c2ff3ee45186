"""The databases that the registry's tests run on."""

from collections.abc import Iterator

import pytest

from server.adapters.registry import Registry
from server.storage.database import Database, open_database
from tests.server.postgres import database_url, postgres_url, sqlite_url

__all__ = ["database_url", "postgres_url", "sqlite_url"]


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """Each kind in turn."""
    opened = open_database(database_url)
    yield opened
    opened.close()


@pytest.fixture
def sqlite_database(sqlite_url: str) -> Iterator[Database]:
    opened = open_database(sqlite_url)
    yield opened
    opened.close()


@pytest.fixture
def registry(database: Database) -> Registry:
    return Registry(database)
