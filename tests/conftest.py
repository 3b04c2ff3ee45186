"""Where the default model is."""

from pathlib import Path

import pytest

from server.config import DEFAULT_MODEL, Settings
from server.models.catalog import resolve_model


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The default model's file, from the cache that `sterna models pull` fills."""
    return resolve_model(DEFAULT_MODEL, Settings().cache_dir).path
