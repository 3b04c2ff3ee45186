"""The sidecar's port: metrics of a round, rounds on request, and who may ask."""

import json
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from finetune.gate.settings import GateSettings
from finetune.rounds.errors import UnknownAdapterError
from finetune.rounds.gating import decision_of
from finetune.rounds.lease import take
from finetune.rounds.round import Result, Round
from finetune.rounds.store import RoundStore
from finetune.sidecar.app import build_app
from finetune.sidecar.metrics import SidecarMetrics
from server.storage.database import Database
from server.storage.errors import DatabaseUnavailableError
from tests.finetune.rounds.decisions import a_decision


class Bench:
    def __init__(self, database: Database) -> None:
        self.store = RoundStore(database)
        self.lease = take(database, "tools")
        self.metrics = SidecarMetrics()
        self.asked: list[tuple[str, int | None]] = []
        self.refused: tuple[int, str] | None = None
        self.unknown: set[str] = set()
        app = build_app(
            self.store,
            self.metrics,
            request_round=self._request,
            may_ask=lambda key: self.refused if key != "Bearer good" else None,
        )
        self.http = TestClient(app)

    def _request(self, adapter: str, parent: int | None) -> None:
        if adapter in self.unknown:
            raise UnknownAdapterError(f"there is no adapter '{adapter}'")
        self.asked.append((adapter, parent))

    def round(self, **columns: Any) -> Round:
        round = self.store.begin(self.lease, cause="test", base_digest="sha256:0", settings={"rank": 4})
        return self.store.note(self.lease, round, {}, **columns)

    def value(self, name: str, **labels: str) -> float | None:
        text = self.http.get("/metrics").text
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == f"sterna_{name}" and labels.items() <= sample.labels.items():
                    return float(sample.value)
        return None


@pytest.fixture
def bench(database: Database) -> Bench:
    return Bench(database)


def test_rounds_on_request(bench: Bench) -> None:
    assert bench.http.get("/health").json() == {"status": "ok"}
    reply = bench.http.post("/rounds", json={"adapter": "tools", "parent": 7})
    assert reply.status_code == 202
    assert bench.http.post("/rounds", json={"adapter": "tools"}).status_code == 202
    bench.unknown = {"tolls"}
    reply = bench.http.post("/rounds", json={"adapter": "tolls"})
    assert (reply.status_code, reply.json()["error"]["message"]) == (404, "there is no adapter 'tolls'")
    assert bench.asked == [("tools", 7), ("tools", None)]
    bench.round()
    (one,) = bench.http.get("/rounds", params={"adapter": "tools"}).json()["data"]
    assert (one["id"], one["phase"], one["result"]) == ("tools-r1", "snapshot", None)
    assert bench.http.get("/rounds", params={"adapter": "others"}).json()["data"] == []


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"{", "the body must be JSON"),
        (b"[]", "an object with 'adapter'"),
        (b'{"adapter": "tools", "from": 3}', "unknown key 'from'"),
        (b'{"adapter": "../x"}', "is no adapter name"),
        (b'{"adapter": "tools", "parent": true}', "'parent' is a version's number, not true"),
        (b'{"adapter": "tools", "parent": 0}', "'parent' is a version's number, not 0"),
        (b'{"adapter": "tools", "parent": 100000000000000000000000}', "'parent' is a version's number, not 1000"),
        (b" " * 70_000, "exceeds"),
    ],
)
def test_bad_requests(bench: Bench, body: bytes, reason: str) -> None:
    reply = bench.http.post("/rounds", content=body, headers={"Content-Type": "application/json; charset=utf-8"})
    assert reply.status_code == 400
    assert reason in reply.json()["error"]["message"]
    assert bench.asked == []


def test_what_a_foreign_web_page_can_send_begins_no_round(bench: Bench) -> None:
    for headers in ({"Content-Type": "text/plain"}, {}):
        reply = bench.http.post("/rounds", content=b'{"adapter": "tools"}', headers=headers)
        assert reply.status_code == 415
        assert "application/json" in reply.json()["error"]["message"]
    assert bench.asked == []


def test_a_database_that_is_away_is_said(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(adapter: str | None) -> list[Round]:
        raise DatabaseUnavailableError("the database is locked")

    monkeypatch.setattr(bench.store, "list", away)
    reply = bench.http.get("/rounds")
    assert (reply.status_code, reply.json()["error"]["message"]) == (503, "the database is locked")


def test_whom_the_server_refuses_is_refused(bench: Bench) -> None:
    bench.refused = (401, "no key")
    for reply in (bench.http.get("/rounds"), bench.http.post("/rounds", json={"adapter": "tools"})):
        assert (reply.status_code, reply.json()["error"]["message"]) == (401, "no key")
    reply = bench.http.post("/rounds", json={"adapter": "tools"}, headers={"Authorization": "Bearer good"})
    assert reply.status_code == 202
    assert bench.http.get("/metrics").status_code == 200, "as the server's: for whoever reaches the port"


def test_the_metrics_of_a_round(bench: Bench) -> None:
    round = bench.round()
    bench.metrics.on_phase(round)
    assert bench.value("round_phase", adapter="tools", phase="snapshot") == 1
    assert bench.value("round_phase", adapter="tools", phase="train") == 0
    facts = {"kept": {"train": 90}, "dropped": {"train": {"unlabelled": 7}}}
    round = bench.store.advance(bench.lease, round, facts, snapshot="sha256:s")
    bench.metrics.on_phase(round)
    assert bench.value("examples", adapter="tools", part="train", outcome="kept") == 90
    assert bench.value("examples", adapter="tools", part="train", outcome="unlabelled") == 7
    assert bench.value("examples", adapter="tools", part="train", outcome="duplicate") == 0
    bench.metrics.on_progress(
        round, 3, 12, loss=0.5, grad_norm=2.0, learning_rate=1e-4, tokens_per_second=300.0, num_tokens=2000,
        validation_loss=0.7,
    )  # fmt: skip
    assert bench.value("round_progress_ratio", adapter="tools") == 0.25
    assert bench.value("train_validation_loss", adapter="tools") == 0.7
    for name, value in (("loss", 0.5), ("grad_norm", 2.0), ("learning_rate", 1e-4), ("tokens_per_second", 300.0)):
        assert bench.value(f"train_{name}", adapter="tools") == value
    assert bench.value("train_tokens_total", adapter="tools") == 2000
    for _ in range(3):
        round = bench.store.advance(bench.lease, round, {}, version=1)
    decision = a_decision(GateSettings())
    round = bench.store.advance(bench.lease, round, {}, decision=json.loads(decision.to_json()))
    assert decision_of(round) == decision
    for _ in range(2):  # the server was away: taken up again
        bench.metrics.on_phase(round)
    assert bench.value("gate_total", result="promote") == 0, "when it has been carried out"
    assert bench.value("gate_total", result="reject") == 0
    assert bench.value("held_out_score", adapter="tools", metric="balanced_accuracy", side="candidate") == 1.0
    assert bench.value("held_out_score", adapter="tools", metric="balanced_accuracy", side="live") == 0.5
    bench.metrics.on_phase(bench.store.finish(bench.lease, round, Result.CANARY, "test"))
    assert bench.value("gate_total", result="promote") == 1, "once"
    assert bench.value("rounds_total", result="canary") == 1
    assert bench.value("round_phase", adapter="tools", phase="promote") == 0
