"""A server whose database is locked, gone, full or stopped: what its clients see meanwhile, and that it comes back.

Durable: a stream under way ends with an error event, without a finish reason or [DONE]; new requests are answered 503
before their first byte; nothing that failed is in the log. Relaxed: answers go on, also from adapters, without waiting,
and their traces are in the log afterwards.
"""

import resource
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path

import pytest
from sqlalchemy import select

from server.storage.database import BUSY_TIMEOUT_SECONDS, open_database
from server.traces.tables import traces
from tests.patience import PATIENCE_SECONDS, until
from tests.server.faults.load import ADAPTER, adapter_zip, import_version, promote
from tests.server.faults.process import Reply, Server
from tests.server.postgres import cluster

pytestmark = pytest.mark.slow

LONG_STREAM = 6000
"""Tokens: seconds, of which the test needs one moment to halt the server before its end."""

Fault = Callable[[Server], AbstractContextManager[None]]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Somebody else holds SQLite's write lock, for longer than we wait for it."""
    with closing(sqlite3.connect(path, isolation_level=None, timeout=PATIENCE_SECONDS)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


@contextmanager
def gone(path: Path) -> Iterator[None]:
    """The file is moved away and comes back."""
    path.rename(path.with_suffix(".away"))
    try:
        yield
    finally:
        path.with_suffix(".away").rename(path)


@contextmanager
def stuck(server: Server) -> Iterator[None]:
    """No file of the server's may grow any more, as with a quota (EFBIG)."""
    pid = server.process.pid
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


@contextmanager
def full(folder: Path) -> Iterator[None]:
    """Something else takes all the space there is (ENOSPC)."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            try:
                while file.write(b"x" * size) == size:
                    pass
            except OSError:
                continue
    try:
        yield
    finally:
        filler.unlink()


@contextmanager
def stopped() -> Iterator[None]:
    """The PostgreSQL server crashes and is started again."""
    cluster().stop()
    try:
        yield
    finally:  # all other tests need it
        cluster().start()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True, check=False)
    if made.returncode:
        pytest.skip(f"no right to mount a small disk: {made.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture(params=["locked", "gone", "stuck", "full", pytest.param("stopped", marks=pytest.mark.postgres)])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Fault]:
    """A database, and what happens to it."""
    if request.param == "stopped":
        return request.getfixturevalue("postgres_url"), lambda server: stopped()
    folder = request.getfixturevalue("small_disk") if request.param == "full" else tmp_path
    path = folder / "traces.db"
    faults: dict[str, Fault] = {
        "locked": lambda server: locked(path),
        "gone": lambda server: gone(path),
        "stuck": stuck,
        "full": lambda server: full(folder),
    }
    return f"sqlite:///{path}", faults[request.param]


def logged(url: str) -> dict[str, str]:
    """Each trace's status."""
    with closing(open_database(url)) as database, database.read() as connection:
        return {row.id: row.status for row in connection.execute(select(traces.c.id, traces.c.status))}


def check_cut_off(reply: Reply) -> None:
    """A stream that began well and could not be logged."""
    assert reply.status == 200
    assert reply.is_whole, "ended in order, with a reason"
    assert not reply.is_done
    assert b"[DONE]" not in reply.body
    *chunks, last = reply.events
    assert last["error"]["code"] == "service_unavailable"
    assert chunks
    assert all(choice["finish_reason"] is None for chunk in chunks for choice in chunk["choices"])


def check_refused(reply: Reply) -> None:
    assert reply.status == 503, reply.body
    assert reply.json["error"]["code"] == "service_unavailable"
    assert "x-sterna-trace-id" not in reply.headers


def test_durable(case: tuple[str, Fault], tiny_model: Path, tmp_path: Path) -> None:
    url, fault = case
    server = Server(tiny_model, tmp_path, url)
    try:
        first = server.chat("first")
        with server.under_way(LONG_STREAM) as rest:
            with fault(server):
                cut = rest()
                check_cut_off(cut)
                until(lambda: server.metric("trace_log_broken") == 1, "the log is known to be broken")
                check_refused(server.chat("refused"))
                check_refused(server.chat("refused", stream=True))
                assert server.chat("unlogged", headers={"X-Sterna-Log": "off"}).status == 200
            until(lambda: server.chat("back").status == 200, "the server answers again")
        last = server.chat("last", stream=True)
        assert last.is_done
        assert server.metric("traces_dropped_total") == 0
        assert server.metric("trace_log_broken") == 0
        assert server.stop() == 0
    finally:
        server.kill()
    found = logged(url)
    assert found[first.trace_id] == found[last.trace_id] == "ok"
    assert found[cut.headers["x-sterna-trace-id"]] == "failed"
    assert "Traceback" not in server.errors.read_text()


def test_relaxed(case: tuple[str, Fault], tiny_model: Path, tmp_path: Path) -> None:
    url, fault = case
    server = Server(tiny_model, tmp_path, url, "--trace-durability", "relaxed")
    try:
        assert import_version(server, adapter_zip(tiny_model, tmp_path / "made", 1)).status == 201
        assert promote(server, f"{ADAPTER}@1").status == 200
        answers = [server.chat("first")]
        with fault(server):
            start = time.monotonic()
            for number in range(5):
                answers += [server.chat(f"meanwhile {number}"), server.chat("stream", stream=True)]
            history = [{"role": "user", "content": "first"}, answers[0].json["choices"][0]["message"]]
            answers.append(server.chat("again", history=history))
            assert time.monotonic() - start < 11 * BUSY_TIMEOUT_SECONDS, "each answer waits for the log"
            until(lambda: server.metric("trace_log_broken") == 1, "the log is known to be broken")
            answers += [server.chat("still"), server.chat("who", model=ADAPTER)]
        assert [answer.status for answer in answers] == [200] * len(answers)
        assert answers[-1].headers["x-sterna-adapter-version"] == f"{ADAPTER}@1"
        # Not by traces_committed_total: what was committed as the file went away is tried again, and found written.
        until(lambda: {answer.trace_id for answer in answers} <= logged(url).keys(), "all traces are written")
        assert server.metric("traces_dropped_total") == 0
        assert server.stop() == 0
    finally:
        server.kill()
    assert {answer.trace_id for answer in answers} == logged(url).keys()
    assert "Traceback" not in server.errors.read_text()


@pytest.mark.parametrize("fault", ["locked", "damaged", "refused"])
def test_a_server_that_cannot_open_its_database_says_so(fault: str, tiny_model: Path, tmp_path: Path) -> None:
    """One line that names the reason, and no server."""
    path, url = tmp_path / "traces.db", f"sqlite:///{tmp_path}/traces.db"
    holder: AbstractContextManager[None] = nullcontext()
    match fault:
        case "locked":
            open_database(url).close()
            holder, reason = locked(path), "database is locked"
        case "damaged":
            path.write_bytes(b"no database " * 1000)
            reason = "file is not a database"
        case _:
            url, reason = "postgresql://nobody@127.0.0.1:1/nothing", "Connection refused"
    with holder, pytest.raises(AssertionError, match="the server did not start") as raised:
        Server(tiny_model, tmp_path, url)
    *_, line = str(raised.value).strip().splitlines()
    assert line.startswith("sterna: the database")
    assert reason in line
    assert "Traceback" not in str(raised.value)
