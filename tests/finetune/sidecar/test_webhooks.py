"""Webhooks: signed, told in order, tried again, and none lost or told after somebody else took over."""

import hashlib
import hmac
import json
from collections.abc import Iterator

import httpx
import pytest

from finetune.rounds.errors import LeaseLostError
from finetune.rounds.lease import Lease, take, try_take
from finetune.rounds.round import Result
from finetune.rounds.store import RoundStore
from finetune.sidecar.webhooks import Webhooks
from server.adapters.registry import Registry
from server.adapters.version import NewVersion, VersionRef
from server.storage.database import Database

URL = "https://hooks.example.org/sterna?token=secret"


class Receiver:
    def __init__(self) -> None:
        self.events: list[dict[str, object]] = []
        self.requests: list[httpx.Request] = []
        self.statuses: Iterator[int] = iter(())

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        status = next(self.statuses, 200)
        if status == 0:
            raise httpx.ConnectError("connection refused", request=request)
        if status == 200:
            self.events.append(json.loads(request.content))
        return httpx.Response(status)


class Bench:
    def __init__(self, database: Database) -> None:
        self.database = database
        self.registry = Registry(database)
        self.receiver = Receiver()
        self.now = 0.0
        self.hooks = self.make()
        self.lease: Lease = take(database, "webhooks")

    def make(self, *urls: str) -> Webhooks:
        return Webhooks(
            self.database,
            urls or [URL],
            "s3cret",
            transport=httpx.MockTransport(self.receiver),
            clock=lambda: self.now,
            wall_clock=lambda: 1_700_000_000.5,
        )

    def version(self, number: int) -> VersionRef:
        directory = f"tools/{number}"
        self.registry.begin_import(directory)
        new = NewVersion("tools", f"sha256:{number}", "sha256:0", 4, 1, 1, "tools-r1", None, directory)
        return self.registry.add_version(new, asked_by="test", reason="test")[0].ref

    def told(self) -> list[tuple[object, object]]:
        return [(event["type"], event["version"]) for event in self.receiver.events]


@pytest.fixture
def bench(database: Database) -> Bench:
    made = Bench(database)
    made.version(1)
    made.hooks.deliver(made.lease)  # from here on
    return made


def test_what_is_told_and_how_it_is_signed(bench: Bench) -> None:
    lease = take(bench.database, "tools")
    store = RoundStore(bench.database)
    round = store.begin(lease, cause="test", base_digest="sha256:0", settings={})
    store.finish(lease, store.note(lease, round, {}, version=2), Result.CANARY, "it calls better")
    two, three = bench.version(2), bench.version(3)
    bench.registry.start_canary(two, share=0.2, asked_by="key sidecar", reason="the gate")
    bench.registry.promote(two, asked_by="key sidecar", reason="no harm")
    bench.registry.reject(three, asked_by="a human", reason="no")
    bench.registry.rollback("tools", asked_by="key sidecar", reason="harm")
    bench.hooks.deliver(bench.lease)
    assert bench.told() == [("promoted", "tools@2"), ("rejected", "tools@3"), ("rolled_back", "tools@2")]
    first = bench.receiver.events[0]
    assert (first["asked_by"], first["reason"], first["to_state"]) == ("key sidecar", "no harm", "live")
    assert first["round"] == {"id": "tools-r1", "result": "canary", "reason": "it calls better"}
    assert bench.receiver.events[1]["round"] is None
    request = bench.receiver.requests[0]
    expected = hmac.new(b"s3cret", b"1700000000." + request.content, hashlib.sha256).hexdigest()
    assert request.headers["sterna-signature"] == f"t=1700000000,v1={expected}"
    assert request.headers["sterna-id"] == first["id"]
    bench.hooks.deliver(bench.lease)
    assert len(bench.receiver.requests) == 3, "once is enough"


def test_an_endpoint_that_fails_is_told_later_and_in_order(bench: Bench) -> None:
    for number in (1, 2):
        if number > 1:
            bench.version(number)
        bench.registry.reject(VersionRef("tools", number), asked_by="test", reason="test")
    bench.receiver.statuses = iter([0, 500, 200, 200])
    waited = []
    while len(bench.receiver.events) < 2:
        bench.hooks.deliver(bench.lease)
        waited.append(len(bench.receiver.requests))
        bench.now += 0.5
    assert bench.told() == [("rejected", "tools@1"), ("rejected", "tools@2")]
    assert waited == [1, 1, 2, 2, 2, 2, 4], "after 1 s, then after 2 s; then both at once"


def test_one_that_fails_holds_back_no_other(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.hooks = bench.make("https://down.example.org/x?token=secret", URL)
    bench.hooks.deliver(bench.lease)
    bench.registry.reject(VersionRef("tools", 1), asked_by="test", reason="test")
    bench.receiver.statuses = iter([503])
    bench.hooks.deliver(bench.lease)
    assert bench.told() == [("rejected", "tools@1")]
    assert "down.example.org" in caplog.text
    assert "secret" not in caplog.text


class _NotGzip(httpx.SyncByteStream):
    def __iter__(self) -> Iterator[bytes]:
        yield b"not gzip"


def test_what_an_endpoint_says_beside_its_status_is_its_own(bench: Bench) -> None:
    """A body that cannot be decoded stopped the delivery to all, and was met again every two seconds."""

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.host == "odd.example.org":
            return httpx.Response(200, headers={"content-encoding": "gzip"}, stream=_NotGzip())
        return bench.receiver(request)

    transport = httpx.MockTransport(answer)
    hooks = Webhooks(bench.database, ["https://odd.example.org/", URL], "s3cret", transport=transport)
    hooks.deliver(bench.lease)
    bench.registry.reject(VersionRef("tools", 1), asked_by="test", reason="test")
    hooks.deliver(bench.lease)
    assert bench.told() == [("rejected", "tools@1")]


def test_a_kill_loses_none(bench: Bench) -> None:
    """Told and not noted: it is told again with the same id. Not told: it is told by the next process."""
    bench.registry.reject(VersionRef("tools", 1), asked_by="test", reason="test")
    thief = try_take(bench.database, "webhooks", bench.lease.holder)
    assert isinstance(thief, Lease)
    with pytest.raises(LeaseLostError):
        bench.hooks.deliver(bench.lease)
    bench.make().deliver(thief)
    assert bench.told() == [("rejected", "tools@1")] * 2
    assert bench.receiver.events[0]["id"] == bench.receiver.events[1]["id"]
    bench.version(2)
    bench.registry.reject(VersionRef("tools", 2), asked_by="test", reason="test")
    bench.make().deliver(thief)
    assert bench.told()[-1] == ("rejected", "tools@2")
