"""Metrics of a whole application: what clients write is no label, and evaluation leaves live numbers alone."""

from typing import Any

import pytest

from server.openai.boundary import endpoint_of
from tests.server.exposition import Samples, label_values, parse
from tests.server.openai.harness import Harness, async_test, serving

TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "required": ["city"], "properties": {"city": {}}}},
}
GOOD = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'


async def ask(h: Harness, headers: dict[str, str] | None = None, **fields: Any) -> int:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 200} | fields
    return (await h.http.post("/v1/chat/completions", json=body, headers=headers)).status_code


async def scraped(h: Harness) -> Samples:
    return parse((await h.http.get("/metrics")).text)


def counted(found: Samples, name: str, **labels: str) -> float:
    return found[f"sterna_{name}", frozenset(labels.items())]


@async_test
async def test_names_that_clients_make_up_are_no_labels() -> None:
    async with serving() as h:
        await ask(h)
        before = set(await scraped(h))
        for number in range(400):
            assert await ask(h, model=f"tools@{number + 1}") == 404
            assert (await h.http.get(f"/v1/models/made-up-{number}")).status_code == 404
            assert (await h.http.get(f"/made/up/{number}")).status_code == 404
        found = await scraped(h)
    assert label_values(found, "model") == {"tiny"}
    new = {dict(labels)["endpoint"] + dict(labels)["status"] for _, labels in set(found) - before}
    assert new == {"chat404", "models404", "other404", "metrics200"}


@async_test
async def test_calls_of_answers_are_counted_by_form() -> None:
    async with serving(GOOD) as h:
        assert await ask(h, tools=[TOOL]) == 200
        assert await ask(h, tools=[TOOL], tool_choice="none") == 200
        assert await ask(h) == 200
        found = await scraped(h)
    assert counted(found, "answers_with_tools_offered_total", model="tiny") == 1
    assert counted(found, "answers_with_tool_calls_total", model="tiny") == 1
    assert counted(found, "tool_calls_total", model="tiny", form="well_formed") == 1
    assert counted(found, "tool_calls_total", model="tiny", form="malformed") == 0
    assert counted(found, "routed_requests_total", model="tiny", arm="base") == 3
    assert counted(found, "request_success_total", model="tiny", endpoint="chat", finished_reason="tool_calls") == 1


@async_test
async def test_a_call_that_stayed_in_the_text_is_malformed() -> None:
    async with serving('<tool_call>{"name": "no_such_tool", "arguments": {}}</tool_call>') as h:
        await ask(h, tools=[TOOL])
        found = await scraped(h)
    assert counted(found, "tool_calls_total", model="tiny", form="malformed") == 1


@async_test
async def test_evaluation_is_in_no_live_metric() -> None:
    async with serving(GOOD) as h:
        await ask(h)
        before = await scraped(h)
        assert await ask(h, {"X-Sterna-Purpose": "evaluation"}, tools=[TOOL]) == 200
        after = await scraped(h)
    changed = {name for (name, labels), value in after.items() if value != before.get((name, labels))}
    live = {name for name, labels in after if "model" in dict(labels)} - {
        "sterna_evaluation_requests_total",
        "sterna_evaluation_requests_created",
    }
    assert counted(after, "evaluation_requests_total", model="tiny", endpoint="chat", finished_reason="tool_calls") == 1
    assert changed.isdisjoint(live)


@async_test
async def test_a_tool_result_counts_for_the_version_that_called() -> None:
    async with serving(GOOD) as h:
        answer = await h.post(
            "/v1/chat/completions",
            {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "tools": [TOOL], "max_tokens": 200},
        )
        said = answer.json()["choices"][0]["message"]
        result = {"role": "tool", "tool_call_id": said["tool_calls"][0]["id"], "content": '{"error": "no such city"}'}
        await ask(h, messages=[{"role": "user", "content": "hi"}, said, result], tools=[TOOL])
        found = await scraped(h)
    assert counted(found, "tool_results_total", model="tiny", outcome="error") == 1
    assert counted(found, "tool_results_total", model="tiny", outcome="ok") == 0


@pytest.mark.parametrize(
    ("path", "endpoint"),
    [
        ("/v1/chat/completions", "chat"),
        ("/v1/models", "models"),
        ("/v1/models/a/b", "models"),
        ("/v1/traces/trace-1/feedback", "traces"),
        ("/v1/adapters", "adapters"),
        ("/v1/", "other"),
        ("/v1", "other"),
        ("/tracesx", "other"),
        ("/x/v1/traces", "other"),
        ("/metrics", "metrics"),
    ],
)
def test_endpoints_by_path(path: str, endpoint: str) -> None:
    assert endpoint_of(path) == endpoint
