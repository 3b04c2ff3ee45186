"""A log to freeze, on both databases, and a model whose tokens are bytes."""

import pytest

from finetune.dataset.render import Renderer
from server.storage.database import Database
from server.traces.store import TraceStore
from tests.finetune.dataset.log import Log
from tests.server.openai.scripted import CHATML, byte_tokenizer
from tests.server.traces.conftest import database, database_url, migrated_url, postgres_url, sqlite_url

__all__ = ["database", "database_url", "migrated_url", "postgres_url", "sqlite_url"]


@pytest.fixture(scope="session")
def renderer() -> Renderer:
    return Renderer(byte_tokenizer(), CHATML, "sha256:base")


@pytest.fixture
def log(database: Database) -> Log:
    return Log(TraceStore(database, held_out_share=0.0), TraceStore(database, held_out_share=1.0))
