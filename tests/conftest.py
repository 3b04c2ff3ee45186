"""Where the default model is, and where temporary files go; and the data of servers under test is never the user's.

Temporary files are in memory where there is enough: most tests of the log wait for the disk (every commit of SQLite
does), and a machine that never loses its power learns nothing from that. All of it is gone at the end;
`--basetemp=FOLDER` keeps what tests have written to `tmp_path`, on the disk.
"""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import hypothesis
import pytest

from server.config import DEFAULT_MODEL, Settings
from server.models.catalog import resolve_model
from server.storage import patience
from server.traces import log
from tests.patience import PATIENCE_SECONDS

MEMORY = Path("/dev/shm")
ENOUGH_BYTES = 4 << 30
"""A run of all tests leaves about 1 GiB, most of it the wheel's build and models."""


def put_temporary_files_in_memory() -> None:
    """For this process and all that it starts: xdist's workers, servers, PostgreSQL."""
    if "PYTEST_XDIST_WORKER" in os.environ or not MEMORY.is_dir():
        return
    found = os.statvfs(MEMORY)
    if found.f_flag & os.ST_NOEXEC or found.f_bavail * found.f_frsize < ENOUGH_BYTES:  # as in Docker
        return
    for left in MEMORY.glob("sterna-tests-[0-9]*-*"):  # by a run that was killed: it would hold its memory for ever
        if not Path("/proc", left.name.split("-")[2]).exists():
            shutil.rmtree(left, ignore_errors=True)
    os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix=f"sterna-tests-{os.getpid()}-", dir=MEMORY)
    os.chmod(tempfile.tempdir, 0o755)  # PostgreSQL runs as another user
    atexit.register(shutil.rmtree, tempfile.tempdir, ignore_errors=True)


put_temporary_files_in_memory()

# For this process and the servers that tests start.
os.environ["XDG_DATA_HOME"] = tempfile.mkdtemp(prefix="sterna-data-")
atexit.register(shutil.rmtree, os.environ["XDG_DATA_HOME"], ignore_errors=True)

# Two workers share two cores: a training step whose threads spin for each other while one of them waits for a core took
# 20 s, one whose threads sleep 5 s. Read by the OpenMP library when torch loads it, here and in what is started.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# What the server tells its clients when the database hangs; a test machine that is busy hangs for a while, and is well.
# The tests of these set their own.
patience.PATIENCE_SECONDS = log.STALL_SECONDS = PATIENCE_SECONDS

# Nothing is timed, and every run tries the same examples: what CI finds can be found again.
hypothesis.settings.register_profile(
    "sterna",
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("sterna")


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The default model's file, from the cache that `sterna models pull` fills."""
    return resolve_model(DEFAULT_MODEL, Settings().cache_dir).path
