"""The endpoints. Handlers read the body themselves (`body.py`), because FastAPI's own reading coerces and accepts NaN.

Every handler is a few lines: read, route by model name, hand over to the backend, respond.
"""

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.backends.base import Backend
from server.errors import ServerUnavailableError
from server.openai.assemble import assemble_chat, assemble_completion
from server.openai.body import read_model
from server.openai.openapi import request_body
from server.openai.protocol.chat import ChatRequest
from server.openai.protocol.completions import CompletionRequest
from server.openai.protocol.tokens import DetokenizeRequest, TokenizeRequest
from server.openai.respond import AnswerResponse, json_response
from server.openai.service import Service


def build_router(service: Service) -> APIRouter:
    """All routes of one application."""
    router = APIRouter()
    _add_generation(router, service)
    _add_tokens(router, service)
    _add_models(router, service)
    _add_operations(router, service)
    return router


def _add_generation(router: APIRouter, service: Service) -> None:
    @router.post("/v1/chat/completions", openapi_extra=request_body(ChatRequest))
    async def create_chat_completion(http: Request) -> Response:
        request = await read_model(http, ChatRequest)
        backend, version = service.backend(request.model)
        return AnswerResponse(
            backend.chat(request, version),
            assemble_chat,
            service.in_flight,
            stream=bool(request.stream),
            include_usage=request.wants_usage,
        )

    @router.post("/v1/completions", openapi_extra=request_body(CompletionRequest))
    async def create_completion(http: Request) -> Response:
        request = await read_model(http, CompletionRequest)
        backend, version = service.backend(request.model)
        return AnswerResponse(
            backend.complete(request, version),
            assemble_completion,
            service.in_flight,
            stream=bool(request.stream),
            include_usage=request.wants_usage,
        )


def _add_tokens(router: APIRouter, service: Service) -> None:
    @router.post("/tokenize", openapi_extra=request_body(TokenizeRequest))
    async def tokenize(http: Request) -> Response:
        request = await read_model(http, TokenizeRequest)
        return json_response(await _base(service, request.model).tokenize(request))

    @router.post("/detokenize", openapi_extra=request_body(DetokenizeRequest))
    async def detokenize(http: Request) -> Response:
        request = await read_model(http, DetokenizeRequest)
        return json_response(await _base(service, request.model).detokenize(request))


def _base(service: Service, model_name: str | None) -> Backend:
    """Tokens do not depend on an adapter."""
    return service.backend(model_name)[0]


def _add_models(router: APIRouter, service: Service) -> None:
    @router.get("/v1/models")
    async def list_models() -> Response:
        return json_response({"object": "list", "data": [model.body() for model in service.models()]})

    @router.get("/v1/models/{name:path}")
    async def retrieve_model(name: str) -> Response:
        return json_response(service.model(name).body())


def _add_operations(router: APIRouter, service: Service) -> None:
    @router.get("/health")
    async def health() -> Response:
        state = service.health()
        if not state.is_ready:
            raise ServerUnavailableError(f"The server is not taking requests: {state.reason}.")
        body: dict[str, Any] = {"status": "ok"}
        return json_response(body)

    @router.get("/metrics")
    async def metrics() -> Response:
        body, content_type = service.metrics.render()
        return Response(body, headers={"content-type": content_type})
