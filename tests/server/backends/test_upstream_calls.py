"""Tool calls in every form that servers send them, and ids that are unique and come back as they were."""

import uuid
from typing import Any

import pytest

from server.backends.upstream_calls import ToolCalls, client_id, restore_ids, upstream_id
from server.errors import ServerUnavailableError
from server.tools.parser import new_call_id

ID = "call_8Xk2mQ9vT4bR7nL3pW6sZ1yD"


def assembled(deltas: list[Any]) -> list[tuple[str, str]]:
    """(name, arguments) of the calls that a client would put together; ids, types and order are checked."""
    calls = ToolCalls()
    told: list[Any] = []
    for delta in deltas:
        for part in calls.push([delta] if isinstance(delta, dict) else delta):
            if "id" in part:
                assert part["index"] == len(told)
                assert part["type"] == "function"
                told.append([part["id"], part["function"]["name"], ""])
            told[part["index"]][2] += part["function"].get("arguments", "")
    calls.finish()
    assert len({call_id for call_id, _, _ in told}) == len(told)
    return [(name, arguments) for _, name, arguments in told]


def call(
    index: int | None = 0, id: str | None = None, name: str | None = None, arguments: Any = None
) -> dict[str, Any]:
    function = {key: value for key, value in (("name", name), ("arguments", arguments)) if value is not None}
    fields = {"index": index, "id": id, "type": "function" if id else None, "function": function}
    return {key: value for key, value in fields.items() if value is not None}


ONE = [("f", '{"a":1}')]
TWO = [("f", '{"a":1}'), ("g", "{}")]


@pytest.mark.parametrize(
    ("deltas", "expected"),
    [
        pytest.param([call(0, ID, "f", ""), call(0, arguments='{"a"'), call(0, arguments=":1}")], ONE, id="openai"),
        pytest.param([call(0, ID, "f", '{"a":1}')], ONE, id="one piece"),
        pytest.param([call(0, ID, "f"), call(0, ID, arguments='{"a":1}')], ONE, id="id repeated"),
        pytest.param([call(0, ID, "f", '{"a"'), call(0, ID, "f", ":1}")], ONE, id="id and name repeated"),
        pytest.param([call(0, ID, "f", '{"a"'), call(0, "new", arguments=":1}")], ONE, id="another id in each piece"),
        pytest.param([call(0, ID, "f", '{"a"'), call(0, name="f", arguments=":1}")], ONE, id="name repeated"),
        pytest.param([call(0, ID), call(0, name="f", arguments='{"a":1}')], ONE, id="name late"),
        pytest.param([call(0, ID, arguments='{"a"'), call(0, name="f", arguments=":1}")], ONE, id="name last"),
        pytest.param([call(0, "", "f", '{"a":1}'), call(0, "", "", "")], ONE, id="empty fields"),
        pytest.param([call(0, ID, "f", '{"a":1}'), {"index": 0, "function": None}], ONE, id="nulls"),
        pytest.param([call(None, ID, "f", '{"a"'), call(None, arguments=":1}")], ONE, id="no index"),
        pytest.param([call(0, None, "f", {"a": 1})], [("f", '{"a": 1}')], id="arguments are an object"),
        pytest.param([call(0, ID, "f")], [("f", "")], id="no arguments"),
        pytest.param([[call(0, "a", "f", '{"a":1}'), call(1, "b", "g", "{}")]], TWO, id="two in one"),
        pytest.param(
            [call(0, "a", "f"), call(1, "b", "g", "{"), call(0, arguments='{"a":1}'), call(1, arguments="}")],
            TWO,
            id="interleaved",
        ),
        pytest.param([call(0, "a", "f", '{"a":1}'), call(0, "b", "g", "{}")], TWO, id="every index 0"),
        pytest.param([call(0, None, "f", '{"a":1}'), call(0, None, "g", "{}")], TWO, id="every index 0, no ids"),
        pytest.param([call(0, "same", "f", '{"a":1}'), call(1, "same", "g", "{}")], TWO, id="every id the same"),
        pytest.param([call(None, "a", "f", '{"a":1}'), call(None, "b", "g", "{}")], TWO, id="no index, two"),
        pytest.param([call(None, None, "f", '{"a":1}'), call(None, None, "g", "{}")], TWO, id="nothing but functions"),
        pytest.param([call(3, "a", "f", '{"a":1}'), call(7, "b", "g", "{}")], TWO, id="indices from elsewhere"),
    ],
)
def test_every_form_makes_the_same_calls(deltas: list[Any], expected: list[tuple[str, str]]) -> None:
    assert assembled(deltas) == expected


@pytest.mark.parametrize("deltas", ["x", [1], {"index": 0}])
def test_what_is_no_list_of_calls_is_refused(deltas: Any) -> None:
    with pytest.raises(ServerUnavailableError, match="no list of objects"):
        ToolCalls().push(deltas)


def test_a_call_without_a_name_is_refused() -> None:
    calls = ToolCalls()
    assert calls.push([call(0, ID, arguments="{}")]) == []
    with pytest.raises(ServerUnavailableError, match="without the name"):
        calls.finish()


@pytest.mark.parametrize(
    "given",
    [
        ID,
        "chatcmpl-tool-3f2a1b0c9d8e7f6a5b4c3d2e1f0a9b8c",
        "toolu_01A09q90qw90lq917835lq9",
        "550e8400-e29b-41d4-a716-446655440000",
    ],
)
def test_random_ids_are_kept(given: str) -> None:
    assert client_id(given) == given
    assert upstream_id(given) == given


def test_our_own_and_uuids_are_nearly_always_kept() -> None:
    ours = [new_call_id() for _ in range(200)]
    others = [str(uuid.uuid4()) for _ in range(200)]
    assert sum(client_id(one) == one for one in ours) > 160
    assert sum(client_id(one) == one for one in others) > 160


@pytest.mark.parametrize(
    "given",
    [
        "call_0",
        "0",
        "call_get_current_weather_17",
        "functions.getCurrentWeatherInCity:12",
        "call_1700000000_3",
        "D681PevKs",
        "call_" + "A" * 24 + ".call_0",
        "call_" + "aB3" * 8 + ".call_0",
        "with\nline",
    ],
)
def test_counted_ids_become_unique_and_come_back(given: str) -> None:
    first, second = client_id(given), client_id(given)
    assert first != second
    assert first.startswith("call_")
    assert upstream_id(first) == upstream_id(second) == given


def test_a_missing_id_is_made_up() -> None:
    first = client_id(None)
    assert first != client_id("")
    assert upstream_id(first) == first


def test_a_history_goes_back_with_the_upstreams_ids() -> None:
    told = client_id("call_0")
    function = {"name": "f", "arguments": "{}"}
    history: list[dict[str, Any]] = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "tool_calls": [{"id": told, "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": told, "content": "1"},
        {"role": "tool", "tool_call_id": ID, "content": "2"},
    ]
    restored = restore_ids(history)
    assert [message.get("tool_call_id") for message in restored] == [None, None, "call_0", ID]
    assert restored[1]["tool_calls"] == [{"id": "call_0", "type": "function", "function": function}]
    assert history[2]["tool_call_id"] == told
