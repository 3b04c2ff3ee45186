"""The sidecar's turns: what is taken up, begun and left alone, and that one adapter's fault is no other's."""

from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from finetune.config import FinetuneSettings
from finetune.rounds.errors import LeaseHeldError, RoundError, StoppedError, UnknownAdapterError
from finetune.rounds.lease import take
from finetune.rounds.round import Result
from finetune.rounds.runner import Runner
from finetune.rounds.store import RoundStore
from finetune.serving.api import ServerApi
from finetune.sidecar import loop
from finetune.sidecar.loop import Stop, may_ask
from server.adapters.version import VersionRef
from server.config import Remote
from server.storage.database import Database
from tests.finetune.fake_server import FakeServer
from tests.finetune.sidecar.test_triggers import Log


@dataclass
class FakeRunner:
    """As much of a runner as a turn wants; its rounds end at once."""

    database: Database
    api: ServerApi
    store: RoundStore
    ran: list[tuple[str, str, int | None]] = field(default_factory=list)
    forgot: list[str] = field(default_factory=list)
    fault: dict[str, Exception] = field(default_factory=dict)

    undecided = Runner.undecided
    check_known = Runner.check_known

    def forget(self, adapter: str) -> None:
        self.forgot.append(adapter)

    def run(self, adapter: str, *, cause: str, **options: Any) -> Any:
        self.ran.append((adapter, cause, None))
        if adapter in self.fault:
            raise self.fault[adapter]
        lease = take(self.database, adapter, holder="test")
        round = self.store.unfinished(adapter) or self.store.begin(
            lease, cause=cause, base_digest="sha256:0", settings={}
        )
        return self.store.finish(lease, round, Result.REJECTED, "test")

    def run_requested(self, adapter: str, *, cause: str) -> Any:
        if adapter in self.fault:
            raise self.fault[adapter]
        lease = take(self.database, adapter, holder="test")
        round = self.store.begin_requested(lease, cause=cause, base_digest="sha256:0", settings={})
        assert round is not None
        self.ran.append((adapter, cause, round.parent))
        return [self.store.finish(lease, round, Result.REJECTED, "test")]


@pytest.fixture
def server(database: Database) -> FakeServer:
    made = FakeServer(database)
    for name in ("a", "b"):
        made.registry.create(name, asked_by="test", reason="test")
    return made


@pytest.fixture
def runner(database: Database, server: FakeServer) -> FakeRunner:
    return FakeRunner(database, server.api(), RoundStore(database))


def turn(runner: FakeRunner, *asked: tuple[str, int | None], **settings: Any) -> None:
    for adapter, parent in asked:
        runner.store.request(adapter, parent)
    loop._one_turn(runner, FinetuneSettings(**({"min_new_traces": 2} | settings)))  # type: ignore[arg-type]


def test_nothing_is_due(runner: FakeRunner) -> None:
    turn(runner)
    assert runner.ran == []
    assert runner.forgot == ["a", "b"], "what was deleted is forgotten all the same"


def test_a_mistyped_name_is_told_from_what_was_imported_for_a_new_one(runner: FakeRunner, database: Database) -> None:
    runner.check_known("a")
    with pytest.raises(UnknownAdapterError, match=r"no adapter 'tolls', .* adapters here: a, b "):
        runner.check_known("tolls")
    Log(database).ask(adapter="tolls")
    runner.check_known("tolls")


def test_asked_for_unfinished_and_due(runner: FakeRunner, database: Database) -> None:
    log = Log(database)
    for _ in range(2):
        log.ask(adapter="a")
    runner.store.begin(take(database, "b", holder="test"), cause="x", base_digest="sha256:0", settings={})
    turn(runner, ("c", 7))
    assert runner.ran == [
        ("c", "asked for over HTTP", 7),
        ("a", "2 new labelled traces", None),
        ("b", "taken up", None),
    ]
    turn(runner)
    assert len(runner.ran) == 3


def test_only_those_that_are_named(runner: FakeRunner, database: Database) -> None:
    log = Log(database)
    for adapter in ("a", "a", "b", "b"):
        log.ask(adapter=adapter)
    turn(runner, adapters=("b",))
    assert [one[0] for one in runner.ran] == ["b"]


def test_an_undecided_canary_is_waited_for(runner: FakeRunner, database: Database, server: FakeServer) -> None:
    log = Log(database)
    for _ in range(2):
        log.ask(adapter="a")
    (new,) = [
        runner.api.import_version(
            "a", _archive(), base_digest=server.base_digest, origin="test", reason="test", parent=None
        )
    ]
    server.registry.start_canary(VersionRef("a", new["number"]), share=0.5, asked_by="test", reason="test")
    turn(runner)
    assert runner.ran == []
    server.registry.reject(VersionRef("a", 1), asked_by="test", reason="test")
    turn(runner)
    assert [one[0] for one in runner.ran] == ["a"]


def _archive() -> Any:
    class Archive:
        def read_bytes(self) -> bytes:
            return b"weights"

    return Archive()


@pytest.mark.parametrize(
    ("error", "level"),
    [
        (LeaseHeldError("process 7 on elsewhere works on a"), "INFO"),
        (RoundError("a-r1 is unfinished"), "WARNING"),
        (RuntimeError("a bug"), "ERROR"),
        (StoppedError("stopped"), "INFO"),
    ],
)
def test_one_adapters_fault_is_no_others(
    runner: FakeRunner, database: Database, caplog: pytest.LogCaptureFixture, error: Exception, level: str
) -> None:
    caplog.set_level("INFO")
    log = Log(database)
    for adapter in ("a", "a", "b", "b"):
        log.ask(adapter=adapter)
    runner.fault = {"a": error}
    turn(runner)
    assert [one[0] for one in runner.ran] == ["a", "b"]
    (record,) = [one for one in caplog.records if one.name == loop.__name__ and "b-r1" not in one.getMessage()]
    assert record.levelname == level
    assert str(error) in (record.exc_text or "") or str(error) in record.getMessage()


def test_what_was_asked_for_waits_for_its_turn(runner: FakeRunner) -> None:
    runner.fault = {"a": LeaseHeldError("process 7 on elsewhere works on a")}
    turn(runner, ("a", 3), ("b", None), ("b", 4))
    assert runner.ran == [("b", "asked for over HTTP", 4)], "asked twice is asked once"
    runner.fault = {}
    turn(runner)
    assert runner.ran[1:] == [("a", "asked for over HTTP", 3)]
    turn(runner)
    assert len(runner.ran) == 2


def test_sleep_ends_with_the_stop() -> None:
    stop = Stop()
    stop.sleep(0)
    stop.event.set()
    with pytest.raises(StoppedError):
        stop.sleep(1e9)


def test_the_server_says_who_may_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, str]] = []
    replies = iter(
        [
            httpx.Response(200),
            httpx.Response(403, json={"error": {"message": "no scope"}}),
            httpx.Response(502, text="<html>"),
            httpx.Response(200),
        ]
    )

    def get(url: str, *, headers: dict[str, str], timeout: float, trust_env: bool) -> httpx.Response:
        assert (url, trust_env) == (f"{remote.url}/v1/adapters", "there" in remote.url)
        seen.append(headers)
        return next(replies)

    monkeypatch.setattr(httpx, "get", get)
    remote = Remote("http://there", None)
    assert may_ask(remote, "Bearer x") is None
    assert may_ask(remote, None) == (403, "no scope")
    assert may_ask(remote, None) == (502, "the server said 502")
    assert seen == [{"Authorization": "Bearer x"}, {}, {}]
    assert may_ask(remote, "Bearer ü") == (401, "the Authorization header has characters that no API key has")
    remote = Remote("http://127.0.0.1:8000", None)  # no proxy may see a key that is meant for our loopback
    assert may_ask(remote, "Bearer x") is None
