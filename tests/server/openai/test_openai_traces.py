"""What the answers leave in the trace log, and that no answer ends before its record is there."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest
from openai import APIError

from server.storage.errors import DatabaseUnavailableError
from server.traces.filters import TraceFilter
from server.traces.queries import FullTrace
from server.traces.record import TraceRecord
from server.traces.viewer import ADMIN
from tests.patience import PATIENCE_SECONDS
from tests.server.openai.harness import MODEL, Harness, async_test, serving
from tests.server.openai.scripted import DIGEST, Answer
from tests.server.openai.test_openai_chat import CALL, TOOL, USER, chat


def logged(h: Harness) -> list[FullTrace]:
    """Oldest first."""
    page = h.records.queries.list(ADMIN, TraceFilter())
    return [h.records.queries.show(ADMIN, one.id) for one in reversed(page.traces)]


async def settled(h: Harness, count: int) -> list[FullTrace]:
    """For records that nobody waits for."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while len(found := await asyncio.to_thread(logged, h)) < count:  # noqa: ASYNC110 - another thread writes them
            await asyncio.sleep(0.002)
    return found


def break_log(h: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(records: Sequence[TraceRecord], *, is_retry: bool = False) -> list[str]:
        raise DatabaseUnavailableError("the disk is full")

    def also_fail() -> None:
        raise DatabaseUnavailableError("the disk is full")

    monkeypatch.setattr(h.records.log._store, "write", fail)
    monkeypatch.setattr(h.records.log._store, "probe", also_fail)


@async_test
async def test_a_chat_with_everything() -> None:
    body = {
        "model": MODEL, "messages": USER, "tools": [TOOL], "tool_choice": "auto", "temperature": 0.5, "seed": 3,
        "user": "ada", "metadata": {"session_id": "s-1", "team": "x"}, "max_tokens": 200,
    }  # fmt: skip
    async with serving(Answer(f"Let me see.{CALL}", num_cached_tokens=16)) as h:
        response = await h.post("/v1/chat/completions", body)
        (trace,) = logged(h)
        prompt_ids = h.engine.submitted[0].token_ids
    answer = response.json()
    one = trace.summary
    assert (one.id, one.episode_id) == (response.headers["x-sterna-trace-id"], response.headers["x-sterna-episode"])
    assert one.response_id == answer["id"]
    assert (one.endpoint, one.status, one.purpose, one.finish_reason) == ("chat", "ok", "user", "tool_calls")
    assert (one.requested_model, one.adapter, one.version) == (MODEL, None, None)
    assert (one.user_id, one.session_id, one.key_id) == ("ada", "s-1", "")
    assert (one.num_prompt_tokens, one.num_completion_tokens) == (len(prompt_ids), answer["usage"]["completion_tokens"])
    assert one.num_cached_tokens == 16
    assert one.duration_seconds is not None
    assert one.ttft_seconds is not None
    assert 0 < one.ttft_seconds <= one.duration_seconds
    assert trace.request == {
        "messages": USER, "tools": [TOOL], "tool_choice": "auto",
        "sampling": {"temperature": 0.5, "seed": 3, "max_tokens": 200},
    }  # fmt: skip
    assert trace.answers[0]["message"] == answer["choices"][0]["message"]
    assert trace.prompt_token_ids == prompt_ids
    assert trace.completion_token_ids is not None
    assert len(trace.completion_token_ids[0]) == one.num_completion_tokens
    assert trace.details["model_digest"] == DIGEST
    assert trace.details["template_digest"] == "sha256:template"
    assert trace.details["tokenizer_digest"] == "sha256:tokenizer"
    assert trace.tool_calls[0].call_id == answer["choices"][0]["message"]["tool_calls"][0]["id"]


@async_test
async def test_a_stream_leaves_the_same_trace() -> None:
    async with serving(f"Let me see.{CALL}") as h:
        fields = {"tools": [TOOL], "max_tokens": 200}
        await chat(h, **fields)
        async for _ in await chat(h, stream=True, **fields):
            pass
        whole, streamed = logged(h)

    def said(trace: FullTrace) -> Any:
        answer = json.loads(json.dumps(trace.answers))
        answer[0]["message"]["tool_calls"][0].pop("id")
        return answer, trace.request, trace.prompt_token_ids, trace.completion_token_ids

    assert said(whole) == said(streamed)


@async_test
async def test_a_completion_with_candidates() -> None:
    def script(token_ids: Sequence[int], params: Any) -> Answer:
        return Answer("best" if params.choice == 1 else "worse", logprob=-0.1 if params.choice == 1 else -2.0)

    async with serving(script) as h:
        await h.client.completions.create(model=MODEL, prompt=["a", "b"], best_of=2, max_tokens=9, temperature=1)
        (trace,) = logged(h)
    assert trace.request["prompt"] == ["a", "b"]
    assert [answer["message"]["content"] for answer in trace.answers] == ["best", "best"]
    assert trace.completion_token_ids is not None
    assert [h.engine.tokenizer.decode(ids) for ids in trace.completion_token_ids] == ["best", "best"]
    assert trace.prompt_token_ids is None


@async_test
async def test_a_tool_result_continues_the_episode_and_a_stranger_does_not() -> None:
    async with serving(CALL) as h:
        first = await chat(h, tools=[TOOL])
        call = first.choices[0].message.tool_calls[0]
        history = [
            *USER,
            first.choices[0].message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": call.id, "content": '{"error": "no such city"}'},
        ]
        await chat(h, messages=history, tools=[TOOL])
        await chat(h, tools=[TOOL])
        one, two, stranger = logged(h)
        metrics = (await h.http.get("/metrics")).text
    assert one.summary.episode_id == two.summary.episode_id != stranger.summary.episode_id
    assert one.summary.has_tool_error
    assert one.tool_calls[0].outcome == "error"
    assert f'sterna_tool_results_total{{model="{MODEL}",outcome="error"}} 1.0' in metrics
    assert f'sterna_tool_calls_total{{form="well_formed",model="{MODEL}"}} 3.0' in metrics


@async_test
async def test_a_named_episode() -> None:
    async with serving() as h:
        headers = {"X-Sterna-Episode": "run 1"}
        body = {"model": MODEL, "messages": USER, "max_tokens": 9}
        first = await h.http.post("/v1/chat/completions", json=body, headers=headers)
        again = await h.http.post("/v1/chat/completions", json=body, headers=headers)
        by_id = await h.http.post(
            "/v1/chat/completions", json=body, headers={"X-Sterna-Episode": first.headers["x-sterna-episode"]}
        )
        too_long = await h.http.post("/v1/chat/completions", json=body, headers={"X-Sterna-Episode": "x" * 257})
    assert first.headers["x-sterna-episode"] == again.headers["x-sterna-episode"] == by_id.headers["x-sterna-episode"]
    assert too_long.status_code == 400
    assert too_long.json()["error"]["param"] == "X-Sterna-Episode"


@async_test
async def test_who_does_not_want_to_be_logged_is_not() -> None:
    body = {"model": MODEL, "messages": USER, "max_tokens": 9}
    async with serving() as h:
        response = await h.http.post("/v1/chat/completions", json=body, headers={"X-Sterna-Log": "off"})
        wrong = await h.http.post("/v1/chat/completions", json=body, headers={"X-Sterna-Log": "no"})
        assert logged(h) == []
        metrics = (await h.http.get("/metrics")).text
    assert response.status_code == 200
    assert "x-sterna-trace-id" not in response.headers
    assert wrong.status_code == 400
    assert 'sterna_traces_not_logged_total{reason="request"} 1.0' in metrics
    async with serving(log_requests=False) as h:
        assert (await h.post("/v1/chat/completions", body)).status_code == 200
        assert logged(h) == []


@async_test
async def test_evaluation_is_no_traffic() -> None:
    body = {"model": MODEL, "messages": USER, "max_tokens": 9}
    async with serving() as h:
        headers = {"X-Sterna-Purpose": "evaluation"}
        await h.http.post("/v1/chat/completions", json=body, headers=headers)
        wrong = await h.http.post("/v1/chat/completions", json=body, headers={"X-Sterna-Purpose": "test"})
        (trace,) = logged(h)
        metrics = (await h.http.get("/metrics")).text
    assert trace.summary.purpose == "evaluation"
    assert wrong.status_code == 400
    assert "sterna_evaluation_requests_total{" in metrics
    assert f'sterna_time_to_first_token_seconds_count{{model="{MODEL}"}} 0.0' in metrics
    async with serving(is_loopback=False) as h:
        refused = await h.http.post("/v1/chat/completions", json=body, headers=headers)
    assert refused.status_code == 403


@async_test
async def test_what_the_client_leaves_is_logged_as_cancelled() -> None:
    async with serving(Answer("Hello there", hang=True)) as h:
        stream = h.app.state.service
        request = asyncio.create_task(h.post("/v1/chat/completions", {"model": MODEL, "messages": USER}))
        while not h.engine.submitted or h.engine.tasks:  # noqa: ASYNC110 - the script has nothing more to say
            await asyncio.sleep(0.001)
        await asyncio.sleep(0)
        request.cancel()
        (trace,) = await settled(h, 1)
        assert stream.num_in_flight == 0
    assert trace.summary.status == "cancelled"
    assert trace.answers[0]["message"]["content"] == "Hello there"
    assert trace.summary.num_completion_tokens == len("Hello there")
    assert trace.summary.num_prompt_tokens == len(h.engine.submitted[0].token_ids)


@async_test
async def test_what_the_engine_fails_at_is_logged_as_failed() -> None:
    async with serving(Answer("Hel", finish_reason="error", error="cosmic ray")) as h:
        response = await h.post("/v1/chat/completions", {"model": MODEL, "messages": USER, "max_tokens": 9})
        (trace,) = await settled(h, 1)
    assert response.status_code == 503
    assert trace.summary.status == "failed"
    assert "cosmic ray" in trace.details["error"]


@async_test
async def test_what_is_refused_is_no_trace() -> None:
    async with serving() as h:
        bad = await h.post("/v1/chat/completions", {"model": MODEL, "messages": USER, "max_tokens": 99_999})
        unknown = await h.post("/v1/chat/completions", {"model": "none", "messages": USER})
        h.engine.is_full = True
        full = await h.post("/v1/chat/completions", {"model": MODEL, "messages": USER})
        await chat_after(h)
        assert [trace.summary.status for trace in logged(h)] == ["ok"]
    assert (bad.status_code, unknown.status_code, full.status_code) == (400, 404, 429)


async def chat_after(h: Harness) -> None:
    h.engine.is_full = False
    await chat(h)


@async_test
async def test_an_answer_that_cannot_be_logged_has_no_end() -> None:
    with pytest.MonkeyPatch.context() as patch:
        async with serving("Hello!") as h:
            break_log(h, patch)
            body = {"model": MODEL, "messages": USER, "stream": True, "n": 2, "max_tokens": 9}
            response = await h.post("/v1/chat/completions", body)
            after = await h.post("/v1/chat/completions", body)
            patch.undo()
            async with asyncio.timeout(PATIENCE_SECONDS):
                while (await h.post("/v1/chat/completions", body)).status_code == 503:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            failed, answered = logged(h)
    assert (failed.summary.status, answered.summary.status) == ("failed", "ok")
    assert "disk is full" in failed.details["error"]
    assert failed.answers[0]["message"]["content"] == "Hello!"
    events = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert "[DONE]" not in events
    assert all(choice["finish_reason"] is None for event in events[:-1] for choice in json.loads(event)["choices"])
    assert "disk is full" in json.loads(events[-1])["error"]["message"]
    assert after.status_code == 503
    assert "disk is full" in after.json()["error"]["message"]


@async_test
async def test_an_unstreamed_answer_that_cannot_be_logged_is_not_sent() -> None:
    with pytest.MonkeyPatch.context() as patch:
        async with serving("Hello!") as h:
            break_log(h, patch)
            with pytest.raises(APIError, match="disk is full"):
                await chat(h)
            patch.undo()


@async_test
async def test_a_relaxed_log_never_fails_an_answer() -> None:
    with pytest.MonkeyPatch.context() as patch:
        async with serving("Hello!", trace_durability="relaxed") as h:
            break_log(h, patch)
            for _ in range(3):
                assert (await chat(h)).choices[0].message.content == "Hello!"
            patch.undo()
            assert len(await settled(h, 3)) == 3
