"""/v1/adapters: read the registry, bring versions in and out, and move them between their states.

Who may: the scope `train` does what the training loop does (import, read, shadow, canary, shares, promote a tested
canary, reject, roll back); `admin` may besides promote without a test (override), pin, unpin and delete.

An act is followed by this server before it is answered: the next request is routed by it. Not here: what is legal
(server/adapters/registry.py), and the JSON objects (adapter_views.py).
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.adapters.registry import Registry
from server.adapters.service import AdapterService
from server.adapters.states import State
from server.adapters.store import VersionStore
from server.adapters.version import Adapter, Version
from server.admin.adapter_transfer import ZIP_TYPE, FileResponse
from server.admin.adapter_views import adapter_body, change_body, diff_body, list_body, summary_body, version_body
from server.admin.adapter_wire import (
    DELETE_QUERY,
    DIFF_QUERY,
    EXPORT_QUERY,
    HISTORY_QUERY,
    IMPORT_QUERY,
    MAX_HISTORY,
    AdapterCanaryRequest,
    AdapterCreateRequest,
    AdapterPinRequest,
    AdapterPromoteRequest,
    AdapterRejectRequest,
    AdapterRollbackRequest,
    AdapterShadowRequest,
    AdapterShareRequest,
    path_ref,
    read_digest,
    read_export_format,
    read_limit,
    read_ref,
)
from server.admin.adapter_work import AdapterWork
from server.admin.query import query_parameters, read_query
from server.keys.keys import Scope
from server.openai.access import Caller
from server.openai.body import read_model
from server.openai.errors import HttpError
from server.openai.openapi import request_body
from server.openai.respond import json_response
from server.openai.service import Service

_VERSION = "/{name}/versions/{number}"
_ZIP_BODY = {"required": True, "content": {ZIP_TYPE: {"schema": {"type": "string", "format": "binary"}}}}


@dataclass(frozen=True, slots=True)
class _Desk:
    """One request's caller, and what it may work on."""

    caller: Caller
    adapters: AdapterService[Any]
    store: VersionStore

    @property
    def registry(self) -> Registry:
        return self.store.registry

    async def change(self, act: Callable[..., Adapter], *args: Any, **values: Any) -> Response:
        """One act of the registry, followed; answered with the adapter as it is now."""
        adapter = await self.adapters.change(partial(act, *args, asked_by=self.caller.name, **values))
        return json_response(adapter_body(adapter, self.adapters))

    async def mark(self, act: Callable[..., Version], *args: Any, **values: Any) -> Response:
        """One act that changes no state; answered with the version as it is now."""
        version = await self.adapters.change(partial(act, *args, asked_by=self.caller.name, **values))
        return json_response(version_body(version))


def build_adapter_router(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1/adapters")
    _add_reading(router, service)
    _add_transfers(router, service, AdapterWork())
    _add_steps(router, service)
    _add_adapter_acts(router, service)
    _add_marks(router, service)
    return router


async def _desk(service: Service, http: Request, scope: Scope = "train") -> _Desk:
    """Raises InvalidKeyError, MissingScopeError, ServerUnavailableError; HttpError in record mode."""
    caller = (await service.access.caller(http)).require(scope)
    records = service.records()
    if records.adapters is None or records.versions is None:
        raise HttpError(
            404,
            "This server has no adapters: its answers come from an upstream (--backend openai).",
            code="adapters_not_served",
        )
    return _Desk(caller, records.adapters, records.versions)


def _add_reading(router: APIRouter, service: Service) -> None:
    @router.get("")
    async def list_adapters(http: Request) -> Response:
        desk = await _desk(service, http)
        return json_response(list_body([summary_body(one) for one in await asyncio.to_thread(desk.registry.adapters)]))

    @router.get("/{name}")
    async def show_adapter(http: Request, name: str) -> Response:
        desk = await _desk(service, http)
        return json_response(adapter_body(await asyncio.to_thread(desk.registry.adapter, name), desk.adapters))

    @router.get("/{name}/history", openapi_extra=query_parameters(HISTORY_QUERY))
    async def show_history(http: Request, name: str) -> Response:
        desk = await _desk(service, http)
        limit = read_limit(read_query(http, HISTORY_QUERY).get("limit", str(MAX_HISTORY)))
        await asyncio.to_thread(desk.registry.adapter, name)  # an unknown one has no empty history
        changes = await asyncio.to_thread(desk.registry.history, name, limit=limit)
        return json_response(list_body([change_body(change) for change in changes]))

    @router.get(_VERSION)
    async def show_version(http: Request, name: str, number: str) -> Response:
        desk = await _desk(service, http)
        return json_response(version_body(await asyncio.to_thread(desk.registry.version, path_ref(name, number))))


def _add_transfers(router: APIRouter, service: Service, work: AdapterWork) -> None:
    @router.post(
        "/{name}/versions", openapi_extra=query_parameters(IMPORT_QUERY, "reason") | {"requestBody": _ZIP_BODY}
    )
    async def import_version(http: Request, name: str) -> Response:
        desk = await _desk(service, http)
        query = read_query(http, IMPORT_QUERY, "reason")
        parent = query.get("parent")
        version, is_new = await work.take_in(
            http,
            desk.store,
            desk.adapters,
            adapter=name,
            origin=query.get("origin") or "upload",
            reason=query["reason"],
            asked_by=desk.caller.name,
            base_digest=read_digest(query.get("base_digest"), "base_digest"),
            parent=None if parent is None else read_ref(parent, "parent"),
        )
        return json_response(version_body(version) | {"is_new": is_new}, 201 if is_new else 200)

    @router.get(f"{_VERSION}/export", openapi_extra=query_parameters(EXPORT_QUERY))
    async def export_version(http: Request, name: str, number: str) -> Response:
        desk = await _desk(service, http)
        ref = path_ref(name, number)
        as_gguf = read_export_format(read_query(http, EXPORT_QUERY).get("format")) == "gguf"
        file, num_bytes = await work.give_out(desk.store, ref, as_gguf=as_gguf)
        return FileResponse(file, num_bytes, f"{ref}.{'gguf' if as_gguf else 'zip'}")

    @router.get(f"{_VERSION}/diff", openapi_extra=query_parameters(DIFF_QUERY, "other"))
    async def compare_versions(http: Request, name: str, number: str) -> Response:
        desk = await _desk(service, http)
        other = read_ref(read_query(http, DIFF_QUERY, "other")["other"], "other")
        return json_response(diff_body(*await work.compare(desk.store, path_ref(name, number), other)))


def _add_steps(router: APIRouter, service: Service) -> None:
    @router.post(f"{_VERSION}/shadow", openapi_extra=request_body(AdapterShadowRequest))
    async def start_shadow(http: Request, name: str, number: str) -> Response:
        desk = await _desk(service, http)
        asked = await read_model(http, AdapterShadowRequest)
        return await desk.change(desk.registry.start_shadow, path_ref(name, number), **asked.model_dump())

    @router.post(f"{_VERSION}/canary", openapi_extra=request_body(AdapterCanaryRequest))
    async def start_canary(http: Request, name: str, number: str) -> Response:
        desk = await _desk(service, http)
        asked = await read_model(http, AdapterCanaryRequest)
        return await desk.change(desk.registry.start_canary, path_ref(name, number), **asked.model_dump())

    @router.post(f"{_VERSION}/promote", openapi_extra=request_body(AdapterPromoteRequest))
    async def promote(http: Request, name: str, number: str) -> Response:
        desk = await _desk(service, http)
        asked = await read_model(http, AdapterPromoteRequest)
        if asked.override:
            desk.caller.require("admin")
        return await desk.change(desk.registry.promote, path_ref(name, number), **asked.model_dump())

    @router.post(f"{_VERSION}/reject", openapi_extra=request_body(AdapterRejectRequest))
    async def reject(http: Request, name: str, number: str) -> Response:
        desk = await _desk(service, http)
        asked = await read_model(http, AdapterRejectRequest)
        return await desk.change(desk.registry.reject, path_ref(name, number), **asked.model_dump())


def _add_adapter_acts(router: APIRouter, service: Service) -> None:
    @router.post("", openapi_extra=request_body(AdapterCreateRequest))
    async def create_adapter(http: Request) -> Response:
        desk = await _desk(service, http)
        asked = await read_model(http, AdapterCreateRequest)
        act = partial(desk.store.create, asked.name, asked_by=desk.caller.name, reason=asked.reason)
        adapter, is_new = await desk.adapters.change(act)
        return json_response(adapter_body(adapter, desk.adapters) | {"is_new": is_new}, 201 if is_new else 200)

    @router.post("/{name}/rollback", openapi_extra=request_body(AdapterRollbackRequest))
    async def roll_back(http: Request, name: str) -> Response:
        desk = await _desk(service, http)
        asked = await read_model(http, AdapterRollbackRequest)
        return await desk.change(desk.registry.rollback, name, **asked.model_dump())

    @router.post("/{name}/shares", openapi_extra=request_body(AdapterShareRequest))
    async def set_share(http: Request, name: str) -> Response:
        desk = await _desk(service, http)
        asked = await read_model(http, AdapterShareRequest)
        values = asked.model_dump(exclude={"state", "share"})
        return await desk.change(desk.registry.set_share, name, State(asked.state), asked.share, **values)


def _add_marks(router: APIRouter, service: Service) -> None:
    @router.post(f"{_VERSION}/pin", openapi_extra=request_body(AdapterPinRequest))
    async def pin(http: Request, name: str, number: str) -> Response:
        desk = await _desk(service, http, "admin")
        asked = await read_model(http, AdapterPinRequest)
        return await desk.mark(desk.registry.pin, path_ref(name, number), is_pinned=True, reason=asked.reason)

    @router.post(f"{_VERSION}/unpin", openapi_extra=request_body(AdapterPinRequest))
    async def unpin(http: Request, name: str, number: str) -> Response:
        desk = await _desk(service, http, "admin")
        asked = await read_model(http, AdapterPinRequest)
        return await desk.mark(desk.registry.pin, path_ref(name, number), is_pinned=False, reason=asked.reason)

    @router.delete(_VERSION, openapi_extra=query_parameters(DELETE_QUERY, "reason"))
    async def delete_version(http: Request, name: str, number: str) -> Response:
        desk = await _desk(service, http, "admin")
        reason = read_query(http, DELETE_QUERY, "reason")["reason"]
        return await desk.mark(desk.store.delete, path_ref(name, number), reason=reason)
