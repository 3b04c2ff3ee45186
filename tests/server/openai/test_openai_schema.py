"""The OpenAPI document, and schemathesis driving the application with it: no 5xx, and errors in OpenAI's shape."""

import asyncio
from collections.abc import Iterator
from contextlib import AsyncExitStack
from typing import Any

import hypothesis
import pytest
import schemathesis
from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

from server.app import create_app
from server.metrics import Metrics
from server.openai.protocol.chat import ChatRequest
from tests.server.openai.harness import MODEL, async_test, scripted_runtime, serving
from tests.server.openai.scripted import ScriptedEngine, byte_tokenizer
from tests.server.openai.validator import check_response
from tests.server.traces.builders import make_record


@async_test
async def test_the_document_lists_endpoints_fields_and_errors() -> None:
    async with serving() as h:
        document = (await h.http.get("/openapi.json")).json()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize", "/detokenize", "/health"} <= document[
        "paths"
    ].keys()
    schemas = document["components"]["schemas"]
    assert schemas["ChatRequest"]["properties"].keys() == ChatRequest.model_fields.keys()
    operation = document["paths"]["/v1/chat/completions"]["post"]
    assert operation["responses"]["400"]["content"]["application/json"]["schema"]["$ref"].endswith("Error")


LOOP = asyncio.new_event_loop()
RUNTIMES = AsyncExitStack()
KNOWN = make_record()
KNOWN_IDS = {"trace_id": KNOWN.id, "response_id": KNOWN.response_id, "episode_id": KNOWN.episode.id}
ENGINE = ScriptedEngine(byte_tokenizer())


@pytest.fixture(scope="module", autouse=True)
def closed_at_the_end() -> Iterator[None]:
    yield
    LOOP.run_until_complete(RUNTIMES.aclose())
    LOOP.close()


def opened_app() -> FastAPI:
    """Opened by hand: schemathesis runs a lifespan for every call, and the service opens once."""

    def never(metrics: Metrics) -> Any:
        raise AssertionError("no lifespan is run here")

    app = create_app(never, is_loopback=True)
    service = app.state.service
    opened = LOOP.run_until_complete(RUNTIMES.enter_async_context(scripted_runtime(ENGINE, service.metrics)))
    service.open(opened.backend, opened.records, *opened.models)
    opened.records.log._store.write([KNOWN])
    return app


app = opened_app()


async def without_lifespan(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "lifespan":
        await app(scope, receive, send)
        return
    for step in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{step}.complete"})


schemathesis.serializer.alias("application/zip", "application/octet-stream")
schema = schemathesis.openapi.from_dict(app.openapi())
schema.app = without_lifespan


@pytest.mark.slow
@schema.parametrize()
@hypothesis.settings(
    max_examples=40, derandomize=True, deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
)
def test_generated_requests(case: Any) -> None:
    # Further than the 404; every other id stays what it is.
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body["model"] = MODEL
    items = case.body.get("items") if isinstance(case.body, dict) else None
    for holder in (case.path_parameters, *(items if isinstance(items, list) else ())):
        for name in KNOWN_IDS.keys() & holder if isinstance(holder, dict) and case.method == "POST" else ():
            if isinstance(holder[name], str) and len(holder[name]) % 2 == 0:
                holder[name] = KNOWN_IDS[name]
    response = case.call()
    assert response.status_code < 500, response.text
    content_type = response.headers.get("content-type", [""])[0]
    check_response(case.path, response.status_code, content_type, response.content)
