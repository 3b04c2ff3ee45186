"""The OpenAPI document, and schemathesis driving the application with it: no 5xx, and errors in OpenAI's shape."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import hypothesis
import pytest
import schemathesis
from schemathesis import GenerationMode

from server.app import Runtime, create_app
from server.metrics import Metrics
from server.openai.protocol.chat import ChatRequest
from server.openai.service import ServedModel
from tests.server.openai.harness import MODEL, async_test, build_backend, no_stats, serving
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


@asynccontextmanager
async def _open(metrics: Metrics) -> AsyncIterator[Runtime]:
    # Any model name is served, so that generated requests reach further than the 404.
    yield Runtime(
        build_backend(ScriptedEngine(byte_tokenizer()), metrics), (ServedModel(MODEL, 2048, root=MODEL),), no_stats
    )


app = create_app(_open)
schema = schemathesis.openapi.from_asgi("/openapi.json", app)
