"""kill -9 of a server under load, at random moments, again and again on the same data.

After each restart: every answer whose last byte a client got is in the log exactly once and says what the client read;
every acknowledged import is there, whole, and no half of another; the live version is the last acknowledged one, or the
one that was being promoted when the server died; and the server answers with it.

STERNA_TEST_KILL_ROUNDS (5) is how often. The long test of the issue:
    STERNA_TEST_KILL_ROUNDS=50 pytest -m 'slow or postgres' tests/server/faults/test_kill.py
"""

import itertools
import os
import random
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import func, select

from quant.model_file import open_model
from server.adapters.files import open_files
from server.adapters.registry import Registry
from server.adapters.store import Base, VersionStore
from server.storage.database import Database, open_database
from server.traces.queries import TraceQueries
from server.traces.tables import trace_contents, traces
from server.traces.viewer import Viewer
from tests.patience import until
from tests.server.faults.load import ADAPTER, Told, adapter_zip, operate, use
from tests.server.faults.process import MODEL, Server

pytestmark = pytest.mark.slow

NUM_ROUNDS = int(os.environ.get("STERNA_TEST_KILL_ROUNDS", "5"))
NUM_CLIENTS = 6
SEED = 20261


class Checker:
    """Looks into the database and the adapter store from outside of the server."""

    def __init__(self, database: Database, model: Path, folder: Path) -> None:
        self._database = database
        self._queries = TraceQueries(database)
        self.registry = Registry(database)
        with closing(open_model(model)) as file:
            base = Base(file.digest, file.config, frozenset({MODEL}))
            self._store = VersionStore(self.registry, open_files(str(folder / "adapters"), folder / "copies"), base)

    def traces(self, told: Told) -> None:
        for answer in told.answers:
            trace = self._queries.show(Viewer("", True), answer.trace_id)
            assert trace.summary.status == "ok"
            assert trace.summary.version == answer.version
            assert (trace.answers[0]["message"]["content"] or "") == answer.text
        with self._database.read() as connection:
            ids = [answer.trace_id for answer in told.answers]
            query = select(traces.c.id).where(traces.c.id.in_(ids))
            assert sorted(connection.scalars(query)) == sorted(ids), "each exactly once"
            num_whole = connection.scalar(select(func.count()).select_from(traces.join(trace_contents)))
            assert num_whole == connection.scalar(select(func.count()).select_from(traces)), "no half of a trace"

    def adapters(self, told: Told, known: dict[str, str]) -> dict[str, str]:
        """Digests by version of all that there are. `known`: those of earlier rounds."""
        found = {}
        for adapter in self.registry.adapters():
            for version in adapter.versions.values():
                assert self._store.load(version).digest == version.digest, "no half of a version"
                found[str(version.ref)] = version.digest
        acknowledged = known | told.imported
        assert {ref: found.get(ref) for ref in acknowledged} == acknowledged
        assert len(found) <= len(known) + told.num_imports_begun
        return found

    def live(self) -> str | None:
        live = next((adapter.live for adapter in self.registry.adapters([ADAPTER])), None)
        return None if live is None else str(live.ref)


def one_round(server: Server, archives: Iterator[bytes], num_answers: int, live: str | None) -> Told:
    """Load until clients have so many answers, then the kill."""
    told, is_over = Told(may_be_live=[live]), threading.Event()
    threads = [threading.Thread(target=use, args=(server, number, is_over, told)) for number in range(NUM_CLIENTS)]
    threads.append(threading.Thread(target=operate, args=(server, archives.__next__, is_over, told)))
    for thread in threads:
        thread.start()
    try:
        until(lambda: is_over.is_set() or len(told.answers) >= num_answers, "enough answers")
    finally:
        is_over.set()  # nobody begins anything more; what is under way dies
        server.kill()
        for thread in threads:
            thread.join()
    assert told.faults == []
    return told


def test_kill_9_at_random_moments(database_url: str, tiny_model: Path, tmp_path: Path) -> None:
    dice = random.Random(SEED)
    numbers = itertools.count(1)
    archives = iter(lambda: adapter_zip(tiny_model, tmp_path / "made", next(numbers)), None)
    database = open_database(database_url)
    checker = Checker(database, tiny_model, tmp_path)
    num_answers = num_broken = 0
    known: dict[str, str] = {}
    live: str | None = None
    server = Server(tiny_model, tmp_path, database_url)
    try:
        for _ in range(NUM_ROUNDS):
            told = one_round(server, archives, dice.randint(20, 400), live)
            server = Server(tiny_model, tmp_path, database_url)
            checker.traces(told)
            known = checker.adapters(told, known)
            live = checker.live()
            assert live in told.may_be_live
            answer = server.chat("Who answers?", model=ADAPTER if known else MODEL)
            assert answer.status == 200
            assert answer.headers.get("x-sterna-adapter-version") == live
            num_answers += len(told.answers)
            num_broken += told.num_broken
        assert server.metric("traces_dropped_total") == 0
        assert server.stop() == 0
    finally:
        server.kill()
        database.close()
    assert "Traceback" not in server.errors.read_text()
    assert num_answers >= 20 * NUM_ROUNDS
    assert num_broken > NUM_ROUNDS, "the server was killed in the middle of something"
