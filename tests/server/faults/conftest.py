"""The model and the databases of servers under test."""

from pathlib import Path

import pytest

from tests.server.postgres import database_url, postgres_url, sqlite_url
from tests.tiny_models import write_tiny_gguf

__all__ = ["database_url", "postgres_url", "sqlite_url"]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights: what it says means nothing, and takes no time."""
    return write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf", context_length=8192)
