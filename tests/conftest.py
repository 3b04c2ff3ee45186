"""Where the default model is; and the data of servers under test is never the user's."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from server.config import DEFAULT_MODEL, Settings
from server.models.catalog import resolve_model

# For this process and the servers that tests start.
os.environ["XDG_DATA_HOME"] = tempfile.mkdtemp(prefix="sterna-data-")
atexit.register(shutil.rmtree, os.environ["XDG_DATA_HOME"], ignore_errors=True)


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The default model's file, from the cache that `sterna models pull` fills."""
    return resolve_model(DEFAULT_MODEL, Settings().cache_dir).path
