"""The databases that the trace tests run on, and what is built on one."""

from collections.abc import Iterator

import pytest

from server.storage.database import Database, open_database
from server.traces.store import TraceStore
from tests.server.postgres import database_url, migrated_url, postgres_url, sqlite_url
from tests.server.traces.builders import Client

__all__ = ["database_url", "migrated_url", "postgres_url", "sqlite_url"]


@pytest.fixture
def database(migrated_url: str) -> Iterator[Database]:
    opened = open_database(migrated_url)
    yield opened
    opened.close()


@pytest.fixture
def store(database: Database) -> TraceStore:
    return TraceStore(database)


@pytest.fixture
def client(store: TraceStore) -> Client:
    return Client(store)
