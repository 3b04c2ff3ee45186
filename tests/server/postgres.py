"""A private PostgreSQL server for one test run, and `database_url`: every test that takes it runs on both databases.

A room's conftest says `from tests.server.postgres import migrated_url` (or `database_url`, which is still empty). The
cluster is started once a process (each of xdist's workers has its own), when the first test marked `postgres` asks for
it; root may not run PostgreSQL, so it runs as the user that Debian's package made. Each test gets its own database.
Without the binaries such a test fails: deselect it by its marker.
"""

import atexit
import functools
import glob
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from server.storage.database import open_database
from tests.patience import PATIENCE_SECONDS

BINARIES = "/usr/lib/postgresql/*/bin"


class Cluster:
    """One server on a free port of 127.0.0.1, its data under /tmp.

    It does not wait for the disk (fsync=off): tests crash the server's processes, never the operating system, so what
    it gave to the kernel is there after every crash; and CI's disk is slow.
    """

    def __init__(self) -> None:
        found = sorted(glob.glob(BINARIES))
        assert found, f"no PostgreSQL in {BINARIES}: apt-get install postgresql, or deselect with -m 'not postgres'"
        self._bin = Path(found[-1])
        self._root = Path(tempfile.mkdtemp(prefix="sterna-postgres-"))
        self._data = self._root / "data"
        if os.getuid() == 0:
            shutil.chown(self._root, "postgres", "postgres")
        self.port = _free_port()
        self._run(
            "initdb",
            "-D",
            str(self._data),
            "-U",
            "sterna",
            "-A",
            "trust",
            "--no-instructions",
            "--no-sync",
            "-E",
            "UTF8",
        )
        self.start()

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self._root} -c fsync=off"
        self._control("start", "-o", options, "-l", str(self._root / "log"))

    def stop(self) -> None:
        """At once, as a crash would: connections are cut."""
        self._control("stop", "-m", "immediate")

    def remove(self) -> None:
        self.stop()
        shutil.rmtree(self._root)

    def create_database(self, template: str = "template0") -> str:
        name = f"test_{uuid.uuid4().hex}"
        self._admin(f"CREATE DATABASE {name} TEMPLATE {template}")
        return name

    @functools.cache  # noqa: B019 - there is one cluster
    def migrated(self) -> str:
        """A database with our tables in it, to be copied."""
        name = self.create_database()
        open_database(self.url(name)).close()
        return name

    def drop_database(self, name: str) -> None:
        self._admin(f"DROP DATABASE {name} WITH (FORCE)")

    def url(self, name: str) -> str:
        return f"postgresql://sterna@127.0.0.1:{self.port}/{name}"

    def _control(self, verb: str, *options: str) -> None:
        """Waits until it is so; recovery after a crash takes its time on a slow disk."""
        self._run("pg_ctl", verb, "-D", str(self._data), "-w", "-t", f"{PATIENCE_SECONDS:.0f}", *options)

    def _admin(self, statement: str) -> None:
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(statement)  # type: ignore[call-overload]

    def _run(self, program: str, *arguments: str) -> None:
        def become_postgres() -> None:
            user = pwd.getpwnam("postgres")
            os.setgid(user.pw_gid)
            os.setuid(user.pw_uid)

        subprocess.run(
            [str(self._bin / program), *arguments],
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # the server keeps what it inherits: a pipe would never end
            stderr=subprocess.DEVNULL,
            cwd="/",
            preexec_fn=become_postgres if os.getuid() == 0 else None,
        )


@functools.cache
def cluster() -> Cluster:
    started = Cluster()
    atexit.register(started.remove)
    return started


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def postgres_url() -> Iterator[str]:
    """An empty PostgreSQL database."""
    server = cluster()
    name = server.create_database()
    yield server.url(name)
    server.drop_database(name)


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """The URL of a file that does not exist yet."""
    return f"sqlite:///{tmp_path}/test.db"


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def database_url(request: pytest.FixtureRequest) -> str:
    """An empty database of each kind in turn."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@functools.cache
def migrated_file() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="sterna-sqlite-"))
    atexit.register(shutil.rmtree, folder)
    open_database(f"sqlite:///{folder}/template.db").close()
    return folder / "template.db"


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def migrated_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """As `database_url`, with our tables in it: a copy, because migrating takes longer than most tests."""
    if request.param == "sqlite":
        shutil.copy(migrated_file(), tmp_path / "test.db")
        yield f"sqlite:///{tmp_path}/test.db"
        return
    server = cluster()
    name = server.create_database(server.migrated())
    yield server.url(name)
    server.drop_database(name)
