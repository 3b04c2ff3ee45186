"""Feedback over HTTP: on a trace, on a response by its id, on an episode, or up to 1000 of these at once.

Scope `feedback`; a key reaches its own traces, admin all. 201 when something is new, 200 when all of it was known.
"""

from collections.abc import Sequence

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.admin.feedback_wire import FeedbackBatch, FeedbackRequest
from server.admin.trace_views import taken_body
from server.admin.turns import Turns
from server.openai.body import read_model
from server.openai.openapi import request_body
from server.openai.respond import json_response
from server.openai.service import Service
from server.traces.feedback import StoredFeedback, Target

IDEMPOTENCY_HEADER = "Idempotency-Key"


def build_feedback_router(service: Service) -> APIRouter:
    router = APIRouter()
    turns = Turns(1)  # the database writes one at a time anyway

    async def give(http: Request, target: Target) -> Response:
        caller = (await service.access.caller(http)).require("feedback")
        given = (await read_model(http, FeedbackRequest)).feedback(http.headers.get(IDEMPOTENCY_HEADER))
        store = service.records().feedback
        stored = await turns.run(lambda: store.add(caller.viewer, target, given))
        _count(service, [stored])
        return json_response(taken_body(stored), 201 if stored.is_new else 200)

    @router.post("/v1/traces/{trace_id}/feedback", openapi_extra=request_body(FeedbackRequest))
    async def create_trace_feedback(http: Request, trace_id: str) -> Response:
        return await give(http, Target("trace", trace_id))

    @router.post("/v1/responses/{response_id}/feedback", openapi_extra=request_body(FeedbackRequest))
    async def create_response_feedback(http: Request, response_id: str) -> Response:
        return await give(http, Target("response", response_id))

    @router.post("/v1/episodes/{episode_id:path}/feedback", openapi_extra=request_body(FeedbackRequest))
    async def create_episode_feedback(http: Request, episode_id: str) -> Response:
        return await give(http, Target("episode", episode_id))

    @router.post("/v1/feedback", openapi_extra=request_body(FeedbackBatch))
    async def create_feedback(http: Request) -> Response:
        caller = (await service.access.caller(http)).require("feedback")
        items = (await read_model(http, FeedbackBatch)).feedback(http.headers.get(IDEMPOTENCY_HEADER))
        store = service.records().feedback
        stored = await turns.run(lambda: store.add_many(caller.viewer, items))
        _count(service, stored)
        num_new = sum(one.is_new for one in stored)
        body = {"object": "list", "data": [taken_body(one) for one in stored], "num_new": num_new}
        return json_response(body, 201 if num_new else 200)

    return router


def _count(service: Service, stored: Sequence[StoredFeedback]) -> None:
    base_name = service.parts().base_name
    for one in stored:
        for version in one.answered_by:
            service.metrics.count_feedback(version or base_name, one.feedback.source, one.feedback.score)
