"""Hanging up, ending what is under way, and health: the upstream backend against a scripted server."""

import asyncio
from contextlib import aclosing

import pytest

from server.backends.upstream import UpstreamBackend, UpstreamModel
from server.errors import ServerUnavailableError
from server.metrics import Metrics
from server.openai.body import validate
from server.openai.protocol.chat import ChatRequest
from tests.patience import PATIENCE_SECONDS
from tests.server.backends.fake_upstream import HELLO, FakeUpstream, Reply, as_json, sse, upstream
from tests.server.backends.upstream_driver import BODY, KEY, chat, new_call
from tests.server.openai.harness import async_test

HANGING = Reply(sse(*HELLO[:2], done=False).parts, ends="hanging")
SILENT = Reply(ends="hanging")


@async_test
async def test_closing_the_generator_closes_the_connection() -> None:
    metrics = Metrics()
    async with upstream(HANGING) as fake:
        backend = UpstreamBackend(fake.url)
        async with aclosing(backend.chat(validate(BODY, ChatRequest), new_call(metrics))) as chunks:
            await anext(chunks)
        async with asyncio.timeout(PATIENCE_SECONDS):
            await fake.client_left.wait()
        await backend.aclose()
    assert 'finished_reason="cancelled"' in metrics.render()[0].decode()


@pytest.mark.parametrize("reply", [HANGING, SILENT])
@async_test
async def test_cancelling_the_task_closes_the_connection(reply: Reply) -> None:
    async with upstream(reply) as fake:
        backend = UpstreamBackend(fake.url)
        task = asyncio.create_task(chat(backend, BODY))
        await fake.parts_sent.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(PATIENCE_SECONDS):
            await fake.client_left.wait()
        await backend.aclose()


@pytest.mark.parametrize("reply", [HANGING, SILENT])
@async_test
async def test_ending_the_answers_fails_them_with_a_reason(reply: Reply) -> None:
    async with upstream(reply) as fake:
        backend = UpstreamBackend(fake.url)
        tasks = [asyncio.create_task(chat(backend, BODY)) for _ in range(3)]
        while len(fake.asked) < 3:  # noqa: ASYNC110 - a few turns of the loop
            await asyncio.sleep(0)
        await backend.end_answers()
        await backend.end_answers()
        errors = await asyncio.gather(*tasks, return_exceptions=True)
        with pytest.raises(ServerUnavailableError, match="shut down"):
            await chat(backend, BODY)
        await backend.aclose()
    assert [str(error) for error in errors] == ["the server shut down before the answer was complete"] * 3


@async_test
async def test_a_body_that_stays_open_after_done_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.backends.upstream_events.REST_SECONDS", 0)
    async with upstream(Reply(sse(*HELLO).parts, ends="hanging")) as fake:
        backend = UpstreamBackend(fake.url)
        assert (await chat(backend, BODY))[-1]["usage"] is not None
        async with asyncio.timeout(PATIENCE_SECONDS):
            await fake.client_left.wait()
        await backend.aclose()


@async_test
async def test_models() -> None:
    listed = {"object": "list", "data": [{"id": "a", "max_model_len": 8}, {"id": "b", "max_model_len": "x"}, {}, 1]}
    async with upstream(as_json(listed), as_json({"data": None})) as fake:
        backend = UpstreamBackend(fake.url)
        assert await backend.models() == [UpstreamModel("a", 8), UpstreamModel("b", None)]
        with pytest.raises(ServerUnavailableError, match="list of models"):
            await backend.models()
        await backend.aclose()
    assert (fake.asked[0].method, fake.asked[0].path, fake.asked[0].body) == ("GET", "/v1/models", None)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (as_json({"data": []}), None),
        (as_json({"error": "no such path"}, 404), None),
        (as_json({"error": "bad key"}, 401), "refuses this server"),
        (as_json({"error": "starting"}, 503), "starting"),
    ],
)
@async_test
async def test_health_is_what_the_last_look_found(reply: Reply, reason: str | None) -> None:
    async with upstream(reply) as fake:
        backend = UpstreamBackend(fake.url, KEY)
        assert backend.health().is_ready  # nothing is known yet; this starts a look
        backend.health()
        assert backend._probe is not None
        await backend._probe
        health = backend.health()
        assert len(fake.asked) == 1  # and not three
        await backend.aclose()
    assert health.is_ready == (reason is None)
    assert reason is None or (health.reason is not None and reason in health.reason)


@async_test
async def test_health_sees_the_upstream_go_and_come_back() -> None:
    async with upstream(sse(*HELLO)) as fake:
        pass
    backend = UpstreamBackend(fake.url)
    with pytest.raises(ServerUnavailableError):
        await chat(backend, BODY)
    assert backend._http.fault is not None
    port = int(fake.url.rpartition(":")[2])
    again = FakeUpstream(as_json({"data": []}))
    server = await asyncio.start_server(again._serve, "127.0.0.1", port)
    await backend.probe()
    assert backend.health().is_ready
    await backend.aclose()
    server.close()
    await again.close()
