"""A client that hangs up frees its sequences: in front of the application, and through a real uvicorn."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import uvicorn

from server.app import create_app
from tests.patience import PATIENCE_SECONDS
from tests.server.openai.harness import MODEL, async_test, say, scripted_runtime, serving
from tests.server.openai.scripted import Answer, ScriptedEngine, byte_tokenizer

BODY = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
ENDLESS = Answer("abc", hang=True)


class HangingUp:
    """The ASGI side of a client that sends a request and leaves when told to."""

    def __init__(self, body: dict[str, Any]) -> None:
        self.sent: list[Any] = []
        self.leave = asyncio.Event()
        self.got_data = asyncio.Event()
        self._body: bytes | None = json.dumps(body).encode()

    async def receive(self) -> Any:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.leave.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)
        if message.get("body"):
            self.got_data.set()

    def scope(self) -> dict[str, Any]:
        headers = [(b"content-type", b"application/json")]
        path = "/v1/chat/completions"
        return {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}


@async_test
async def test_leaving_a_stream_cancels_every_choice() -> None:
    async with serving(ENDLESS) as h:
        client = HangingUp({**BODY, "stream": True, "n": 2})
        request = asyncio.create_task(h.app(client.scope(), client.receive, client.send))  # type: ignore[arg-type]
        await client.got_data.wait()
        assert h.app.state.service.num_in_flight == 1
        client.leave.set()
        await request
        assert [one.is_cancelled for one in h.engine.submitted] == [True, True]
        assert h.app.state.service.num_in_flight == 0
        await h.app.state.service.drained()
        text = (await h.http.get("/metrics")).text
    assert 'finished_reason="cancelled"' in text
    assert not any(message.get("body", b"").endswith(b"[DONE]\n\n") for message in client.sent)


@async_test
async def test_leaving_before_an_unstreamed_answer_cancels_it() -> None:
    async with serving(ENDLESS) as h:
        client = HangingUp(BODY)
        request = asyncio.create_task(h.app(client.scope(), client.receive, client.send))  # type: ignore[arg-type]
        while not h.engine.submitted:  # noqa: ASYNC110 - a few turns of the loop
            await asyncio.sleep(0)
        client.leave.set()
        await request
        assert h.engine.submitted[0].is_cancelled
        text = (await h.http.get("/metrics")).text
    assert client.sent == []
    assert 'sterna_http_responses_total{endpoint="chat",status="499"} 1.0' in text


@async_test
async def test_a_cancelled_request_task_frees_its_work() -> None:
    async with serving(ENDLESS) as h:
        client = HangingUp({**BODY, "stream": True})
        request = asyncio.create_task(h.app(client.scope(), client.receive, client.send))  # type: ignore[arg-type]
        await client.got_data.wait()
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        assert h.engine.submitted[0].is_cancelled


@contextmanager
def uvicorn_server(engine: ScriptedEngine) -> Iterator[str]:
    """The application behind a real uvicorn in a thread, on a port of the system's choice."""

    app = create_app(lambda metrics: scripted_runtime(engine, metrics), is_loopback=True)
    started = threading.Event()

    class Announcing(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            while not app.state.service.is_open:  # noqa: ASYNC110 - a few turns of the loop
                await asyncio.sleep(0.001)
            started.set()

    server = Announcing(uvicorn.Config(app, port=0, log_config=None, ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert started.wait(PATIENCE_SECONDS)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def test_leaving_a_real_connection_frees_the_sequence() -> None:
    cancelled = threading.Event()
    engine = ScriptedEngine(byte_tokenizer(), say(ENDLESS), on_cancel=cancelled.set)
    with uvicorn_server(engine) as url:
        with httpx.stream("POST", f"{url}/v1/chat/completions", json={**BODY, "stream": True}) as response:
            assert next(response.iter_text()).startswith("data: ")
        assert cancelled.wait(PATIENCE_SECONDS)
