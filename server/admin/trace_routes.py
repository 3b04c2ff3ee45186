"""/v1/traces: list, show, add up, export, delete.

Scope `feedback` reads: a key its own traces, admin all. Only admin deletes: what an agent did must not be erased with
the agent's own key. What asks the database, and what makes its long answers, runs on a thread. Not here: feedback
(feedback_routes.py).
"""

from collections.abc import AsyncIterator, Iterator

from fastapi import APIRouter, Request
from starlette.responses import Response, StreamingResponse

from server.admin.query import query_parameters, read_query
from server.admin.trace_views import deletion_body, page_body, stats_body, trace_body
from server.admin.turns import Turns
from server.errors import InvalidRequestError
from server.openai.protocol.chunks import Body
from server.openai.respond import json_response
from server.openai.service import Service
from server.traces.errors import TraceNotFoundError
from server.traces.exchange import export_lines
from server.traces.filter_text import FILTER_CHOICES, FILTER_TEXTS, read_filter
from server.traces.filters import TraceFilter
from server.traces.lineage import Lineage
from server.traces.queries import MAX_PAGE
from server.traces.viewer import Viewer

JSON_LINES = "application/jsonl"
NUM_AT_ONCE = 2
"""Of all these requests together: totals over a large log take a thread for seconds."""
CHUNK_CHARS = 1 << 16
"""Of an export: large enough that a hop to a thread is nothing beside it."""
PAGE_TEXTS = {
    "limit": f"traces of a page, 1 to {MAX_PAGE} [50]",
    "before": "the next_before of the page before this one",
}
EXPORT_TEXTS = {"with_corrections": "a trace's latest correction takes the place of its answer"}
_CHOICES = FILTER_CHOICES | {"with_corrections": ("true", "false")}


def build_trace_router(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1/traces")
    turns = Turns(NUM_AT_ONCE)
    _add_lists(router, service, turns)
    _add_export(router, service, turns)
    _add_one(router, service, turns)
    _add_deletion(router, service, turns)
    return router


def _add_lists(router: APIRouter, service: Service, turns: Turns) -> None:
    @router.get("", openapi_extra=query_parameters(FILTER_TEXTS | PAGE_TEXTS, choices=_CHOICES))
    async def list_traces(http: Request) -> Response:
        caller = (await service.access.caller(http)).require("feedback")
        query = read_query(http, FILTER_TEXTS | PAGE_TEXTS)
        page = {name: _number(query, name) for name in PAGE_TEXTS if name in query}
        queries, where = service.records().queries, read_filter(query)
        return await turns.run(lambda: json_response(page_body(queries.list(caller.viewer, where, **page))))

    @router.get("/stats", openapi_extra=query_parameters(FILTER_TEXTS, choices=_CHOICES))
    async def trace_stats(http: Request) -> Response:
        caller = (await service.access.caller(http)).require("feedback")
        queries, where = service.records().queries, read_filter(read_query(http, FILTER_TEXTS))
        return json_response(stats_body(await turns.run(lambda: queries.stats(caller.viewer, where))))


def _add_export(router: APIRouter, service: Service, turns: Turns) -> None:
    @router.get("/export", openapi_extra=query_parameters(FILTER_TEXTS | EXPORT_TEXTS, choices=_CHOICES))
    async def export_traces(http: Request) -> Response:
        caller = (await service.access.caller(http)).require("feedback")
        query = read_query(http, FILTER_TEXTS | EXPORT_TEXTS)
        with_corrections = _flag(query, "with_corrections")
        lines = export_lines(
            service.records().database, caller.viewer, read_filter(query), with_corrections=with_corrections
        )
        chunks = _chunks(lines)
        first = await turns.run(lambda: next(chunks))  # a database that is away is answered 503, not an empty file
        return StreamingResponse(_sent(first, chunks, turns), media_type=JSON_LINES)


def _add_one(router: APIRouter, service: Service, turns: Turns) -> None:
    @router.get("/{trace_id}")
    async def retrieve_trace(http: Request, trace_id: str) -> Response:
        caller = (await service.access.caller(http)).require("feedback")
        read_query(http, {})
        queries = service.records().queries
        return await turns.run(lambda: json_response(trace_body(queries.show(caller.viewer, trace_id))))


def _add_deletion(router: APIRouter, service: Service, turns: Turns) -> None:
    async def delete(viewer: Viewer, where: TraceFilter) -> Body:
        records = service.records()

        def act() -> Body:
            deleted = records.deletion.delete(viewer, where)
            return deletion_body(len(deleted), Lineage(records.database).versions_that_saw(deleted))

        return await turns.run(act)

    @router.delete("", openapi_extra=query_parameters(FILTER_TEXTS, choices=_CHOICES))
    async def delete_traces(http: Request) -> Response:
        caller = (await service.access.caller(http)).require("admin")
        return json_response(await delete(caller.viewer, read_filter(read_query(http, FILTER_TEXTS))))

    @router.delete("/{trace_id}")
    async def delete_trace(http: Request, trace_id: str) -> Response:
        caller = (await service.access.caller(http)).require("admin")
        read_query(http, {})
        body = await delete(caller.viewer, TraceFilter(trace_id=trace_id))
        if not body["num_deleted"]:
            raise TraceNotFoundError(f"There is no trace with the id '{trace_id[:80]}'.")
        return json_response(body)


def _number(query: dict[str, str], name: str) -> int:
    """Takes it out of the query. Raises InvalidRequestError."""
    text = query.pop(name)
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise InvalidRequestError(f"'{name}' is a number, not {text[:40]!r}", param=name, code="invalid_value")
    return int(text)


def _flag(query: dict[str, str], name: str) -> bool:
    """Takes it out of the query. Raises InvalidRequestError."""
    text = query.pop(name, "false")
    if text not in ("true", "false"):
        raise InvalidRequestError(f"'{name}' is true or false, not {text[:40]!r}", param=name, code="invalid_value")
    return text == "true"


def _chunks(lines: Iterator[str]) -> Iterator[bytes]:
    """At least one, of whole lines; each but the last of at least CHUNK_CHARS."""
    held, size = [], 0
    for line in lines:
        held.append(line + "\n")
        size += len(line)
        if size >= CHUNK_CHARS:
            yield "".join(held).encode()
            held, size = [], 0
    yield "".join(held).encode()


async def _sent(first: bytes, rest: Iterator[bytes], turns: Turns) -> AsyncIterator[bytes]:
    chunk: bytes | None = first
    while chunk is not None:
        yield chunk
        chunk = await turns.run(lambda: next(rest, None))
