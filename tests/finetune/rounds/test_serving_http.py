"""Requests to a server that goes away: tried again with backoff, and given up with the reason."""

import httpx
import pytest

from finetune.serving.errors import RefusedError, ServerDownError
from server.adapters.version import VersionRef
from server.storage.database import Database
from tests.finetune.fake_server import BASE, FakeServer


@pytest.fixture
def server(database: Database) -> FakeServer:
    return FakeServer(database)


def test_a_server_that_comes_back_is_waited_for(server: FakeServer) -> None:
    heard: list[str] = []
    api = server.api(on_away=heard.append)
    server.down = 5
    assert api.base_name() == BASE
    assert server.slept == [0.25, 0.5, 1.0, 2.0, 4.0]
    assert heard == ["The server is shutting down."], "once, not at every try"


def test_patience_has_an_end(server: FakeServer) -> None:
    server.down = 1000
    with pytest.raises(ServerDownError, match=r"http://127.0.0.1:1 has been away for 60 s: "):
        server.api().base_name()
    assert 60 <= sum(server.slept) <= 70


def test_a_refusal_is_no_reason_to_ask_again(server: FakeServer) -> None:
    with pytest.raises(RefusedError, match="there is no adapter 'tools'") as caught:
        server.api().adapter("tools")
    assert caught.value.status == 404
    assert server.slept == []


def test_the_load_is_read_from_the_metrics(server: FakeServer) -> None:
    api = server.api()
    server.num_requests = 3
    assert api.num_requests() == 3
    server.down = 2
    assert api.num_requests() is None, "nobody is there: nothing to step back for"
    assert server.slept == []


def test_a_long_reason_is_cut(server: FakeServer) -> None:
    api = server.api()
    api.create_adapter("tools", "test")
    with pytest.raises(RefusedError, match="no version tools@1"):
        api.reject(VersionRef("tools", 1), reason="x" * 10_000)
    assert api.adapter_names() == ["tools"]


def test_retry_after_is_kept(database: Database) -> None:
    replies = iter([httpx.Response(429, headers={"retry-after": "7"}), httpx.Response(200, json={"data": []})])
    server = FakeServer(database)
    server.handle = lambda request: next(replies)  # type: ignore[method-assign]
    assert server.api().adapter_names() == []
    assert server.slept == [7.0]
