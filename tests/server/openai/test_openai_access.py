"""Who may do what: without keys, with keys, and after the last one is revoked."""

from typing import Any

import pytest

from server.openai.access import is_loopback
from tests.server.openai.harness import MODEL, Harness, async_test, serving

BODY = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 9}
CHAT = "/v1/chat/completions"


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


async def ask(h: Harness, secret: str | None = None, **headers: str) -> Any:
    return await h.http.post(CHAT, json=BODY, headers={**headers, **(bearer(secret) if secret else {})})


@async_test
async def test_without_keys_everybody_may_ask_and_a_made_up_key_is_ignored() -> None:
    async with serving(is_loopback=False) as h:
        assert (await ask(h)).status_code == 200
        assert (await ask(h, "sk-anything")).status_code == 200
        assert (await h.http.get("/v1/models")).status_code == 200


@async_test
async def test_with_keys_every_route_needs_one() -> None:
    async with serving() as h:
        key, secret = h.records.keys.create("agent")
        refused = await ask(h)
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == "Bearer"
        assert refused.json()["error"]["code"] == "invalid_api_key"
        assert (await ask(h, "sk-sterna-wrong")).status_code == 401
        for path in ("/v1/models", f"/v1/models/{MODEL}"):
            assert (await h.http.get(path)).status_code == 401
            assert (await h.http.get(path, headers=bearer(secret))).status_code == 200
        for path in ("/tokenize", "/detokenize"):
            assert (await h.post(path, {})).status_code == 401
        assert (await ask(h, secret)).status_code == 200
        assert h.engine.submitted[-1].cache_salt == key.id.encode()
        for path in ("/health", "/metrics"):
            assert (await h.http.get(path)).status_code == 200
        h.records.keys.revoke(key.id)
        assert (await ask(h, secret)).status_code == 401
        assert (await ask(h)).status_code == 401


@async_test
async def test_scopes_and_trace_policy() -> None:
    async with serving() as h:
        _, trainer = h.records.keys.create("trainer", ["train"])
        _, agent = h.records.keys.create("agent", ["inference"], trace_policy="off")
        _, admin = h.records.keys.create("boss", ["admin"])
        _, sidecar = h.records.keys.create("sidecar", ["inference", "train"])
        refused = await ask(h, trainer)
        assert refused.status_code == 403
        assert "inference" in refused.json()["error"]["message"]
        assert "x-sterna-trace-id" not in (await ask(h, agent)).headers
        assert "x-sterna-trace-id" in (await ask(h, admin)).headers
        evaluation = {"X-Sterna-Purpose": "evaluation"}
        assert (await ask(h, agent, **evaluation)).status_code == 403
        assert (await ask(h, admin, **evaluation)).status_code == 200
        assert (await ask(h, sidecar, **evaluation)).status_code == 200


@pytest.mark.parametrize(
    ("host", "answer"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("10.0.0.1", False), ("example.org", False)],
)  # fmt: skip
def test_loopback(host: str, answer: bool) -> None:
    assert is_loopback(host) is answer
