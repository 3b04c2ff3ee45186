"""A request that a shadow version answers too: after the live answer, into the log, and into nothing that counts."""

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

from server.traces.queries import FullTrace
from tests.server.adapters.fake_engine import settle
from tests.server.adapters.make import WHO
from tests.server.openai.harness import Harness, async_test, serving
from tests.server.openai.scripted import Answer
from tests.server.openai.test_openai_adapters import USER, add, ask
from tests.server.openai.test_openai_traces import logged, settled


async def with_shadow(h: Harness, path: Path, share: float = 1.0) -> str:
    """The base is live, one version is shadow; its digest."""
    version = await add(h, path, 1)
    assert h.records.adapters is not None
    assert h.records.versions is not None
    act = partial(h.records.versions.registry.start_shadow, version.ref, share=share, **WHO)
    await h.records.adapters.change(act)
    return version.digest


def by_version(h: Harness) -> list[str | None]:
    return [one.adapter.digest if one.adapter else None for one in h.engine.submitted]


@async_test
async def test_a_chat_is_run_on_the_shadow_too(tmp_path: Path) -> None:
    async with serving() as h:
        digest = await with_shadow(h, tmp_path)
        body = {"model": "tools", "messages": USER, "max_tokens": 9, "user": "ada", "metadata": {"session_id": "s"}}
        response = await h.post("/v1/chat/completions", body)
        traces = await settled(h, 2)
        metrics = (await h.http.get("/metrics")).text
        assert by_version(h) == [None, digest]
        assert h.engine.submitted[0].token_ids == h.engine.submitted[1].token_ids
    live, shadow = traces
    assert "x-sterna-adapter-version" not in response.headers
    assert live.summary.id == response.headers["x-sterna-trace-id"]
    assert (live.summary.purpose, live.summary.version) == ("user", None)
    one = shadow.summary
    assert (one.purpose, one.version, one.adapter, one.status) == ("evaluation", "tools@1", "tools", "ok")
    assert (one.requested_model, one.user_id, one.session_id) == ("tools@1", "ada", "s")
    assert one.episode_id != live.summary.episode_id
    assert shadow.details["metadata"] == {"session_id": "s", "shadow_of": live.summary.id}
    assert shadow.request["messages"] == USER
    assert 'sterna_shadow_runs_total{outcome="done"} 1.0' in metrics
    assert 'sterna_evaluation_requests_total{endpoint="chat",finished_reason="stop",model="tools@1"} 1.0' in metrics
    assert 'sterna_routed_requests_total{arm="pinned"' not in metrics


@async_test
async def test_streams_and_completions_too(tmp_path: Path) -> None:
    async with serving() as h:
        digest = await with_shadow(h, tmp_path)
        await h.post("/v1/chat/completions", {"model": "tools", "messages": USER, "max_tokens": 9, "stream": True})
        await settled(h, 2)
        await h.post("/v1/completions", {"model": "tools", "prompt": "hi", "max_tokens": 9})
        *_, last = await settled(h, 4)
        assert by_version(h) == [None, digest] * 2
    assert set(last.details["metadata"]) == {"shadow_of"}
    assert (last.summary.endpoint, last.summary.version) == ("completions", "tools@1")


@async_test
async def test_who_is_not_run_on_the_shadow(tmp_path: Path) -> None:
    async with serving() as h:
        await with_shadow(h, tmp_path)
        await ask(h, "tools", **{"X-Sterna-Log": "off"})
        await ask(h, "tools", **{"X-Sterna-Purpose": "evaluation"})
        await ask(h, "tools@1")
        h.app.state.service.refuse("it drains")  # what is under way ends; nothing new begins
        await settle()
        assert len(h.engine.submitted) == 3


@async_test
async def test_a_client_that_left_has_no_shadow(tmp_path: Path) -> None:
    async with serving(Answer("Hel", hang=True)) as h:
        await with_shadow(h, tmp_path)
        asking = asyncio.create_task(ask(h, "tools"))
        while not h.engine.submitted:  # noqa: ASYNC110 - nothing signals it
            await asyncio.sleep(0)
        asking.cancel()
        (trace,) = await settled(h, 1)
        await settle()
        assert len(h.engine.submitted) == 1
    assert trace.summary.status == "cancelled"


@async_test
async def test_a_shadow_that_fails_disturbs_nobody_and_the_end_cuts_one_off(tmp_path: Path) -> None:
    answers = iter((Answer("live"), Answer("sh", finish_reason="error", error="broken"), Answer("live"), hanging()))
    async with serving(lambda token_ids, params: next(answers)) as h:
        await with_shadow(h, tmp_path)
        assert (await ask(h, "tools")).status_code == 200
        assert statuses(await settled(h, 2)) == ["ok", "failed"]
        assert (await ask(h, "tools")).status_code == 200
        while len(h.engine.submitted) < 4:  # noqa: ASYNC110 - nothing signals it
            await asyncio.sleep(0)
        await settle()
        await h.app.state.service.end_shadows()
        assert h.engine.submitted[-1].is_cancelled
        assert statuses(await settled(h, 4)) == ["ok", "failed", "ok", "cancelled"]
        metrics = (await h.http.get("/metrics")).text
    assert 'sterna_shadow_runs_total{outcome="failed"} 2.0' in metrics


def hanging() -> Answer:
    return Answer("Hel", hang=True)


def statuses(traces: list[FullTrace]) -> list[Any]:
    return [one.summary.status for one in traces]


@async_test
async def test_a_share_of_episodes(tmp_path: Path) -> None:
    async with serving() as h:
        await with_shadow(h, tmp_path, share=0.5)
        for episode in range(20):
            await ask(h, "tools", **{"X-Sterna-Episode": f"run {episode}"})
            await settle()
        num_shadows = len(h.engine.submitted) - 20
        await settled(h, 20 + num_shadows)
        assert {one.summary.purpose for one in logged(h)} == {"user", "evaluation"}
    assert 0 < num_shadows < 20
