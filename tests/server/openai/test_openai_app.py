"""The application's life: loading, failing to load, draining, two in one process."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from fastapi import FastAPI

from server.app import Runtime, create_app
from server.errors import ConfigError
from server.metrics import Metrics
from tests.server.openai.harness import MODEL, asgi_client, async_test, scripted_runtime, serving
from tests.server.openai.scripted import Answer, ScriptedEngine, byte_tokenizer

BODY = {"model": MODEL, "prompt": "hi"}


def slow_app(may_load: asyncio.Event, closed: list[str]) -> FastAPI:
    @asynccontextmanager
    async def open_runtime(metrics: Metrics) -> AsyncIterator[Runtime]:
        await may_load.wait()
        async with scripted_runtime(ScriptedEngine(byte_tokenizer()), metrics) as runtime:
            yield runtime
        closed.append("runtime")

    return create_app(open_runtime, is_loopback=True)


@async_test
async def test_listens_while_loading_and_closes_the_runtime_at_the_end() -> None:
    may_load, closed = asyncio.Event(), []
    app = slow_app(may_load, closed)
    async with app.router.lifespan_context(app), asgi_client(app) as http:
        early = [await http.get("/health"), await http.get("/v1/models"), await http.post("/v1/completions", json=BODY)]
        metrics = await http.get("/metrics")
        may_load.set()
        while not app.state.service.is_open:  # noqa: ASYNC110 - the records open on a thread
            await asyncio.sleep(0.001)
        healthy = await http.get("/health")
        assert closed == []
    assert [response.status_code for response in early] == [503, 503, 503]
    assert all("loading" in response.json()["error"]["message"] for response in early)
    assert early[0].headers["retry-after"] == "1"
    assert metrics.status_code == 200
    assert healthy.status_code == 200
    assert closed == ["runtime"]


@async_test
async def test_a_model_that_cannot_be_loaded_is_reported() -> None:
    @asynccontextmanager
    async def open_runtime(metrics: Metrics) -> AsyncIterator[Runtime]:
        raise ConfigError("no such model")
        yield  # makes it a generator

    failures: list[Exception] = []
    app = create_app(open_runtime, is_loopback=True, on_failure=failures.append)
    async with app.router.lifespan_context(app), asgi_client(app) as http:
        while not failures:  # noqa: ASYNC110 - a turn or two of the loop
            await asyncio.sleep(0)
        health = await http.get("/health")
    assert str(failures[0]) == "no such model"
    assert health.status_code == 503
    assert "no such model" in health.json()["error"]["message"]


@async_test
async def test_draining_refuses_new_requests_and_finishes_those_under_way() -> None:
    release = asyncio.Event()

    async with serving() as h:
        plain = h.engine._play

        async def held_back(*args: object) -> None:
            await release.wait()
            await plain(*args)  # type: ignore[arg-type]

        h.engine._play = held_back  # type: ignore[method-assign, assignment]
        service = h.app.state.service
        running = asyncio.create_task(h.post("/v1/completions", BODY))
        while not h.engine.submitted:  # noqa: ASYNC110 - a few turns of the loop
            await asyncio.sleep(0)
        service.refuse("the server is shutting down")
        refused = await h.post("/v1/completions", BODY)
        health = await h.http.get("/health")
        drained = asyncio.create_task(service.drained())
        await asyncio.sleep(0)
        assert not drained.done()
        release.set()
        await drained
        answer = await running
    assert (refused.status_code, health.status_code) == (503, 503)
    assert "shutting down" in refused.json()["error"]["message"]
    assert answer.json()["choices"][0]["text"] == "Hello!"


@async_test
async def test_an_unhealthy_engine_shows_in_health() -> None:
    async with serving() as h:
        h.engine.unhealthy = "the last 3 engine steps failed"
        health = await h.http.get("/health")
    assert health.status_code == 503
    assert "engine steps failed" in health.json()["error"]["message"]


@async_test
async def test_two_applications_in_one_process() -> None:
    async with serving("one") as first, serving("two") as second:
        answers = [await h.client.completions.create(**BODY) for h in (first, second)]
        metrics = (await first.http.get("/metrics")).text
    assert [answer.choices[0].text for answer in answers] == ["one", "two"]
    assert 'sterna_http_responses_total{endpoint="completions",status="200"} 1.0' in metrics


@async_test
async def test_models() -> None:
    async with serving() as h:
        listed = [model async for model in await h.client.models.list()]
        one = await h.client.models.retrieve(MODEL)
    assert listed == [one]
    assert one.model_extra == {"max_model_len": 2048, "root": MODEL, "parent": None}


@pytest.mark.parametrize("stream", [False, True])
@async_test
async def test_metrics_of_a_generation(stream: bool) -> None:
    async with serving(Answer("Hey")) as h:
        await h.post("/v1/completions", {**BODY, "stream": stream})
        text = (await h.http.get("/metrics")).text
    labels = f'endpoint="completions",finished_reason="stop",model="{MODEL}"'
    assert f"sterna_request_success_total{{{labels}}} 1.0" in text
    assert f'sterna_generation_tokens_total{{model="{MODEL}"}} 4.0' in text
    assert f'sterna_prompt_tokens_total{{model="{MODEL}"}} 2.0' in text
