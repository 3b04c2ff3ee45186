"""/v1/traces: lists, one trace, totals, export, deletion; who sees what; what is wrong is a 4xx that names it."""

import json
from typing import Any

import httpx
import pytest

from server.admin import trace_routes
from server.traces.feedback import Feedback, Target
from server.traces.lineage import Lineage
from server.traces.viewer import ADMIN
from tests.server.admin.test_feedback_routes import ask, bearer, error
from tests.server.openai.harness import MODEL, Harness, async_test, serving
from tests.server.postgres import migrated_url, postgres_url
from tests.server.traces.builders import START, assistant, call, make_record, tool, user

__all__ = ["migrated_url", "postgres_url"]


async def ids(h: Harness, query: str = "", **headers: str) -> list[str]:
    response = await h.http.get(f"/v1/traces{query}", headers=headers)
    assert response.status_code == 200, response.text
    return [one["id"] for one in response.json()["data"]]


def write(h: Harness, *answers: str, **changes: Any) -> list[str]:
    """A trace an answer, in order."""
    records = [make_record([user("x")], assistant(text), **changes) for text in answers]
    h.records.log._store.write(records)
    return [record.id for record in records]


@async_test
async def test_a_list_is_filtered_and_goes_page_by_page(migrated_url: str) -> None:
    async with serving(database=migrated_url) as h:
        old = write(h, "a", "b", "c", user_id="eve", adapter="tools", version="tools@2", status="failed")
        new = (await ask(h, **{"X-Sterna-Episode": "run"})).headers["x-sterna-trace-id"]
        pages = [(await h.http.get("/v1/traces?limit=3")).json()]
        pages.append((await h.http.get(f"/v1/traces?limit=3&before={pages[0]['next_before']}")).json())
        assert [[one["id"] for one in page["data"]] for page in pages] == [[new, *old[:0:-1]], old[:1]]
        assert [page["next_before"] is None for page in pages] == [False, True]
        for query in ("adapter=tools", "version=tools@2", "user_id=eve", "status=failed", "until=2026-01-02",
                      "until=2026-01-01T01%3A00%3A00%2B00%3A00", "until=1h"):  # fmt: skip
            assert await ids(h, f"?{query}") == old[::-1], query
        for query in ("episode_id=run", "since=1h", "status=ok&purpose=user", "is_audit=false&user_id="):
            assert await ids(h, f"?{query}") == ([new] if "user_id" not in query else []), query
        assert await ids(h, f"?trace_id={old[1]}&has_feedback=false&key_id=") == [old[1]]
        assert await ids(h, "?adapter=%00&user_id=%FF") == []
    first = pages[0]["data"][0]
    assert (first["object"], first["requested_model"], first["status"], first["version"]) == (
        "trace",
        MODEL,
        "ok",
        None,
    )
    assert first["created_at"].endswith("+00:00")


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("colour=red", "colour"),
        ("limit=0", "limit"),
        ("limit=1001", "limit"),
        ("limit=ten", "limit"),
        ("limit=", "limit"),
        ("limit=1&limit=2", "limit"),
        ("before=0", "before"),
        ("before=-1", "before"),
        ("before=9223372036854775808", "before"),
        ("before=٣", "before"),
        ("status=good", "status"),
        ("has_feedback=yes", "has_feedback"),
        ("since=yesterday", "since"),
        ("until=0001-01-01T00:00%2B14:00", "until"),
    ],
)
@async_test
async def test_a_bad_query_is_named(query: str, param: str) -> None:
    async with serving() as h:
        refused = [await h.http.get(f"/v1/traces?{query}")]
        if param not in ("limit", "before"):
            refused += [await h.http.get(f"/v1/traces/{one}?{query}") for one in ("stats", "export")]
            refused.append(await h.http.delete(f"/v1/traces?{query}"))
        strict = [await h.http.get("/v1/traces/x?y=1"), await h.http.delete("/v1/traces/x?y=1")]
        strict += [await h.http.get("/v1/traces/export?with_corrections=1")]
    assert {error(response)[:2] for response in refused} == {(400, param)}
    assert [error(response)[:2] for response in strict] == [(400, "y"), (400, "y"), (400, "with_corrections")]


@async_test
async def test_one_trace_has_everything() -> None:
    async with serving() as h:
        asked = make_record([user("x")], assistant(None, call("s", call_id="call_1")), tools=[tool("s")])
        h.records.log._store.write([asked])
        h.records.feedback.add(ADMIN, Target("trace", asked.id), Feedback(source="thumbs", score=0.5))
        shown = await h.http.get(f"/v1/traces/{asked.id}")
        unknown = [await h.http.get(f"/v1/traces/{name}") for name in ("trace-nonsense", "%00", "%FF")]
    body = shown.json()
    assert body["request"] == {"messages": [user("x")], "tools": [tool("s")]}
    assert body["answers"][0]["message"] == assistant(None, call("s", call_id="call_1"))
    assert body["tool_calls"] == [{"call_id": "call_1", "name": "s", "outcome": None}]
    assert (body["prompt_token_ids"], body["completion_token_ids"]) == ([1, 2, 3, 4], [[5, 6, 7]])
    assert (body["details"], body["created_at"]) == ({"model": "base"}, START.isoformat())
    assert [given["score"] for given in body["feedback"]] == [0.5]
    assert [error(response) for response in unknown] == [(404, None, "not_found")] * 3


@async_test
async def test_totals(migrated_url: str) -> None:
    async with serving(database=migrated_url) as h:
        empty = (await h.http.get("/v1/traces/stats")).json()
        write(h, "a", "b", user_id="eve")
        write(h, "c")
        totals = [(await h.http.get(f"/v1/traces/stats{query}")).json() for query in ("", "?user_id=eve")]
    assert (empty["object"], empty["num_traces"], empty["oldest"]) == ("traces.stats", 0, None)
    assert [one["num_traces"] for one in totals] == [3, 2]
    assert totals[0]["newest"] == START.isoformat()
    assert totals[0]["by_status"] == {"ok": 3}


@async_test
async def test_an_export_is_lines_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_routes, "CHUNK_CHARS", 100)
    async with serving() as h:
        empty = await h.http.get("/v1/traces/export")
        texts = [f"{number} é\u2028 \ud83d" for number in range(300)]
        names = write(h, *texts)
        write(h, "no", status="failed")
        given = Feedback(source="user_correction", correction=assistant("better"))
        h.records.feedback.add(ADMIN, Target("trace", names[0]), given)
        plain = await h.http.get("/v1/traces/export")
        corrected = await h.http.get(f"/v1/traces/export?trace_id={names[0]}&with_corrections=true")
    assert (empty.status_code, empty.content, empty.headers["content-type"]) == (200, b"", "application/jsonl")
    lines = plain.content.decode().split("\n")
    assert lines.pop() == ""
    answers = [json.loads(line)["messages"][1]["content"] for line in lines]
    assert answers == [text.replace("\ud83d", "\ufffd") for text in texts]
    assert json.loads(corrected.content)["messages"] == [user("x"), assistant("better")]


@async_test
async def test_each_key_sees_its_own_and_admin_all() -> None:
    async with serving() as h:
        [keyless] = write(h, "a")
        assert await ids(h) == [keyless], "loopback, and no key exists"
        mine, theirs, admin = bearer(h, "inference", "feedback"), bearer(h, "feedback"), bearer(h, "admin")
        asking = bearer(h, "inference")
        trace_id = (await ask(h, **mine)).headers["x-sterna-trace-id"]
        seen = [await ids(h, **headers) for headers in (mine, theirs, admin)]
        exported = [await h.http.get("/v1/traces/export", headers=headers) for headers in (mine, theirs, admin)]
        totals = [(await h.http.get("/v1/traces/stats", headers=headers)).json() for headers in (mine, theirs, admin)]
        shown = [await h.http.get(f"/v1/traces/{trace_id}", headers=headers) for headers in (mine, theirs, admin)]
        kinds = [await h.http.get(f"/v1/traces{path}", headers=asking) for path in ("", "/stats", "/export", "/x")]
        nobody = [await h.http.get("/v1/traces"), await h.http.delete("/v1/traces?user_id=x")]
    assert seen == [[trace_id], [], [trace_id, keyless]]
    assert [len(response.content.splitlines()) for response in exported] == [1, 0, 2]
    assert [one["num_traces"] for one in totals] == [1, 0, 2]
    assert [response.status_code for response in shown] == [200, 404, 200]
    assert {response.status_code for response in kinds} == {403}
    assert {response.status_code for response in nobody} == {401}


@async_test
async def test_without_keys_others_than_loopback_see_nothing() -> None:
    async with serving(is_loopback=False) as h:
        await ask(h)
        refused = [await h.http.get(f"/v1/traces{path}") for path in ("", "/stats", "/export", "/x")]
        refused += [await h.http.delete("/v1/traces?user_id=x"), await h.http.delete("/v1/traces/x")]
        refused.append(await h.http.post("/v1/feedback", json={}))
    assert {response.status_code for response in refused} == {403}
    assert "sterna keys create" in refused[0].json()["error"]["message"]


async def counts(h: Harness, method: str, path: str, **headers: str) -> tuple[int, int | None]:
    response: httpx.Response = await h.http.request(method, path, headers=headers)
    return response.status_code, response.json().get("num_deleted")


@async_test
async def test_admin_deletes_by_filter_or_id(migrated_url: str) -> None:
    async with serving(database=migrated_url) as h:
        one, two = write(h, "a", "b")
        write(h, "c", "d", user_id="eve")
        agent, admin = bearer(h, "inference", "feedback", "train"), bearer(h, "admin")
        mine = (await ask(h, **agent)).headers["x-sterna-trace-id"]
        assert await counts(h, "DELETE", f"/v1/traces/{mine}", **agent) == (403, None)
        assert await counts(h, "DELETE", "/v1/traces?user_id=eve", **agent) == (403, None)
        assert await counts(h, "DELETE", "/v1/traces", **admin) == (400, None), "everything is not a filter"
        assert await counts(h, "DELETE", "/v1/traces?user_id=eve", **admin) == (200, 2)
        assert await counts(h, "DELETE", "/v1/traces?user_id=eve", **admin) == (200, 0)
        assert await counts(h, "DELETE", f"/v1/traces/{one}", **admin) == (200, 1)
        assert await counts(h, "DELETE", f"/v1/traces/{one}", **admin) == (404, None)
        assert await counts(h, "DELETE", "/v1/traces/%00", **admin) == (404, None)
        assert await ids(h, **admin) == [mine, two]
        queries, lineage = h.records.queries, Lineage(h.records.database)
        seq = queries.show(ADMIN, two).summary.seq
        lineage.add_snapshot("sha256:a", "tools", {"train": [seq]})
        lineage.add_version("tools", 3, "sha256:a")
        gone = await h.http.delete(f"/v1/traces/{two}", headers=admin)
        assert gone.json() == {"object": "traces.deleted", "num_deleted": 1, "versions": ["tools@3"]}


@async_test
async def test_while_the_database_is_away_it_is_503() -> None:
    async with serving() as h:
        write(h, "a")
        assert await ids(h)
        path = h.records.database._path
        assert path is not None
        path.rename(path.with_suffix(".away"))
        away = [await h.http.get(f"/v1/traces{one}") for one in ("", "/stats", "/export", "/x")]
        away += [await h.http.delete("/v1/traces?user_id=x"), await h.http.delete("/v1/traces/x")]
        path.with_suffix(".away").rename(path)
        back = await ids(h)
    assert [response.status_code for response in away] == [503] * 6
    assert len(back) == 1


@async_test
async def test_the_document_has_the_queries() -> None:
    async with serving() as h:
        document = (await h.http.get("/openapi.json")).json()
    listed = {one["name"]: one for one in document["paths"]["/v1/traces"]["get"]["parameters"]}
    assert {"limit", "before", "episode_id", "since"} <= listed.keys()
    assert listed["status"]["schema"]["enum"] == ["ok", "cancelled", "failed"]
