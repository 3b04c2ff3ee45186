"""/v1/adapters over the real registry and store: reading, moving between states, who may, and what is refused."""

import asyncio
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from server.adapters.router import Arm
from server.adapters.version import VersionRef
from tests.server.admin.adapter_files import WHY, act, error, message, put, upload
from tests.server.openai.harness import MODEL, Harness, async_test, serving


def answering(h: Harness, model: str = "tools", episode: str = "e") -> str:
    """Who would answer a request that comes now."""
    assert h.records.adapters is not None
    version = h.records.adapters.resolve(model, episode_id=episode, request_id="r").version
    return MODEL if version is None else str(version.ref)


async def key(h: Harness, *scopes: str) -> dict[str, str]:
    _, text = await asyncio.to_thread(h.records.keys.create, "-".join(scopes), scopes)
    return {"Authorization": f"Bearer {text}"}


@async_test
async def test_a_version_s_life(tmp_path: Path) -> None:
    async with serving() as h:
        await put(h.http, tmp_path, 1, 2)
        assert answering(h) == MODEL
        assert answering(h, "tools@2") == "tools@2"

        shadowed = (await act(h.http, "tools/versions/1/shadow", share=0.5)).json()
        assert (shadowed["shadow"], shadowed["shadow_share"]) == ("tools@1", 0.5)
        canary = (await act(h.http, "tools/versions/1/canary", share=1)).json()
        assert (canary["canary"], canary["canary_share"], canary["shadow"]) == ("tools@1", 1.0, None)
        assert answering(h) == "tools@1"
        shared = (await act(h.http, "tools/shares", state="canary", share=0)).json()
        assert shared["canary_share"] == 0
        assert answering(h) == MODEL

        live = (await act(h.http, "tools/versions/1/promote", hold_back_share=0.25)).json()
        assert (live["live"], live["previous"], live["hold_back_share"]) == ("tools@1", None, 0.25)
        live = (await act(h.http, "tools/versions/2/promote", override=True)).json()
        assert (live["live"], live["previous"], live["hold_back_share"]) == ("tools@2", "tools@1", 0.0)
        assert live["serving"]["live"] == answering(h) == "tools@2"
        assert live["serving"]["failure"] is None

        back = (await act(h.http, "tools/rollback")).json()
        assert (back["live"], answering(h)) == ("tools@1", "tools@1")
        again = (await act(h.http, "tools/rollback", to=2)).json()
        assert (again["live"], answering(h)) == ("tools@2", "tools@2")


@async_test
async def test_list_and_show(tmp_path: Path) -> None:
    async with serving() as h:
        assert (await h.http.get("/v1/adapters")).json() == {"object": "list", "data": []}
        await put(h.http, tmp_path, 1, 2)
        await put(h.http, tmp_path, 1, name="other")
        await act(h.http, "tools/versions/2/promote", override=True)
        listed = (await h.http.get("/v1/adapters")).json()["data"]
        shown = (await h.http.get("/v1/adapters/tools")).json()
        one = (await h.http.get("/v1/adapters/tools/versions/2")).json()
    assert [(row["name"], row["live"], row["num_versions"]) for row in listed] == [
        ("other", None, 1), ("tools", "tools@2", 2)
    ]  # fmt: skip
    assert listed[1].items() <= shown.items()
    assert [version["version"] for version in shown["versions"]] == ["tools@2", "tools@1"]
    assert one == shown["versions"][0]
    assert (one["state"], one["rank"], one["origin"], one["predecessor"]) == ("live", 2, "upload", None)
    assert one["digest"].startswith("sha256:")
    assert datetime.fromisoformat(one["created_at"]).utcoffset() == timedelta(0)
    assert "directory" not in one


@async_test
async def test_history_says_who_and_why(tmp_path: Path) -> None:
    async with serving() as h:
        await put(h.http, tmp_path, 1)
        operator = await key(h, "admin")
        body = {"reason": "it looks good", "share": 0.1}
        await h.http.post("/v1/adapters/tools/versions/1/canary", json=body, headers=operator)
        rows = (await h.http.get("/v1/adapters/tools/history", headers=operator)).json()["data"]
        last = await h.http.get("/v1/adapters/tools/history", params={"limit": "1"}, headers=operator)
        unknown = await h.http.get("/v1/adapters/nothing/history", headers=operator)
    assert [(row["action"], row["asked_by"], row["reason"], row["share"]) for row in rows] == [
        ("canary", "key 'admin'", "it looks good", 0.1), ("import", "loopback", "a test", None)
    ]  # fmt: skip
    assert (rows[0]["from_state"], rows[0]["to_state"], rows[1]["from_state"]) == ("candidate", "canary", None)
    assert datetime.fromisoformat(rows[0]["at"]).utcoffset() == timedelta(0)
    assert last.json()["data"] == rows[:1]
    assert error(unknown) == (404, "version_not_found")


@async_test
async def test_pin_reject_and_delete(tmp_path: Path) -> None:
    async with serving() as h:
        await put(h.http, tmp_path, 1)
        assert (await act(h.http, "tools/versions/1/pin")).json()["is_pinned"] is True
        assert (await act(h.http, "tools/versions/1/reject")).json()["versions"][0]["state"] == "rejected"
        refused = await h.http.delete("/v1/adapters/tools/versions/1", params=WHY)
        assert error(refused) == (409, "conflict")
        assert "unpin it first" in message(refused)
        assert (await act(h.http, "tools/versions/1/unpin")).json()["is_pinned"] is False
        for _ in range(2):  # deleting again is no failure
            deleted = await h.http.delete("/v1/adapters/tools/versions/1", params=WHY)
            assert deleted.json()["is_deleted"] is True
        assert error(await h.http.get("/v1/adapters/tools/versions/1/export")) == (409, "conflict")
        assert error(await h.http.get("/v1/adapters/tools/versions/1/diff", params={"other": "tools@1"}))[0] == 409
        assert error(await act(h.http, "tools/versions/1/pin")) == (409, "conflict")
        assert (await h.http.get("/v1/adapters/tools")).json()["num_versions"] == 0


@async_test
async def test_of_two_that_race_one_is_told_to_read_again(tmp_path: Path) -> None:
    async with serving() as h:
        await put(h.http, tmp_path, 1, 2)
        seen = (await h.http.get("/v1/adapters/tools")).json()["change"]
        answers = await asyncio.gather(
            *(act(h.http, f"tools/versions/{n}/promote", override=True, expected_change=seen) for n in (1, 2))
        )
        won, lost = sorted(answers, key=lambda answer: answer.status_code)
        assert (won.status_code, error(lost)) == (200, (409, "conflict"))
        assert "read it again" in message(lost)
        now = (await h.http.get("/v1/adapters/tools")).json()
        assert now["live"] == won.json()["live"] == answering(h)
        assert now["previous"] is None

        # A change number is good until the next change, and every answer brings the new one.
        kept = await act(h.http, "tools/rollback", expected_change=now["change"])
        assert kept.status_code == 200
        assert kept.json()["change"] > now["change"]


@async_test
async def test_scopes(tmp_path: Path) -> None:
    async with serving() as h:
        await put(h.http, tmp_path, 1, 2)
        train, user = await key(h, "train"), await key(h, "inference", "feedback")
        base = "/v1/adapters/tools"

        async def post(path: str, headers: dict[str, str], **body: Any) -> int:
            return (await h.http.post(f"{base}/{path}", json=WHY | body, headers=headers)).status_code

        for headers, status in ((user, 403), ({}, 401), ({"Authorization": "Bearer sk-no"}, 401)):
            for path in ("", "/tools", "/tools/history", "/tools/versions/1", "/tools/versions/1/export"):
                assert (await h.http.get(f"/v1/adapters{path}", headers=headers)).status_code == status
            assert await post("versions/1/canary", headers, share=0.1) == status
            assert await post("versions", headers) == status
        # The training loop moves what it has tested; a human alone goes past the test or removes what was kept.
        assert await post("versions/1/promote", train, override=True) == 403
        assert await post("versions/1/pin", train) == 403
        assert await post("versions/1/unpin", train) == 403
        assert (await h.http.delete(f"{base}/versions/1", params=WHY, headers=train)).status_code == 403
        assert (await h.http.get(base, headers=train)).json()["live"] is None
        assert await post("versions/2/shadow", train) == 200
        assert await post("versions/2/reject", train) == 200
        assert await post("versions/1/canary", train, share=0.1) == 200
        assert await post("shares", train, state="canary", share=0.2) == 200
        assert await post("versions/1/promote", train) == 200
        assert await post("rollback", train) == 200


@async_test
async def test_a_server_that_is_reached_from_elsewhere_needs_a_key() -> None:
    async with serving(is_loopback=False) as h:
        response = await h.http.get("/v1/adapters")
    assert error(response) == (403, "insufficient_permissions")
    assert "sterna keys create" in message(response)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "nothing"),
        ("GET", "nothing/versions/1"),
        ("GET", "tools/versions/9"),
        ("GET", "tools/versions/x"),
        ("GET", "tools/versions/01"),
        ("GET", "tools/versions/9999999999999999999999"),
        ("GET", "tools/versions/9/export"),
        ("GET", "tools/versions/9/diff?other=tools@1"),
        ("GET", "tools/versions/1/diff?other=tools@9"),
        ("GET", "%00"),
        ("GET", "..%2f..%2fetc/versions/1/export"),
        ("POST", "tools/versions/9/promote"),
        ("POST", "tools/rollback?"),
        ("POST", "nothing/rollback"),
        ("DELETE", "tools/versions/9?reason=x"),
    ],
)
@async_test
async def test_what_is_not_there(method: str, path: str, tmp_path: Path) -> None:
    async with serving() as h:
        await put(h.http, tmp_path, 1)
        body = WHY | ({"to": 9} if path == "tools/rollback?" else {})
        await act(h.http, "tools/versions/1/promote", override=True)
        response = await h.http.request(method, f"/v1/adapters/{path}", json=body if method == "POST" else None)
    assert error(response)[0] == 404
    assert error(response)[1] in ("version_not_found", "unknown_url")  # %2f makes another path of it


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("versions/1/canary", {}, "share"),
        ("versions/1/canary", {"share": 1.5}, "share"),
        ("versions/1/canary", {"share": "0.5"}, "share"),
        ("versions/1/canary", {"share": True}, "share"),
        ("versions/1/canary", {"share": 10**400}, "share"),
        ("versions/1/canary", {"share": 0.5, "reason": ""}, "reason"),
        ("versions/1/canary", {"share": 0.5, "reason": "x" * 2001}, "reason"),
        ("versions/1/canary", {"share": 0.5, "reason": "\0"}, "reason"),
        ("versions/1/canary", {"share": 0.5, "reason": None}, "reason"),
        ("versions/1/promote", {"asked_by": "somebody else"}, "asked_by"),
        ("versions/1/promote", {"override": "yes"}, "override"),
        ("versions/1/promote", {"expected_change": 1.5}, "expected_change"),
        ("versions/1/promote", {"expected_change": 2**70}, "expected_change"),
        ("rollback", {"to": 0}, "to"),
        ("rollback", {"to": 10**400}, "to"),
        ("shares", {"state": "retired", "share": 0.5}, "state"),
    ],
)
@async_test
async def test_bad_bodies(path: str, body: dict[str, Any], param: str, tmp_path: Path) -> None:
    async with serving() as h:
        await put(h.http, tmp_path, 1)
        before = (await h.http.get("/v1/adapters/tools")).json()
        response = await act(h.http, f"tools/{path}", **body)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == param
        assert (await h.http.get("/v1/adapters/tools")).json() == before


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("versions/1/promote", "tools@1 is candidate; 'promote' needs a version that is canary"),
        ("rollback", "tools has no live version to roll back"),
        ("shares", "tools has no canary version whose share could be set"),
    ],
)
@async_test
async def test_what_the_state_does_not_allow(path: str, words: str, tmp_path: Path) -> None:
    async with serving() as h:
        await put(h.http, tmp_path, 1)
        response = await act(h.http, f"tools/{path}", **({"state": "canary", "share": 0.1} if path == "shares" else {}))
    assert error(response) == (409, "conflict")
    assert message(response) == words


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("tools/history?limit=0", "limit"),
        ("tools/history?limit=1001", "limit"),
        ("tools/history?limit=x", "limit"),
        ("tools/history?limit=1&limit=2", "limit"),
        ("tools/history?page=2", "page"),
        ("tools/versions/1/diff", "other"),
        ("tools/versions/1/diff?other=tools", "other"),
    ],
)
@async_test
async def test_bad_queries(path: str, param: str, tmp_path: Path) -> None:
    async with serving() as h:
        await put(h.http, tmp_path, 1)
        response = await h.http.get(f"/v1/adapters/{path}")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


@async_test
async def test_a_body_that_is_not_json() -> None:
    async with serving() as h:
        path = "/v1/adapters/tools/rollback"
        assert (await h.http.post(path, content=b"{}")).status_code == 415
        assert (await h.http.post(path, content=b"{", headers={"Content-Type": "application/json"})).status_code == 400
        assert (await h.http.put(path, json={})).status_code == 405


@async_test
async def test_a_promotion_that_this_server_cannot_follow_says_so(tmp_path: Path) -> None:
    """The registry has decided; the old route stays, and whoever asked learns why."""
    async with serving() as h:
        await put(h.http, tmp_path, 1, 2)
        await act(h.http, "tools/versions/1/promote", override=True)
        assert h.records.versions is not None
        broken = h.records.versions.path(h.records.versions.registry.version(VersionRef("tools", 2)))
        (broken / "adapter_model.safetensors").write_bytes(b"not any more")
        promoted = (await act(h.http, "tools/versions/2/promote", override=True)).json()
        assert (promoted["live"], promoted["serving"]["live"], answering(h)) == ("tools@2", "tools@1", "tools@1")
        failure = promoted["serving"]["failure"]
        assert (failure["version"], failure["num_attempts"]) == ("tools@2", 1)
        assert failure["reason"].startswith("tools@2: ")
        assert 0 <= failure["retry_in_seconds"] <= 1
        assert (await h.http.get("/v1/adapters/other")).status_code == 404
        diff = await h.http.get("/v1/adapters/tools/versions/1/diff", params={"other": "tools@2"})
        assert error(diff) == (503, "service_unavailable")


@async_test
async def test_requests_are_counted_by_version(tmp_path: Path) -> None:
    async with serving() as h:
        await put(h.http, tmp_path, 1)
        for _ in range(2):
            await h.client.completions.create(model="tools@1", prompt="x", max_tokens=4)
        shown = (await h.http.get("/v1/adapters/tools")).json()
    assert shown["serving"]["num_requests"] == {"tools@1": 2}


@async_test
async def test_held_back_episodes_stay(tmp_path: Path) -> None:
    async with serving() as h:
        await put(h.http, tmp_path, 1, 2)
        await act(h.http, "tools/versions/1/promote", override=True)
        await act(h.http, "tools/versions/2/promote", override=True, hold_back_share=0.5)
        assert h.records.adapters is not None
        routes = [h.records.adapters.resolve("tools", episode_id=str(n), request_id="r") for n in range(64)]
    assert {(route.arm, str(route.version.ref)) for route in routes if route.version} == {
        (Arm.LIVE, "tools@2"), (Arm.HOLD_BACK, "tools@1")
    }  # fmt: skip


@async_test
async def test_the_document_lists_the_routes(tmp_path: Path) -> None:
    async with serving() as h:
        document = (await h.http.get("/openapi.json")).json()
    promote = document["paths"]["/v1/adapters/{name}/versions/{number}/promote"]["post"]
    reference = promote["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    fields = document["components"]["schemas"][reference.rsplit("/", 1)[1]]["properties"]
    assert fields.keys() == {"reason", "hold_back_share", "override", "expected_change"}
    imported = document["paths"]["/v1/adapters/{name}/versions"]["post"]
    assert list(imported["requestBody"]["content"]) == ["application/zip"]
    assert {one["name"] for one in imported["parameters"]} == {"name", "reason", "origin", "base_digest", "parent"}


@async_test
async def test_an_upstream_s_adapters_are_not_ours(tmp_path: Path) -> None:
    async with serving() as h:
        records = replace(h.records, adapters=None, versions=None)
        h.app.state.service.records = lambda: records
        for response in (await h.http.get("/v1/adapters"), await upload(h.http, b"x")):
            assert error(response) == (404, "adapters_not_served")
            assert "--backend openai" in message(response)
