"""The engine with stand-in phases: killed anywhere it ends with the same result; each fault has one reason."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.dataset.errors import NothingToLearnError
from finetune.errors import DivergedError
from finetune.rounds.engine import Done, Stage, Task
from finetune.rounds.errors import LeaseHeldError, LeaseLostError, StoppedError
from finetune.rounds.lease import Lease, release, take, try_take
from finetune.rounds.round import Phase, Result, Round, RoundRef
from finetune.rounds.store import RoundStore
from finetune.serving.errors import RefusedError, ServerDownError
from server.storage.database import Database, open_database
from server.traces.store import TraceStore
from tests.finetune.rounds.stages import engine, stages
from tests.patience import PATIENCE_SECONDS
from tests.server.traces.builders import make_record

ROOT = Path(__file__).parents[3]


@pytest.fixture
def lease(database: Database) -> Lease:
    return take(database, "tools")


def begin(database: Database, lease: Lease, **changes: Any) -> Round:
    options = {"cause": "test", "base_digest": "sha256:0", "settings": {"rank": 4}} | changes
    return RoundStore(database).begin(lease, **options)


@pytest.fixture
def expected(database: Database, lease: Lease, tmp_path: Path) -> Round:
    """The undisturbed round's end."""
    return engine(database, tmp_path / "undisturbed")[0].run(lease, begin(database, lease))


def test_a_round_goes_through_all_phases(database: Database, lease: Lease, tmp_path: Path) -> None:
    made, watcher = engine(database, tmp_path)
    round = begin(database, lease)
    assert round.ref == RoundRef("tools", 1)
    done = made.run(lease, round)
    assert watcher.phases == ["snapshot", "train", "export", "import", "gate", "promote", "canary"]
    assert watcher.progress[-1] == (6, 6)
    assert done.result is Result.CANARY
    assert (done.version, done.facts["train"].keys()) == (1, {"last"})
    assert done.snapshot is not None
    assert list((tmp_path / "tools-r1").iterdir()) == [], "what people said is not kept"
    assert RoundStore(database).unfinished("tools") is None
    assert begin(database, lease).ref == RoundRef("tools", 2)


def test_one_round_at_a_time(database: Database, lease: Lease) -> None:
    begin(database, lease)
    with pytest.raises(LeaseHeldError, match="unfinished"):
        begin(database, lease)


def test_a_request_is_there_until_its_round_is(database: Database, lease: Lease) -> None:
    store = RoundStore(database)
    options: dict[str, Any] = {"cause": "asked", "base_digest": "sha256:0", "settings": {}}
    assert store.begin_requested(lease, **options) is None
    store.request("tools", 3)
    store.request("tools", 5)
    first = begin(database, lease)
    with pytest.raises(LeaseHeldError, match="unfinished"):
        store.begin_requested(lease, **options)
    assert [(one.adapter, one.parent) for one in RoundStore(database).requests()] == [("tools", 5)], "another sidecar's"
    store.finish(lease, first, Result.REJECTED, "test")
    second = store.begin_requested(lease, **options)
    assert second is not None
    assert (second.ref, second.parent, second.cause) == (RoundRef("tools", 2), 5, "asked")
    assert store.requests() == []


class KilledError(BaseException):
    """Nothing catches it, as nothing catches a kill."""


def dying(at: int) -> Callable[[], None]:
    left = at

    def step() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KilledError

    return step


@pytest.mark.parametrize("at", range(13))
def test_cut_off_before_any_step_it_ends_the_same(
    database: Database, lease: Lease, tmp_path: Path, expected: Round, at: int
) -> None:
    round = begin(database, lease)
    made, _ = engine(database, tmp_path / "cut", stages(dying(at)))
    with pytest.raises(KilledError):
        made.run(lease, round)
    found = RoundStore(database).unfinished("tools")
    assert found is not None
    done = engine(database, tmp_path / "cut")[0].run(lease, found)
    assert done.reason == expected.reason
    assert done.facts == expected.facts
    assert done.num_restarts == 0


NUM_KILLS = int(os.environ.get("STERNA_TEST_KILL_ROUNDS", "5"))
"""50 in the long test: STERNA_TEST_KILL_ROUNDS=50 pytest -m 'slow or postgres' tests/finetune/rounds/test_engine.py"""


@pytest.mark.slow
def test_kill_9_many_times(migrated_url: str, tmp_path: Path, expected: Round) -> None:
    dice = random.Random(20262)
    database = open_database(migrated_url)
    store = RoundStore(database)
    num_kills = num_rounds = 0
    while num_kills < NUM_KILLS:
        lease = take(database, "tools", holder=f"test {num_rounds}")
        store.begin(lease, cause="test", base_digest="sha256:0", settings={"rank": 4})
        release(database, lease)
        num_rounds += 1
        while store.unfinished("tools") is not None:
            environment = {**os.environ, "STERNA_TEST_DIE": str(dice.randrange(5)), "PYTHONPATH": str(ROOT)}
            command = [sys.executable, "-m", "tests.finetune.rounds.stages", migrated_url, str(tmp_path / "killed")]
            code = subprocess.run(command, env=environment, timeout=PATIENCE_SECONDS).returncode
            assert code in (0, -signal.SIGKILL)
            num_kills += code != 0
        done = store.list("tools", limit=1)[0]
        assert (done.reason, done.facts) == (expected.reason, expected.facts)
    database.close()


def failing(phase: Phase, error: Exception) -> dict[Phase, Stage]:
    def fail(task: Task) -> Done:
        raise error

    return stages() | {phase: fail}


@pytest.mark.parametrize(
    ("phase", "error", "result", "reason"),
    [
        (
            Phase.SNAPSHOT,
            NothingToLearnError("tools", 0, 1, {"unlabelled": 7}),
            Result.NOTHING_TO_LEARN,
            "nothing to learn for 'tools': 0 usable examples, at least 1 are wanted; dropped: unlabelled 7",
        ),
        (
            Phase.TRAIN,
            DivergedError("the loss in step 10 is nan"),
            Result.FAILED,
            "training diverged: the loss in step 10 is nan",
        ),
        (Phase.IMPORT, RefusedError(400, "q_proj has\nanother shape"), Result.FAILED, "q_proj has another shape"),
        (Phase.TRAIN, OSError(28, "No space left on device"), Result.FAILED, "[Errno 28] No space left on device"),
    ],
)
def test_a_fault_of_the_data_or_the_operator_ends_it(
    database: Database, lease: Lease, tmp_path: Path, phase: Phase, error: Exception, result: Result, reason: str
) -> None:
    done = engine(database, tmp_path, failing(phase, error))[0].run(lease, begin(database, lease))
    assert (done.result, done.reason, done.phase) == (result, reason, phase)
    assert list((tmp_path / "tools-r1").iterdir()) == []


def test_a_failed_round_takes_back_what_it_imported(database: Database, lease: Lease, tmp_path: Path) -> None:
    abandoned: list[str] = []
    work = failing(Phase.GATE, RefusedError(400, "no"))
    engine(database, tmp_path, work, abandoned=abandoned)[0].run(lease, begin(database, lease))
    assert abandoned == ["tools-r1 failed: no"]


def test_a_server_that_is_away_ends_nothing(database: Database, lease: Lease, tmp_path: Path, expected: Round) -> None:
    work = failing(Phase.GATE, ServerDownError("away for 5 s"))
    with pytest.raises(ServerDownError):
        engine(database, tmp_path, work)[0].run(lease, begin(database, lease))
    found = RoundStore(database).unfinished("tools")
    assert found is not None
    assert found.phase is Phase.GATE
    assert engine(database, tmp_path)[0].run(lease, found).reason == expected.reason


def test_a_deletion_begins_it_anew(database: Database, lease: Lease, tmp_path: Path, expected: Round) -> None:
    """After the training, before anything is imported."""
    gone: list[str] = []

    def deleted(snapshot: str) -> list[str]:
        return [gone.pop()] if gone else []

    work = stages()
    trained = []

    def export(task: Task) -> Done:
        trained.append(task.folder.name)
        if task.round.num_restarts == 0:
            gone.append("trace-1")
        return work[Phase.EXPORT](task)

    made, watcher = engine(database, tmp_path, work | {Phase.EXPORT: export}, deleted=deleted)
    done = made.run(lease, begin(database, lease))
    assert trained == ["attempt-0", "attempt-1"]
    assert watcher.phases[:5] == ["snapshot", "train", "export", "import", "snapshot"]
    assert done.result is Result.CANARY
    assert done.num_restarts == 1
    assert done.facts["train"] == expected.facts["train"]


def test_what_learned_from_a_deleted_trace_goes_even_if_nothing_is_left_to_learn(
    database: Database, lease: Lease, tmp_path: Path
) -> None:
    gone, abandoned = [], list[str]()
    work = stages()

    def snapshot(task: Task) -> Done:
        if task.round.num_restarts:
            raise NothingToLearnError("tools", 0, 1, {"unlabelled": 3})
        return work[Phase.SNAPSHOT](task)  # type: ignore[return-value]

    def gate(task: Task) -> Done:
        gone.append("trace-1")
        return work[Phase.GATE](task)  # type: ignore[return-value]

    made, _ = engine(
        database,
        tmp_path,
        work | {Phase.SNAPSHOT: snapshot, Phase.GATE: gate},
        deleted=lambda snapshot: [gone.pop()] if gone else [],
        abandoned=abandoned,
    )
    done = made.run(lease, begin(database, lease))
    assert (done.result, done.num_restarts) == (Result.NOTHING_TO_LEARN, 1)
    assert len(abandoned) == 1
    assert "nothing to learn" in abandoned[0]


def test_a_round_whose_files_are_elsewhere_begins_anew(
    database: Database, lease: Lease, tmp_path: Path, expected: Round
) -> None:
    with pytest.raises(ServerDownError):
        engine(database, tmp_path / "here", failing(Phase.GATE, ServerDownError("")))[0].run(
            lease, begin(database, lease)
        )
    found = RoundStore(database).unfinished("tools")
    assert found is not None
    done = engine(database, tmp_path / "there")[0].run(lease, found)
    assert done.num_restarts == 1
    assert done.reason == expected.reason


def test_a_decision_is_carried_out_without_the_files(database: Database, lease: Lease, tmp_path: Path) -> None:
    with pytest.raises(ServerDownError):
        engine(database, tmp_path / "here", failing(Phase.PROMOTE, ServerDownError("")))[0].run(
            lease, begin(database, lease)
        )
    found = RoundStore(database).unfinished("tools")
    assert found is not None
    done = engine(database, tmp_path / "there")[0].run(lease, found)
    assert (done.result, done.num_restarts) == (Result.CANARY, 0)


def test_what_comes_later_is_the_next_rounds(database: Database, lease: Lease, tmp_path: Path) -> None:
    store = TraceStore(database)
    store.write([make_record()])
    round = begin(database, lease)
    store.write([make_record()])
    assert round.last_seq == 1
    engine(database, tmp_path)[0].run(lease, round)
    assert begin(database, lease).last_seq == 2


def test_it_stops_when_told_and_when_the_lease_is_lost(database: Database, lease: Lease, tmp_path: Path) -> None:
    round = begin(database, lease)
    is_stopping = False
    work = stages()

    def train(task: Task) -> Any:
        nonlocal is_stopping
        is_stopping = True
        return work[Phase.TRAIN](task)

    made, _ = engine(database, tmp_path, work | {Phase.TRAIN: train}, is_stopping=lambda: is_stopping)
    with pytest.raises(StoppedError, match=r"tools-r1 stops in phase 'train'"):
        made.run(lease, round)
    other = try_take(database, "tools", lease.holder)
    assert isinstance(other, Lease)
    found = RoundStore(database).unfinished("tools")
    assert found is not None
    with pytest.raises(LeaseLostError):
        engine(database, tmp_path)[0].run(lease, found)
    assert RoundStore(database).get(round.ref).phase is Phase.TRAIN
    assert engine(database, tmp_path)[0].run(other, found).result is Result.CANARY


def test_what_a_kill_left_behind_is_swept(database: Database, lease: Lease, tmp_path: Path) -> None:
    made, _ = engine(database, tmp_path)
    done = made.run(lease, begin(database, lease))
    unfinished = begin(database, lease)
    left = [made.folder(done), made.folder(unfinished), tmp_path / "gone-r7" / "attempt-0"]
    for folder in left:
        folder.mkdir(parents=True)
    made.sweep()
    assert [folder.exists() for folder in left] == [False, True, False]


def test_references() -> None:
    assert RoundRef.parse("tools-r12") == ("tools", 12)
    assert RoundRef.parse("a-r1-r2") == ("a-r1", 2)
    assert str(RoundRef("tools", 3)) == "tools-r3"
    assert RoundRef.parse("tools") is None
