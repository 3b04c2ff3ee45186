"""The OpenAPI document, and schemathesis driving the application with it: no 5xx, and errors in OpenAI's shape."""

from typing import Any

import hypothesis
import schemathesis
from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

from server.app import create_app
from server.metrics import Metrics
from server.openai.protocol.chat import ChatRequest
from server.openai.service import ServedModel
from tests.server.openai.harness import MODEL, async_test, build_backend, serving
from tests.server.openai.scripted import ScriptedEngine, byte_tokenizer
from tests.server.openai.validator import check_response


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


def opened_app() -> FastAPI:
    """Opened by hand: schemathesis runs a lifespan for every call, and the service opens once."""

    def never(metrics: Metrics) -> Any:
        raise AssertionError("no lifespan is run here")

    app = create_app(never)
    service = app.state.service
    service.open(build_backend(ScriptedEngine(byte_tokenizer()), service.metrics), ServedModel(MODEL, 2048, root=MODEL))
    return app


app = opened_app()


async def without_lifespan(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "lifespan":
        await app(scope, receive, send)
        return
    for step in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{step}.complete"})


schema = schemathesis.openapi.from_dict(app.openapi())
schema.app = without_lifespan


@schema.parametrize()
@hypothesis.settings(
    max_examples=40, derandomize=True, deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
)
def test_generated_requests(case: Any) -> None:
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body["model"] = MODEL  # further than the 404
    response = case.call()
    assert response.status_code < 500, response.text
    content_type = response.headers.get("content-type", [""])[0]
    check_response(case.path, response.status_code, content_type, response.content)
