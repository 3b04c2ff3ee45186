"""The endpoints. Handlers read the body themselves (`body.py`), because FastAPI's own reading coerces and accepts NaN.

Every handler is a few lines: who asks, read, hand over, respond.
"""

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.errors import ServerUnavailableError
from server.openai.answer import Answer, Asked, answer_chat, answer_completion
from server.openai.body import read_both, read_model
from server.openai.notes import read_notes
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
        asked = await _asked(service, http, ChatRequest)
        return _response(service, asked, answer_chat(service.parts(), asked))

    @router.post("/v1/completions", openapi_extra=request_body(CompletionRequest))
    async def create_completion(http: Request) -> Response:
        asked = await _asked(service, http, CompletionRequest)
        return _response(service, asked, answer_completion(service.parts(), asked))


async def _asked(service: Service, http: Request, model: type[ChatRequest] | type[CompletionRequest]) -> Asked:
    caller = (await service.access.caller(http)).require("inference")
    request, raw, num_bytes = await read_both(http, model)
    return Asked(request, raw, num_bytes, caller, read_notes(http.headers, caller))


def _response(service: Service, asked: Asked, answer: Answer[Any]) -> Response:
    request = asked.request
    return AnswerResponse(answer, service.in_flight, stream=bool(request.stream), include_usage=request.wants_usage)


def _add_tokens(router: APIRouter, service: Service) -> None:
    @router.post("/tokenize", openapi_extra=request_body(TokenizeRequest))
    async def tokenize(http: Request) -> Response:
        (await service.access.caller(http)).require("inference")
        request = await read_model(http, TokenizeRequest)
        return json_response(await service.backend(request.model).tokenize(request))

    @router.post("/detokenize", openapi_extra=request_body(DetokenizeRequest))
    async def detokenize(http: Request) -> Response:
        (await service.access.caller(http)).require("inference")
        request = await read_model(http, DetokenizeRequest)
        return json_response(await service.backend(request.model).detokenize(request))


def _add_models(router: APIRouter, service: Service) -> None:
    @router.get("/v1/models")
    async def list_models(http: Request) -> Response:
        await service.access.caller(http)
        return json_response({"object": "list", "data": [model.body() for model in await service.models()]})

    @router.get("/v1/models/{name:path}")
    async def retrieve_model(http: Request, name: str) -> Response:
        await service.access.caller(http)
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
        body, content_type = await service.metrics.scrape()
        return Response(body, headers={"content-type": content_type})
