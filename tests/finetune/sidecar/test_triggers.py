"""When a round is due: what counts as new, and since when."""

from datetime import timedelta

import pytest

from finetune.rounds.lease import take
from finetune.rounds.round import Result
from finetune.rounds.store import RoundStore
from finetune.sidecar.triggers import Due, count_new, due
from server.storage.clock import utc_now
from server.storage.database import Database
from server.traces.feedback import Feedback, FeedbackStore, Target
from server.traces.record import TraceRecord
from server.traces.store import TraceStore
from server.traces.viewer import ADMIN
from tests.server.traces.builders import Client, assistant, tool, user

GOOD = Feedback(source="thumbs", score=1.0)


class Log:
    def __init__(self, database: Database) -> None:
        self.client = Client(TraceStore(database, held_out_share=0.0))
        self.feedback = FeedbackStore(database)
        self.number = 0

    def ask(self, *, adapter: str = "tools", is_judged: bool = True, **changes: object) -> TraceRecord:
        self.number += 1
        options = {"adapter": adapter, "requested_model": adapter, "tools": [tool("add")]} | changes
        record = self.client.ask([user(f"question {self.number}")], assistant("yes"), **options)  # type: ignore[arg-type]
        if is_judged:
            self.judge(record)
        return record

    def judge(self, record: TraceRecord) -> None:
        self.feedback.add(ADMIN, Target("trace", record.id), GOOD)


@pytest.fixture
def log(database: Database) -> Log:
    return Log(database)


def asked(database: Database, **options: object) -> Due | None:
    defaults = {"min_new_traces": 3, "every": None, "now": utc_now()}
    return due(database, "tools", **(defaults | options))  # type: ignore[arg-type]


def a_round(database: Database) -> None:
    store, lease = RoundStore(database), take(database, "tools")
    round = store.begin(lease, cause="test", base_digest="sha256:0", settings={})
    store.finish(lease, round, Result.REJECTED, "test")


def test_enough_new_labelled_traces(database: Database, log: Log) -> None:
    for _ in range(2):
        log.ask()
    log.ask(is_judged=False)
    log.ask(adapter="others")
    log.ask(purpose="evaluation")
    assert asked(database) is None
    log.ask()
    assert asked(database) == Due("tools", "3 new labelled traces")
    a_round(database)
    assert asked(database) is None, "they are not new any more"


def test_who_learns_from_unlabelled_traces_waits_for_no_label(database: Database, log: Log) -> None:
    for _ in range(3):
        log.ask(is_judged=False)
    assert asked(database) is None
    assert asked(database, keep_unlabelled=True) == Due("tools", "3 new traces")
    a_round(database)
    assert asked(database, keep_unlabelled=True) is None


def test_a_label_that_comes_late_is_new(database: Database, log: Log) -> None:
    records = [log.ask(is_judged=False) for _ in range(3)]
    a_round(database)
    for record in records:
        log.judge(record)
        log.feedback.add(ADMIN, Target("episode", record.episode.id), GOOD)  # again: the trace counts once
    assert asked(database) == Due("tools", "3 new labelled traces")


def test_imports_are_labelled(database: Database, log: Log) -> None:
    for _ in range(3):
        log.ask(endpoint="import", is_judged=False)
    assert asked(database) is not None
    a_round(database)
    assert count_new(database, "tools", RoundStore(database).list("tools")[0], keep_unlabelled=False) == 0


def test_held_out_traces_do_not_count(database: Database) -> None:
    log = Log(database)
    log.client = Client(TraceStore(database, held_out_share=1.0))
    for _ in range(3):
        log.ask()
    assert asked(database) is None


def test_the_schedule_needs_something_new(database: Database, log: Log) -> None:
    every = timedelta(hours=6)
    assert asked(database, every=every) is None
    log.ask()
    assert asked(database, every=every) == Due("tools", "schedule, 1 new labelled traces")
    a_round(database)
    log.ask()
    assert asked(database, every=every) is None
    assert asked(database, every=every, now=utc_now() + every) is not None
