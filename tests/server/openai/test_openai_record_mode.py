"""Record mode as a whole: settings, application and log, in front of a scripted upstream."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from openai import APIStatusError, AsyncOpenAI
from pydantic import SecretStr

from server.app import create_app
from server.config import Settings
from server.records import Records
from server.runtime import open_runtime
from server.traces.filters import TraceFilter
from server.traces.queries import FullTrace
from server.traces.viewer import ADMIN
from tests.patience import PATIENCE_SECONDS
from tests.server.backends.fake_upstream import (
    HEAD,
    HELLO,
    USAGE,
    USAGE_CHUNK,
    Asked,
    FakeUpstream,
    Reply,
    as_json,
    delta,
    sse,
    upstream,
)
from tests.server.openai.harness import asgi_client, async_test
from tests.server.openai.test_openai_disconnect import HangingUp
from tests.server.openai.validator import events
from tests.server.postgres import migrated_file

KEY = "upstream-key-0123456789"
MODEL = "teacher"
TOOL: Any = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
USER: Any = [{"role": "user", "content": "How warm is it in Rome?"}]
CALL_ID = "call_8Xk2mQ9vT4bR7nL3pW6sZ1yD"


@dataclass
class Recording:
    app: FastAPI
    records: Records
    http: httpx.AsyncClient
    client: AsyncOpenAI

    async def chat(self, **fields: Any) -> Any:
        body = {"model": MODEL, "messages": USER, "max_tokens": 50, **fields}
        return await self.client.chat.completions.create(**body)

    def traces(self) -> list[FullTrace]:
        """Oldest first."""
        page = self.records.queries.list(ADMIN, TraceFilter())
        return [self.records.queries.show(ADMIN, one.id) for one in reversed(page.traces)]

    async def settled(self) -> FullTrace:
        """The only one, for which nobody waited."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not (found := await asyncio.to_thread(self.traces)):  # noqa: ASYNC110 - another thread writes it
                await asyncio.sleep(0.002)
        [trace] = found
        return trace


@asynccontextmanager
async def recording(fake: FakeUpstream, folder: Path, **fields: Any) -> AsyncIterator[Recording]:
    if not (folder / "sterna.db").exists():
        shutil.copy(migrated_file(), folder / "sterna.db")
    settings = Settings(backend="openai", upstream=fake.url, upstream_api_key=SecretStr(KEY), data_dir=folder, **fields)
    app = create_app(open_runtime(settings), is_loopback=True)
    async with app.router.lifespan_context(app), asgi_client(app) as http:
        while not app.state.service.is_open:  # noqa: ASYNC110 - the database opens on a thread
            await asyncio.sleep(0.001)
        client = AsyncOpenAI(api_key="unused", base_url="http://test/v1", http_client=http, max_retries=0)
        yield Recording(app, app.state.service.records(), http, client)


def scripted(*, call_id: str = CALL_ID) -> AbstractAsyncContextManager[FakeUpstream]:
    """Calls the tool when asked by a user, and speaks when it has the result; streamed or not, as asked."""

    def answer(asked: Asked) -> Reply:
        if asked.method == "GET":
            return as_json({"object": "list", "data": [{"id": MODEL, "max_model_len": 4096}, {"id": "teacher-mini"}]})
        if asked.body["messages"][-1]["role"] == "tool":
            return sse(*HELLO)
        function = {"name": "weather", "arguments": '{"city": "Rome"}'}
        if not asked.body.get("stream"):
            call = {"id": call_id, "type": "function", "function": function}
            spoken = {"role": "assistant", "content": None, "refusal": None, "tool_calls": [call]}
            choice = {"index": 0, "message": spoken, "logprobs": None, "finish_reason": "tool_calls"}
            return as_json({**HEAD, "object": "chat.completion", "choices": [choice], "usage": USAGE})
        begun = {"index": 0, "id": call_id, "type": "function", "function": {"name": "weather", "arguments": ""}}
        pieces = [{"index": 0, "function": {"arguments": text}} for text in ('{"city"', ': "Rome"}')]
        deltas = [delta({"role": "assistant", "content": None})]
        deltas += [delta({"tool_calls": [one]}) for one in (begun, *pieces)]
        return sse(*deltas, delta({}, end="tool_calls"), USAGE_CHUNK)

    return upstream(answer)


@async_test
async def test_a_tool_call_is_answered_as_the_upstream_does_and_logged(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"tools": [TOOL], "tool_choice": "auto", "temperature": 0.25, "user": "ada"}
    async with scripted() as fake, recording(fake, tmp_path) as r:
        async with AsyncOpenAI(api_key="x", base_url=fake.url + "/v1") as direct:
            theirs = await direct.chat.completions.create(model=MODEL, messages=USER, **fields)
        ours = await r.chat(**fields)
        body = {"model": MODEL, "messages": USER, "stream": True, "stream_options": {"include_usage": True}, **fields}
        streamed = await r.http.post("/v1/chat/completions", json=body)
        whole, from_stream = r.traces()
        [direct_call] = theirs.choices[0].message.tool_calls
    assert ours.choices[0].to_dict() == theirs.choices[0].to_dict()
    assert (ours.id, ours.created, ours.system_fingerprint) == (theirs.id, theirs.created, theirs.system_fingerprint)
    assert ours.usage.prompt_tokens == theirs.usage.prompt_tokens
    *chunks, last = events(streamed.content)
    assert last == "[DONE]"
    told = [call for chunk in chunks for one in chunk["choices"] for call in one["delta"].get("tool_calls", ())]
    assert "".join(call["function"]["arguments"] for call in told) == direct_call.function.arguments
    assert chunks[-1]["usage"]["total_tokens"] == 15
    assert {asked.headers["authorization"] for asked in fake.asked if asked.method == "POST"} == {
        f"Bearer {KEY}",
        "Bearer x",
    }
    for trace in (whole, from_stream):
        one = trace.summary
        assert (one.status, one.finish_reason, one.user_id) == ("ok", "tool_calls", "ada")
        assert (one.requested_model, trace.details["model"]) == (MODEL, "teacher-2026-01-01")
        assert (one.num_prompt_tokens, one.num_completion_tokens, one.num_cached_tokens) == (11, 4, 8)
        assert one.response_id == "chatcmpl-AbC123"
        assert trace.request["messages"] == USER
        assert trace.request["tools"] == [TOOL]
        assert trace.answers[0]["message"]["tool_calls"][0]["function"]["name"] == "weather"
        assert [call.call_id for call in trace.tool_calls] == [CALL_ID]
        assert trace.prompt_token_ids is None
    assert streamed.headers["x-sterna-trace-id"] == from_stream.summary.id


@async_test
async def test_counted_ids_stitch_no_strangers_and_the_upstream_sees_its_own(tmp_path: Path) -> None:
    async with scripted(call_id="call_0") as fake, recording(fake, tmp_path) as r:
        runs = []
        for question in ("How warm is it in Rome?", "And in Oslo, is it cold there?"):
            messages: Any = [{"role": "user", "content": question}]
            answer = (await r.chat(messages=messages, tools=[TOOL])).choices[0].message
            result = {"role": "tool", "tool_call_id": answer.tool_calls[0].id, "content": '{"error": "no such city"}'}
            runs.append([*messages, answer.model_dump(exclude_none=True), result])
        for messages in runs:
            final = await r.chat(messages=messages, tools=[TOOL])
            assert final.choices[0].message.content == "Hello!"
        rome, oslo, rome_end, oslo_end = r.traces()
    assert rome.summary.episode_id == rome_end.summary.episode_id
    assert oslo.summary.episode_id == oslo_end.summary.episode_id
    assert rome.summary.episode_id != oslo.summary.episode_id
    assert [call.outcome for call in rome.tool_calls] == ["error"]
    sent = [asked.body["messages"] for asked in fake.asked if asked.method == "POST"][-1]
    assert (sent[1]["tool_calls"][0]["id"], sent[2]["tool_call_id"]) == ("call_0", "call_0")


@async_test
async def test_the_upstreams_models_are_listed_and_any_name_goes(tmp_path: Path) -> None:
    async with scripted() as fake, recording(fake, tmp_path) as r:
        listed = (await r.http.get("/v1/models")).json()["data"]
        one = (await r.http.get("/v1/models/some/name")).json()
        health = (await r.http.get("/health")).status_code
        metrics = (await r.http.get("/metrics")).text
    assert [(model["id"], model["max_model_len"]) for model in listed] == [(MODEL, 4096), ("teacher-mini", None)]
    assert (one["id"], one["root"], one["max_model_len"]) == ("some/name", "some/name", None)
    assert health == 200
    assert "sterna_num_requests_running" not in metrics  # no engine of ours


@async_test
async def test_refusals_pass_and_leave_no_trace(tmp_path: Path) -> None:
    refusal = {"error": {"message": "no model 'x'", "type": "invalid_request_error", "code": "model_not_found"}}
    async with upstream(as_json(refusal, 404)) as fake, recording(fake, tmp_path) as r:
        with pytest.raises(APIStatusError, match="no model 'x'") as caught:
            await r.chat(model="x", stream=True)
        assert (caught.value.status_code, caught.value.body["code"]) == (404, "model_not_found")  # type: ignore[index]
        assert r.traces() == []


@pytest.mark.parametrize("status", [500, 503])
def test_what_the_upstream_fails_at_is_a_failed_trace(tmp_path: Path, status: int) -> None:
    @async_test
    async def check() -> None:
        failure = {"error": {"message": "out of memory", "type": "server_error"}}
        async with upstream(as_json(failure, status)) as fake, recording(fake, tmp_path) as r:
            with pytest.raises(APIStatusError):
                await r.chat()
            trace = await r.settled()
        assert (trace.summary.status, trace.answers) == ("failed", [])
        assert "out of memory" in trace.details["error"]

    check()


@async_test
async def test_a_failure_in_mid_stream_is_an_error_event_and_a_failed_trace(tmp_path: Path) -> None:
    broken = Reply(sse(*HELLO[:2], done=False).parts, ends="broken")
    async with upstream(broken) as fake, recording(fake, tmp_path) as r:
        body = {"model": MODEL, "messages": USER, "stream": True}
        streamed = await r.http.post("/v1/chat/completions", json=body)
        trace = await r.settled()
    *_, last = events(streamed.content)
    assert "broke off" in last["error"]["message"]
    assert trace.summary.status == "failed"
    assert trace.answers[0]["message"]["content"] == "Hel"


def contents(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in folder.iterdir() if path.is_file()]


@async_test
async def test_our_key_is_never_logged(tmp_path: Path) -> None:
    quoting = sse(delta({"content": f"Your key is {KEY}."}, end="stop"))
    async with upstream(quoting) as fake, recording(fake, tmp_path) as r:
        await r.chat()
        [trace] = r.traces()
    assert trace.answers[0]["message"]["content"] == "Your key is [redacted:secret]."
    assert trace.summary.is_redacted
    assert not any(KEY.encode() in data for data in contents(tmp_path))


@async_test
async def test_an_answer_without_usage_says_so(tmp_path: Path) -> None:
    async with upstream(sse(*HELLO[:-1])) as fake, recording(fake, tmp_path) as r:
        answer = await r.chat()
        [trace] = r.traces()
    assert answer.usage is None
    assert (trace.summary.num_prompt_tokens, trace.summary.num_completion_tokens) == (0, 0)


@async_test
async def test_a_client_that_leaves_is_logged_and_frees_the_upstream(tmp_path: Path) -> None:
    hanging = Reply(sse(*HELLO[:2], done=False).parts, ends="hanging")
    async with upstream(hanging) as fake, recording(fake, tmp_path) as r:
        client = HangingUp({"model": MODEL, "messages": USER, "stream": True})
        request = asyncio.create_task(r.app(client.scope(), client.receive, client.send))  # type: ignore[arg-type]
        await client.got_data.wait()
        client.leave.set()
        await request
        async with asyncio.timeout(PATIENCE_SECONDS):
            await fake.client_left.wait()
        trace = await r.settled()
    assert trace.summary.status == "cancelled"


@async_test
async def test_closing_ends_what_is_under_way_with_a_reason_and_logs_it(tmp_path: Path) -> None:
    hanging = Reply(sse(*HELLO[:2], done=False).parts, ends="hanging")
    client = HangingUp({"model": MODEL, "messages": USER, "stream": True})
    async with upstream(hanging) as fake:
        async with recording(fake, tmp_path) as r:
            request = asyncio.create_task(r.app(client.scope(), client.receive, client.send))  # type: ignore[arg-type]
            await client.got_data.wait()
            r.app.state.service.closing.set()
            await request
        async with recording(fake, tmp_path) as r:
            trace = await r.settled()
    sent = b"".join(message.get("body", b"") for message in client.sent)
    assert b"shut down" in sent
    assert b"[DONE]" not in sent
    assert trace.summary.status == "failed"


@async_test
async def test_without_an_upstream_it_starts_and_says_so(tmp_path: Path) -> None:
    async with upstream(sse(*HELLO)) as fake:
        pass
    async with recording(fake, tmp_path) as r:
        answer = await r.http.post("/v1/chat/completions", json={"model": MODEL, "messages": USER})
        models = await r.http.get("/v1/models")
        health = await r.http.get("/health")
    assert (answer.status_code, models.status_code, health.status_code) == (503, 503, 503)
    assert "cannot be reached" in answer.json()["error"]["message"]
    assert "the upstream does not answer: 127.0.0.1:" in health.json()["error"]["message"]
