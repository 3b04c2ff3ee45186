"""The log's promises: what was acknowledged is on disk, what cannot be is refused or counted, and it comes back."""

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import func, select, text

from server.errors import ServerUnavailableError
from server.storage.database import Database, open_database
from server.storage.errors import DatabaseUnavailableError
from server.traces import log as log_module
from server.traces.episodes import Episodes
from server.traces.log import TraceLog
from server.traces.record import TraceRecord
from server.traces.store import TraceStore
from server.traces.tables import traces
from tests.patience import PATIENCE_SECONDS
from tests.server.postgres import Cluster, cluster
from tests.server.traces.builders import make_record

ROOT = Path(__file__).parents[3]


@contextmanager
def running(store: TraceStore, **settings: bool | int) -> Iterator[TraceLog]:
    log = TraceLog(store, Episodes(store.database), **settings)  # type: ignore[arg-type]
    log.start()
    try:
        yield log
    finally:
        log.stop()


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "PING_SECONDS", 0.01)
    monkeypatch.setattr(log_module, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(log_module, "LAST_PAUSE_SECONDS", 0.02)


def ids(database: Database) -> list[str]:
    with database.read() as connection:
        return list(connection.scalars(select(traces.c.id).order_by(traces.c.seq)))


def statuses(database: Database) -> list[str]:
    with database.read() as connection:
        return list(connection.scalars(select(traces.c.status).order_by(traces.c.seq)))


async def until(condition: Callable[[], bool]) -> None:
    """The writer's thread has nothing to wait for it with but its numbers."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.002)


async def until_mended(log: TraceLog) -> None:
    await until(lambda: log.stats().fault is None)


async def until_broken(log: TraceLog) -> None:
    await until(lambda: log.stats().fault is not None)


def test_durable_append_returns_when_the_trace_is_in_the_database(store: TraceStore, database: Database) -> None:
    async def use(log: TraceLog) -> None:
        for _ in range(3):
            log.check()
            record = make_record()
            await log.append(record)
            assert ids(database)[-1] == record.id

    with running(store) as log:
        asyncio.run(use(log))
        stats = log.stats()
    assert (stats.commits.num_traces, stats.num_queued, stats.num_dropped, stats.num_failed) == (3, 0, 0, 0)
    assert sum(stats.commits.bucket_counts) == 3
    assert stats.commits.sum_seconds > 0


class CountingStore(TraceStore):
    """Holds the writer back until told, so that a test sees what one transaction takes."""

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self.batches: list[int] = []
        self.may_write = threading.Event()

    def write(self, records: Sequence[TraceRecord], *, is_retry: bool = False) -> list[str]:
        assert self.may_write.wait(PATIENCE_SECONDS)
        self.batches.append(len(records))
        return super().write(records, is_retry=is_retry)


def test_whatever_is_queued_goes_into_one_transaction(database: Database) -> None:
    store = CountingStore(database)

    async def use(log: TraceLog) -> None:
        first = asyncio.create_task(log.append(make_record()))
        await asyncio.sleep(0)
        rest = [asyncio.create_task(log.append(make_record())) for _ in range(50)]
        await asyncio.sleep(0)
        assert log.stats().num_queued == 51
        store.may_write.set()
        await asyncio.gather(first, *rest)

    with running(store) as log:
        asyncio.run(use(log))
    assert sum(store.batches) == 51
    assert len(store.batches) <= 2


def test_relaxed_append_never_waits_and_a_full_queue_drops(database: Database) -> None:
    store = CountingStore(database)

    async def use(log: TraceLog) -> None:
        for _ in range(15):
            log.check()
            await log.append(make_record())

    with running(store, is_durable=False, max_queue=10) as log:
        asyncio.run(use(log))
        assert log.stats().num_dropped == 5
        store.may_write.set()
    assert len(ids(database)) == 10
    assert log.stats().commits.num_traces == 10


def test_a_full_durable_queue_refuses(database: Database) -> None:
    store = CountingStore(database)

    async def use(log: TraceLog) -> None:
        for _ in range(4):
            log.submit(make_record())
        with pytest.raises(ServerUnavailableError, match="queue is full"):
            log.check()
        with pytest.raises(ServerUnavailableError, match="queue is full"):
            await log.append(make_record())

    with running(store, max_queue=4) as log:
        asyncio.run(use(log))
        store.may_write.set()
    assert len(ids(database)) == 4
    assert (log.stats().num_failed, log.stats().num_dropped) == (1, 0), "it was told, so nothing was lost"


def test_a_queue_is_full_of_bytes_too(database: Database) -> None:
    store = CountingStore(database)
    big = [make_record(num_request_bytes=1000), make_record(prompt_token_ids=range(1000))]

    async def use(log: TraceLog) -> None:
        for record in big:
            log.check()
            log.submit(record)
        with pytest.raises(ServerUnavailableError, match="queue is full"):
            log.check()
        log.submit(make_record())
        assert (log.stats().num_queued, log.stats().num_dropped) == (2, 1)
        store.may_write.set()
        await until(lambda: log.stats().num_queued == 0)
        log.check()

    with running(store, max_queue_bytes=2000) as log:
        asyncio.run(use(log))
    assert ids(database) == [record.id for record in big]


def test_stop_writes_what_is_queued(store: TraceStore, database: Database) -> None:
    with running(store) as log:
        for _ in range(20):
            log.submit(make_record())
    assert len(ids(database)) == 20
    log.submit(make_record())
    assert log.stats().num_dropped == 1


def test_one_bad_record_does_not_take_the_others_with_it(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    store = CountingStore(database)
    good = make_record()
    bad = make_record(sampling={"temperature": float("nan")})

    async def use(log: TraceLog) -> None:
        tasks = [asyncio.create_task(log.append(record)) for record in (make_record(), good, bad, make_record(), good)]
        await asyncio.sleep(0)
        store.may_write.set()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes[:4]] == [
            type(None), type(None), ServerUnavailableError, type(None)
        ]  # fmt: skip
        await log.append(make_record())
        log.check()

    with running(store) as log:
        asyncio.run(use(log))
    assert len(ids(database)) == 4
    assert log.stats().num_failed == 1
    assert bad.id in caplog.text


def test_a_request_cancelled_while_it_waits_is_logged_all_the_same(database: Database) -> None:
    store = CountingStore(database)

    async def use(log: TraceLog) -> None:
        task = asyncio.create_task(log.append(make_record()))
        await asyncio.sleep(0)
        task.cancel()
        store.may_write.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    with running(store) as log:
        asyncio.run(use(log))
    assert len(ids(database)) == 1


# -- faults --------------------------------------------------------------------------------------------------------


async def breaks_and_mends(log: TraceLog, break_it: "Fault") -> None:
    """Durable: who waits is told, check refuses, all is kept (what was refused as failed), and then all is well."""
    await log.append(make_record())
    with break_it:
        with pytest.raises(ServerUnavailableError):
            await log.append(make_record(metadata={"is": "refused"}))
        with pytest.raises(ServerUnavailableError, match="trace log"):
            log.check()
        log.submit(make_record(status="cancelled"))
    await until_mended(log)
    log.check()
    await log.append(make_record())


class Fault:
    """A context manager inside which nothing can be written."""

    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


class Locked(Fault):
    """Another process holds the write lock."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        self._other = sqlite3.connect(self._path, isolation_level=None)
        self._other.execute("BEGIN IMMEDIATE")

    def __exit__(self, *_: object) -> None:
        self._other.execute("ROLLBACK")
        self._other.close()


class Gone(Fault):
    """The file is moved away (a mount that went) and comes back."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        self._path.rename(self._path.with_suffix(".away"))

    def __exit__(self, *_: object) -> None:
        self._path.with_suffix(".away").rename(self._path)


class Full(Fault):
    """SQLite may not grow the file: what it reports is what it reports on a full disk."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def _limit(self, pages: str) -> None:
        with self._database.engine.connect() as connection:
            connection.exec_driver_sql(f"PRAGMA max_page_count={pages}").close()

    def __enter__(self) -> None:
        self._limit("1")  # raised to the present size

    def __exit__(self, *_: object) -> None:
        self._limit("1073741823")


class Stopped(Fault):
    """The PostgreSQL server crashes and is started again."""

    def __init__(self, server: Cluster) -> None:
        self._server = server

    def __enter__(self) -> None:
        self._server.stop()

    def __exit__(self, *_: object) -> None:
        self._server.start()


@pytest.mark.parametrize("kind", ["locked", "gone"])
def test_durable_sqlite_breaks_and_mends(sqlite_url: str, tmp_path: Path, kind: str) -> None:
    database = open_database(sqlite_url, busy_timeout_seconds=0.01)
    path = tmp_path / "test.db"
    with running(TraceStore(database)) as log:
        asyncio.run(breaks_and_mends(log, Locked(path) if kind == "locked" else Gone(path)))
    assert statuses(database) == ["ok", "failed", "cancelled", "ok"]
    assert (log.stats().num_failed, log.stats().num_dropped) == (1, 0)
    database.close()


def test_durable_on_a_full_disk(sqlite_url: str) -> None:
    """A few bytes may still fit, so the probe may mend the log before the disk has room: then it breaks again."""
    database = open_database(sqlite_url)
    big = [{"role": "user", "content": os.urandom(200_000).hex()}]

    async def use(log: TraceLog) -> None:
        await log.append(make_record())
        full = Full(database)
        with full:
            with pytest.raises(ServerUnavailableError, match="full"):
                await log.append(make_record(big))
            log.submit(make_record(big))
        await until_mended(log)
        await log.append(make_record(big))

    with running(TraceStore(database)) as log:
        asyncio.run(use(log))
    assert statuses(database) == ["ok", "failed", "ok", "ok"]
    assert log.stats().num_dropped == 0
    database.close()


@pytest.mark.postgres
def test_durable_postgres_breaks_and_mends(postgres_url: str) -> None:
    database = open_database(postgres_url)
    with running(TraceStore(database)) as log:
        asyncio.run(breaks_and_mends(log, Stopped(cluster())))
    assert statuses(database) == ["ok", "failed", "cancelled", "ok"]
    database.close()


def test_an_idle_log_notices_that_the_file_went(sqlite_url: str, tmp_path: Path) -> None:
    """So that the next request gets its 503 before the first byte."""
    database = open_database(sqlite_url)

    async def use(log: TraceLog) -> None:
        with Gone(tmp_path / "test.db"):
            await until_broken(log)
            with pytest.raises(ServerUnavailableError):
                log.check()
        await until_mended(log)
        log.check()

    with running(TraceStore(database)) as log:
        asyncio.run(use(log))
    database.close()


def test_relaxed_keeps_what_fits_while_the_database_is_away(sqlite_url: str, tmp_path: Path) -> None:
    database = open_database(sqlite_url)

    async def use(log: TraceLog) -> None:
        await log.append(make_record())
        await until(lambda: log.stats().commits.num_traces == 1)
        with Gone(tmp_path / "test.db"):
            await until_broken(log)
            for _ in range(7):
                log.check()
                await log.append(make_record())
            assert log.stats().num_dropped == 2
        await until_mended(log)

    with running(TraceStore(database), is_durable=False, max_queue=5) as log:
        asyncio.run(use(log))
    assert len(ids(database)) == 6
    assert (log.stats().num_dropped, log.stats().num_failed) == (2, 0)
    database.close()


def test_stop_with_a_broken_database_counts_what_is_lost(sqlite_url: str, tmp_path: Path) -> None:
    database = open_database(sqlite_url)
    store = TraceStore(database)
    with Gone(tmp_path / "test.db"):
        with running(store) as log:
            log.submit(make_record())
            log.submit(make_record())
            with pytest.raises(ServerUnavailableError):
                asyncio.run(log.append(make_record()))
        assert (log.stats().num_dropped, log.stats().num_failed) == (2, 1)
    database.close()


@pytest.mark.parametrize("is_awaited", [False, True])
def test_a_commit_that_was_done_although_it_failed_is_not_done_twice(database: Database, is_awaited: bool) -> None:
    """A connection cut during COMMIT: the trace is there, the writer does not know, and whoever waits is told."""

    class CutOnce(TraceStore):
        was_cut = False

        def write(self, records: Sequence[TraceRecord], *, is_retry: bool = False) -> list[str]:
            written = super().write(records, is_retry=is_retry)
            if not self.was_cut:
                self.was_cut = True
                raise DatabaseUnavailableError("the connection broke during COMMIT")
            return written

    async def use(log: TraceLog) -> None:
        if is_awaited:
            with pytest.raises(ServerUnavailableError):
                await log.append(make_record())
        else:
            log.submit(make_record())
            await until_broken(log)
        await until_mended(log)
        await log.append(make_record())

    with running(CutOnce(database)) as log:
        asyncio.run(use(log))
    assert statuses(database) == ["failed" if is_awaited else "ok", "ok"]
    assert log.stats().num_failed == is_awaited


def test_a_client_that_left_during_a_failing_commit_is_logged(database: Database) -> None:
    class FailOnce(CountingStore):
        def write(self, records: Sequence[TraceRecord], *, is_retry: bool = False) -> list[str]:
            written = super().write(records, is_retry=is_retry) if self.batches else []
            if not written:
                assert self.may_write.wait(PATIENCE_SECONDS)
                self.batches.append(0)
                raise DatabaseUnavailableError("locked")
            return written

    store = FailOnce(database)

    async def use(log: TraceLog) -> None:
        task = asyncio.create_task(log.append(make_record()))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        store.may_write.set()
        await until(lambda: log.stats().commits.num_traces == 1)

    with running(store) as log:
        asyncio.run(use(log))
    assert statuses(database) == ["ok"]
    assert (log.stats().num_failed, log.stats().num_dropped) == (0, 0)


def test_two_writers_on_one_database(database_url: str) -> None:
    """Both commit all the time; nothing is lost, and one episode of both stays one."""
    databases = [open_database(database_url) for _ in range(2)]
    shared = make_record()

    def write(database: Database) -> None:
        async def use(log: TraceLog) -> None:
            for _ in range(10):
                records = [replace(make_record(), episode=shared.episode), make_record(), make_record()]
                await asyncio.gather(*(log.append(record) for record in records))

        with running(TraceStore(database)) as log:
            asyncio.run(use(log))

    threads = [threading.Thread(target=write, args=[database]) for database in databases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with databases[0].read() as connection:
        assert connection.scalar(select(func.count()).select_from(traces)) == 60
        assert connection.execute(text("SELECT count(*) FROM episodes")).scalar() == 41
    for database in databases:
        database.close()


WRITER = """
import asyncio, sys
from server.storage.database import open_database
from server.traces.episodes import Episodes
from server.traces.log import TraceLog
from server.traces.store import TraceStore
from tests.server.traces.builders import make_record

async def load(log):
    async def client():
        while True:
            record = make_record()
            await log.append(record)
            print(record.id, flush=True)
    await asyncio.gather(*(client() for _ in range(8)))

database = open_database(sys.argv[1])
log = TraceLog(TraceStore(database), Episodes(database))
log.start()
asyncio.run(load(log))
"""


def kill_a_writer(url: str, num_acknowledged: int) -> set[str]:
    """Runs a writer in a process of its own, kills it after so many acknowledgements, and returns all it gave."""
    command = [sys.executable, "-c", WRITER, url]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        acknowledged = {process.stdout.readline().strip() for _ in range(num_acknowledged)}
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read()
    return acknowledged | {line for line in rest.splitlines(keepends=False) if len(line) == len("trace-") + 32}


def test_kill_9_loses_nothing_that_was_acknowledged(database_url: str) -> None:
    acknowledged: set[str] = set()
    for number in (1, 60):
        acknowledged |= kill_a_writer(database_url, number)
    database = open_database(database_url)
    stored = set(ids(database))
    assert acknowledged
    assert acknowledged <= stored
    with database.read() as connection:
        contents = connection.execute(text("SELECT count(*) FROM trace_contents")).scalar()
    assert contents == len(stored), "nothing is half-written"
    database.close()


@pytest.mark.slow
def test_kill_9_fifty_times(database_url: str) -> None:
    acknowledged: set[str] = set()
    for number in range(1, 51):
        acknowledged |= kill_a_writer(database_url, 1 + 7 * number % 50)
    database = open_database(database_url)
    assert acknowledged <= set(ids(database))
    database.close()


def test_a_database_that_hangs_counts_as_broken(store: TraceStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "STALL_SECONDS", 0.02)
    speaks, write = threading.Event(), store.write

    def hang(records: Sequence[TraceRecord], *, is_retry: bool = False) -> list[str]:
        speaks.wait()
        return write(records, is_retry=is_retry)

    async def use() -> None:
        monkeypatch.setattr(store, "write", hang)
        with running(store) as log:
            try:
                with pytest.raises(ServerUnavailableError, match="does not answer"):
                    await log.append(make_record())
                with pytest.raises(ServerUnavailableError, match="has not answered"):
                    log.check()
                assert log.stats().fault is not None
            finally:
                speaks.set()
            await until(lambda: log.stats().fault is None)
            log.check()

    asyncio.run(use())
    assert statuses(store.database) == ["failed"], "its client was told so"
