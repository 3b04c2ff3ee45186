"""What the tests of the upstream backend share: requests, and ways to have them answered."""

from typing import Any

import pytest

from server.backends.base import Call
from server.backends.upstream import UpstreamBackend
from server.errors import SternaError
from server.metrics import Metrics
from server.openai.body import validate
from server.openai.protocol.chat import ChatRequest
from server.openai.protocol.completions import CompletionRequest
from tests.server.backends.fake_upstream import FakeUpstream

KEY = "sk-upstream-secret"
BODY = {"model": "teacher", "messages": [{"role": "user", "content": "hi"}]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}, "strict": True}}


def new_call(metrics: Metrics | None = None) -> Call:
    return Call(meter=(metrics or Metrics()).start_request("chat", "upstream"))


async def chat(backend: UpstreamBackend, body: dict[str, Any], call: Call | None = None) -> list[Any]:
    return [chunk async for chunk in backend.chat(validate(body, ChatRequest), call or new_call())]


async def complete(backend: UpstreamBackend, **fields: Any) -> list[Any]:
    request = validate({"model": "teacher", "prompt": "x", **fields}, CompletionRequest)
    return [chunk async for chunk in backend.complete(request, new_call())]


async def failure(fake: FakeUpstream, body: dict[str, Any] = BODY) -> SternaError:
    backend = UpstreamBackend(fake.url, KEY)
    with pytest.raises(SternaError) as caught:
        await chat(backend, body)
    await backend.aclose()
    return caught.value
