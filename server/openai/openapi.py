"""The OpenAPI document: FastAPI's, plus the request bodies that our handlers read themselves."""

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from server.admin.adapter_wire import ADAPTER_REQUESTS
from server.admin.feedback_wire import FEEDBACK_REQUESTS
from server.openai.protocol.chat import ChatRequest
from server.openai.protocol.completions import CompletionRequest
from server.openai.protocol.tokens import DetokenizeRequest, TokenizeRequest

_REQUESTS: tuple[type[BaseModel], ...] = (
    ChatRequest,
    CompletionRequest,
    TokenizeRequest,
    DetokenizeRequest,
    *ADAPTER_REQUESTS,
    *FEEDBACK_REQUESTS,
)
_REFERENCE = "#/components/schemas/{model}"
_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def request_body(model: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` of a route that reads `model`."""
    schema = {"$ref": _REFERENCE.format(model=model.__name__)}
    error = {
        "description": "Refused",
        "content": {"application/json": {"schema": {"$ref": _REFERENCE.format(model="Error")}}},
    }
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": dict.fromkeys(("400", "404", "413", "415", "429", "503"), error),
    }


def install(app: FastAPI) -> None:
    """Make `app.openapi()` include the request schemas; built once, when first asked for."""
    build = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = build()
            _, definitions = models_json_schema([(model, "validation") for model in _REQUESTS], ref_template=_REFERENCE)
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            schemas.update(definitions["$defs"])
            schemas["Error"] = _ERROR_SCHEMA
        return app.openapi_schema or document

    app.openapi = openapi  # type: ignore[method-assign]
