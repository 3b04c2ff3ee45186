"""The databases that the round tests run on."""

from collections.abc import Iterator

import pytest

from server.storage.database import Database, open_database
from tests.server.postgres import database_url, migrated_url, postgres_url, sqlite_url

__all__ = ["database_url", "migrated_url", "postgres_url", "sqlite_url"]


@pytest.fixture
def database(migrated_url: str) -> Iterator[Database]:
    opened = open_database(migrated_url)
    yield opened
    opened.close()
