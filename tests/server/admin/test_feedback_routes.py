"""Feedback over HTTP: it finds its target, twice is once, and what is wrong is a 4xx that names it."""

import json
from typing import Any

import httpx
import pytest

from server.traces.filters import TraceFilter
from server.traces.viewer import ADMIN
from tests.server.openai.harness import MODEL, Harness, async_test, serving
from tests.server.postgres import migrated_url, postgres_url

__all__ = ["migrated_url", "postgres_url"]

THUMBS = {"source": "thumbs", "score": 1}
JSON = {"Content-Type": "application/json"}


async def ask(h: Harness, text: str = "hi", **headers: str) -> httpx.Response:
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": 8}
    response = await h.http.post("/v1/chat/completions", json=body, headers=headers)
    assert response.status_code == 200
    return response


async def ask_for_trace(h: Harness, **headers: str) -> str:
    return (await ask(h, **headers)).headers["x-sterna-trace-id"]


async def give(h: Harness, trace_id: str, body: Any, **headers: str) -> httpx.Response:
    return await h.http.post(f"/v1/traces/{trace_id}/feedback", json=body, headers=headers)


def bearer(h: Harness, *scopes: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {h.records.keys.create('agent', scopes)[1]}"}


def error(response: httpx.Response) -> tuple[int, str | None, str | None]:
    said = response.json()["error"]
    return response.status_code, said["param"], said["code"]


@async_test
async def test_by_trace_by_response_and_for_the_episode(migrated_url: str) -> None:
    async with serving(database=migrated_url) as h:
        answer = await ask(h, **{"X-Sterna-Episode": "run 7/a"})
        trace_id, episode_id = answer.headers["x-sterna-trace-id"], answer.headers["x-sterna-episode"]
        whole = await h.http.post("/v1/completions", json={"model": MODEL, "prompt": "x", "max_tokens": 4})
        correction = {"role": "assistant", "content": "Hi \u00e9"}
        given = [
            await give(h, trace_id, {**THUMBS, "correction": correction, "label": "l", "comment": "c" * 16_384}),
            await h.http.post(f"/v1/responses/{answer.json()['id']}/feedback", json={**THUMBS, "score": 0.25}),
            await h.http.post(f"/v1/responses/{whole.json()['id']}/feedback", json=THUMBS),
            await h.http.post(f"/v1/episodes/{episode_id}/feedback", json=THUMBS),
            await h.http.post("/v1/episodes/run%207%2Fa/feedback", json={**THUMBS, "score": 0}),
        ]
        again = await h.http.post(f"/v1/responses/{answer.json()['id']}/feedback", json={**THUMBS, "score": 0.25})
        shown = (await h.http.get(f"/v1/traces/{trace_id}")).json()
        metrics = (await h.http.get("/metrics")).text
    assert [response.status_code for response in given] == [201] * 5
    first, by_response, of_completion, by_id, by_name = (response.json() for response in given)
    assert (first["object"], first["trace_id"], first["episode_id"], first["is_new"]) == (
        "feedback", trace_id, episode_id, True
    )  # fmt: skip
    assert (first["source"], first["score"], first["correction"], first["label"]) == ("thumbs", 1.0, correction, "l")
    assert by_response["trace_id"] == trace_id
    assert of_completion["trace_id"] == whole.headers["x-sterna-trace-id"]
    assert (by_id["trace_id"], by_id["episode_id"], by_name["episode_id"]) == (None, episode_id, episode_id)
    assert (again.status_code, again.json()) == (200, {**by_response, "is_new": False})
    assert [one["id"] for one in shown["feedback"]] == [one["id"] for one in (first, by_response, by_id, by_name)]
    assert shown["has_feedback"] is True
    assert f'sterna_feedback_total{{model="{MODEL}",source="thumbs"}} 5.0' in metrics
    assert f'sterna_feedback_score_sum{{model="{MODEL}",source="thumbs"}} 3.25' in metrics


@async_test
async def test_each_key_reaches_its_own_and_admin_all() -> None:
    async with serving() as h:
        keyless = await ask_for_trace(h)
        mine, theirs = bearer(h, "inference", "feedback"), bearer(h, "feedback")
        admin, asking = bearer(h, "admin"), bearer(h, "inference")
        answer = await ask(h, **mine, **{"X-Sterna-Episode": "run"})
        trace_id = answer.headers["x-sterna-trace-id"]
        targets = [f"traces/{trace_id}", f"responses/{answer.json()['id']}", "episodes/run"]
        by_them = [await h.http.post(f"/v1/{one}/feedback", json=THUMBS, headers=theirs) for one in targets]
        of_nothing = await give(h, "trace-nonsense", THUMBS, **mine)
        refused = [
            await give(h, trace_id, THUMBS),
            await give(h, trace_id, THUMBS, Authorization="Bearer sk-sterna-x"),
            await give(h, trace_id, THUMBS, **asking),
            await give(h, keyless, THUMBS, **mine),
        ]
        taken = [await h.http.post(f"/v1/{one}/feedback", json=THUMBS, headers=mine) for one in targets]
        taken += [await give(h, trace_id, THUMBS, **admin), await give(h, keyless, THUMBS, **admin)]
    assert [error(response) for response in by_them] == [(404, None, "not_found")] * 3
    texts = [response.json()["error"]["message"].replace(trace_id, "x") for response in (by_them[0], of_nothing)]
    assert texts[0] == texts[1].replace("trace-nonsense", "x"), "another's looks like none"
    assert [response.status_code for response in refused] == [401, 401, 403, 404]
    assert [response.status_code for response in taken] == [201, 200, 201, 201, 201], "its response is the same trace"


@async_test
async def test_an_idempotency_key_stands_for_one_feedback() -> None:
    async with serving() as h:
        one, other = await ask_for_trace(h), await ask_for_trace(h)
        key = {"idempotency_key": "k1"}
        first = await give(h, one, THUMBS | key)
        by_header = await give(h, one, THUMBS, **{"Idempotency-Key": "k1"})
        both = await give(h, one, THUMBS | key, **{"Idempotency-Key": "k1"})
        changed = await give(h, one, {**THUMBS, "score": 0, **key})
        elsewhere = await give(h, other, THUMBS | key)
        differ = await give(h, one, THUMBS | key, **{"Idempotency-Key": "k2"})
        empty = await give(h, one, THUMBS, **{"Idempotency-Key": ""})
    assert [response.status_code for response in (first, by_header, both)] == [201, 200, 200]
    assert len({response.json()["id"] for response in (first, by_header, both)}) == 1
    assert error(changed) == error(elsewhere) == (409, None, "conflict")
    assert error(differ)[:2] == error(empty)[:2] == (400, "idempotency_key")


@async_test
async def test_late_feedback_is_good_and_of_a_deleted_trace_unknown() -> None:
    async with serving() as h:
        trace_id = await ask_for_trace(h)
        assert (await give(h, trace_id, THUMBS)).status_code == 201
        h.records.deletion.delete(ADMIN, TraceFilter(trace_id=trace_id))
        deleted = [await give(h, trace_id, THUMBS), await give(h, trace_id, {**THUMBS, "score": 0})]
    assert [error(response) for response in deleted] == [(404, None, "not_found")] * 2


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"score": 1.01}, "score"),
        ({"score": -1e-9}, "score"),
        ({"score": 10**400}, "score"),
        ({"score": "1"}, "score"),
        ({"score": True}, "score"),
        ({"score": None}, "score"),
        ({"source": "hearsay"}, "source"),
        ({"source": None}, "source"),
        ({"label": ""}, "label"),
        ({"label": "x" * 257}, "label"),
        ({"comment": "x" * 16_385}, "comment"),
        ({"idempotency_key": "x" * 257}, "idempotency_key"),
        ({"correction": {"role": "user", "content": "x"}}, "correction.role"),
        ({"correction": {"role": "assistant"}}, "correction"),
        ({"correction": "x"}, "correction"),
        ({"correction": []}, "correction"),
        ({"trace_id": "x"}, "trace_id"),
        ({"stars": 5}, "stars"),
    ],
    ids=lambda value: str(value)[:40],
)
@async_test
async def test_a_bad_field_is_named(change: dict[str, Any], param: str | None) -> None:
    async with serving() as h:
        trace_id = await ask_for_trace(h)
        alone = await give(h, trace_id, THUMBS | change)
        item = {**THUMBS, "trace_id": trace_id}
        many = await h.http.post("/v1/feedback", json={"items": [item, {**item, **change}]})
        listed = h.records.feedback.list_for_trace(ADMIN, trace_id)
    assert (alone.status_code, alone.json()["error"]["param"]) == (400, param)
    if param != "trace_id":
        assert (many.status_code, many.json()["error"]["param"]) == (400, param and f"items[1].{param}")
        assert listed == []


@pytest.mark.parametrize(
    "body",
    ["", "{", "[]", '{"score": NaN}', '{"source": "thumbs", "score": 1e999}', '{"comment": "\\ud800"}', "[" * 100_000],
    ids=lambda body: body[:20],
)
@async_test
async def test_what_is_no_json_object_is_refused(body: str) -> None:
    async with serving() as h:
        trace_id = await ask_for_trace(h)
        one = await h.http.post(f"/v1/traces/{trace_id}/feedback", content=body, headers=JSON)
        many = await h.http.post("/v1/feedback", content=body, headers=JSON)
        as_text = await h.http.post("/v1/feedback", content="x", headers={"Content-Type": "text/plain"})
    assert (one.status_code, many.status_code, as_text.status_code) == (400, 400, 415)


@async_test
async def test_odd_unicode_is_unknown_or_kept(migrated_url: str) -> None:
    async with serving(database=migrated_url) as h:
        for name in ("%00", "a%00b", "%FF%FE", "%ED%A0%80", "x" * 5000, "%F0%9F%90%A6", "%20"):
            for kind in ("traces", "responses", "episodes"):
                response = await h.http.post(f"/v1/{kind}/{name}/feedback", json=THUMBS)
                assert response.status_code == 404, (kind, name)
        odd = {**THUMBS, "comment": "nul \0 \u202e \U0001f426", "label": "\0", "idempotency_key": "\0"}
        trace_id = await ask_for_trace(h)
        given = await give(h, trace_id, odd)
        many = await h.http.post("/v1/feedback", json={"items": [{**THUMBS, "trace_id": "\0"}]})
        shown = (await h.http.get(f"/v1/traces/{trace_id}")).json()["feedback"]
    assert given.status_code == 201
    assert error(many) == (404, "items[0]", "not_found")
    assert shown[0]["comment"] == "nul \ufffd \u202e \U0001f426"


@async_test
async def test_a_batch_is_taken_all_or_none_and_says_what_was_new() -> None:
    async with serving() as h:
        answers = [await ask(h, **{"X-Sterna-Episode": "run"}) for _ in range(2)]
        items = [
            {**THUMBS, "trace_id": answers[0].headers["x-sterna-trace-id"]},
            {**THUMBS, "response_id": answers[1].json()["id"], "idempotency_key": "k"},
            {"source": "audit_sample", "label": "good", "episode_id": "run"},
        ]

        async def send(*more: Any, **headers: str) -> httpx.Response:
            return await h.http.post("/v1/feedback", json={"items": [*items, *more]}, headers=headers)

        bad = [
            await send({**THUMBS, "trace_id": "trace-nonsense"}),
            await send(
                {"source": "thumbs", "score": 0, "response_id": answers[1].json()["id"], "idempotency_key": "k"}
            ),
            await send({**THUMBS, "episode_id": "run", "correction": {"role": "assistant", "content": "x"}}),
            await send({**THUMBS}),
            await send({**THUMBS, "trace_id": "x", "episode_id": "run"}),
        ]
        before = h.records.queries.list(ADMIN, TraceFilter(has_feedback=True)).traces
        first, second = await send(), await send({**THUMBS, "score": 0.5, "episode_id": "run"})
        keyed = [await send(**{"Idempotency-Key": "batch"}) for _ in range(2)]
        sizes = [await h.http.post("/v1/feedback", json={"items": items[:1] * count}) for count in (0, 1000, 1001)]
    assert [error(response) for response in bad] == [
        (404, "items[3]", "not_found"),
        (409, "items[3]", "conflict"),
        (400, "items[3].correction", "invalid_value"),
        (400, "items[3].trace_id", "invalid_value"),
        (400, "items[3].trace_id", "invalid_value"),
    ]
    assert before == []
    assert (first.status_code, first.json()["num_new"]) == (201, 3)
    assert [one["is_new"] for one in first.json()["data"]] == [True] * 3
    assert (second.status_code, second.json()["num_new"]) == (201, 1)
    assert [one["is_new"] for one in second.json()["data"]] == [False, False, False, True]
    assert [(one.status_code, one.json()["num_new"]) for one in keyed] == [(201, 2), (200, 0)]
    assert [response.status_code for response in sizes] == [400, 200, 400]
    assert error(sizes[2])[1] == "items"


@async_test
async def test_while_the_database_is_away_it_is_503() -> None:
    async with serving() as h:
        trace_id = await ask_for_trace(h)
        path = h.records.database._path
        assert path is not None
        path.rename(path.with_suffix(".away"))
        away = [
            await give(h, trace_id, THUMBS),
            await h.http.post("/v1/feedback", json={"items": [{**THUMBS, "trace_id": trace_id}]}),
        ]
        path.with_suffix(".away").rename(path)
        back = await give(h, trace_id, THUMBS)
    assert [response.status_code for response in away] == [503, 503]
    assert "retry-after" in away[0].headers
    assert back.status_code == 201


@async_test
async def test_the_document_has_the_bodies() -> None:
    async with serving() as h:
        document = (await h.http.get("/openapi.json")).json()
    schemas = document["components"]["schemas"]
    assert {"source", "score", "correction", "label", "comment", "idempotency_key"} == set(
        schemas["FeedbackRequest"]["properties"]
    )
    assert schemas["FeedbackBatch"]["properties"]["items"]["maxItems"] == 1000
    body = document["paths"]["/v1/traces/{trace_id}/feedback"]["post"]["requestBody"]
    assert json.dumps(body).count("FeedbackRequest") == 1
