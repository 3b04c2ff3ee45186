"""From a model name to the version that answers, over the HTTP layer: handles, headers, fingerprints, traces."""

from functools import partial
from pathlib import Path
from typing import Any

from server.adapters.version import Version
from server.traces.filters import TraceFilter
from server.traces.viewer import ADMIN
from tests.server.adapters.make import WHO, adapter_dir
from tests.server.openai.harness import MODEL, Harness, async_test, serving
from tests.server.openai.scripted import FINGERPRINT

USER = [{"role": "user", "content": "hi"}]


async def add(h: Harness, path: Path, content: int) -> Version:
    versions, adapters = h.records.versions, h.records.adapters
    assert versions is not None
    assert adapters is not None
    source = adapter_dir(path / f"adapter-{content}", content)
    version, is_new = await adapters.change(partial(versions.import_version, source, "tools", **WHO))
    assert is_new
    return version


async def ask(h: Harness, model: str, **headers: str) -> Any:
    body = {"model": model, "messages": USER, "max_tokens": 9}
    return await h.http.post("/v1/chat/completions", json=body, headers=headers)


@async_test
async def test_names_lead_to_versions(tmp_path: Path) -> None:
    async with serving() as h:
        assert (await ask(h, "tools")).status_code == 404
        first = await add(h, tmp_path, 1)
        base = await ask(h, "tools")
        pinned = await ask(h, "tools@1")
        adapters, registry = h.records.adapters, h.records.versions.registry  # type: ignore[union-attr]
        assert adapters is not None
        await adapters.change(partial(registry.promote, first.ref, override=True, **WHO))
        live = await ask(h, "tools")
        plain = await ask(h, MODEL)
        unknown = await ask(h, "tools@2")
        models = [model["id"] for model in (await h.http.get("/v1/models")).json()["data"]]
        parent = (await h.http.get("/v1/models/tools@1")).json()["parent"]
        missing = await h.http.get("/v1/models/tools@9")
        handles = [one.adapter.digest if one.adapter else None for one in h.engine.submitted]
        page = h.records.queries.list(ADMIN, TraceFilter()).traces
        metrics = (await h.http.get("/metrics")).text
    assert handles == [None, first.digest, first.digest, None]
    assert "x-sterna-adapter-version" not in base.headers
    assert base.json()["system_fingerprint"] == plain.json()["system_fingerprint"] == FINGERPRINT
    for response in (pinned, live):
        assert response.headers["x-sterna-adapter-version"] == "tools@1"
        assert response.headers["x-sterna-adapter-digest"] == first.digest
        assert response.json()["system_fingerprint"] == f"{FINGERPRINT}-{first.digest[7:23]}"
    assert live.json()["model"] == "tools"
    assert unknown.status_code == missing.status_code == 404
    assert models == [MODEL, "tools", "tools@1"]
    assert parent == MODEL
    assert [(one.requested_model, one.adapter, one.version) for one in reversed(page)] == [
        ("tools", "tools", None),
        ("tools@1", "tools", "tools@1"),
        ("tools", "tools", "tools@1"),
        (MODEL, None, None),
    ]
    assert 'sterna_routed_requests_total{arm="live",model="tools@1"} 1.0' in metrics
    assert 'sterna_routed_requests_total{arm="pinned",model="tools@1"} 1.0' in metrics
    assert 'sterna_adapter_swap_seconds_count{outcome="switched"} 1.0' in metrics


@async_test
async def test_an_episode_stays_with_its_version(tmp_path: Path) -> None:
    async with serving() as h:
        one, two = await add(h, tmp_path, 1), await add(h, tmp_path, 2)
        adapters, registry = h.records.adapters, h.records.versions.registry  # type: ignore[union-attr]
        assert adapters is not None
        await adapters.change(partial(registry.promote, one.ref, override=True, **WHO))
        await adapters.change(partial(registry.start_canary, two.ref, share=0.5, **WHO))
        seen: dict[str, set[str]] = {}
        for turn in range(3):
            for episode in range(16):
                unlogged = {"X-Sterna-Log": "off"} if turn == 2 else {}
                response = await ask(h, "tools", **{"X-Sterna-Episode": f"run {episode}"}, **unlogged)
                seen.setdefault(f"run {episode}", set()).add(response.headers["x-sterna-adapter-version"])
                assert turn < 3
    assert all(len(versions) == 1 for versions in seen.values())
    assert {version for versions in seen.values() for version in versions} == {"tools@1", "tools@2"}


@async_test
async def test_a_created_adapter_is_answered_by_the_base_and_logged_as_its_own() -> None:
    async with serving() as h:
        body = {"name": "tools", "reason": "to learn from"}
        created, again = await h.post("/v1/adapters", body), await h.post("/v1/adapters", body)
        taken = await h.post("/v1/adapters", {"name": MODEL, "reason": "a test"})
        answer = await ask(h, "tools")
        (trace,) = h.records.queries.list(ADMIN, TraceFilter(adapter="tools")).traces
    assert (created.status_code, again.status_code, taken.status_code) == (201, 200, 400)
    assert answer.json()["system_fingerprint"] == FINGERPRINT
    assert (trace.adapter, trace.version) == ("tools", None)
