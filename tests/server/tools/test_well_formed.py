"""What counts as a well-formed tool call, call by call."""

from typing import Any

import pytest

from server.tools.formats import HERMES, TOOL_FORMATS
from server.tools.parser import ContentDelta, ToolCallParser
from server.tools.well_formed import CallForm, judge_calls

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"type": "string"}},
            "required": ["city"],
        },
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
PING = {"type": "function", "function": {"name": "ping", "parameters": None}}
TOOLS = [WEATHER, NOW, PING]


def message(*calls: tuple[str, str], content: str | None = None) -> dict[str, Any]:
    tool_calls = [
        {"id": f"call_{index}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for index, (name, arguments) in enumerate(calls)
    ]
    return {"role": "assistant", "content": content} | ({"tool_calls": tool_calls} if tool_calls else {})


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("weather", '{"city": "Bern"}'),
        ("weather", '{"city": 7, "more": null}'),  # types and surplus keys are not looked at
        ("now", "{}"),
        ("ping", '{"anything": [1, {"a": 2}]}'),
    ],
)
def test_a_well_formed_call(name: str, arguments: str) -> None:
    assert judge_calls(message((name, arguments)), TOOLS) == CallForm(1, 0)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("weather", '{"unit": "C"}'),  # a required key is missing
        ("weather", '{"city": "Be'),  # cut off
        ("weather", ""),
        ("weather", '"Bern"'),
        ("weather", '["city"]'),
        ("weather", "null"),
        ("weather", '{"city": NaN}'),
        ("weather", '{"city": Infinity}'),
        ("weather", '{"city": ' + "9" * 5000 + "}"),  # more digits than Python reads
        ("now", "[" * 100_000),
        ("tomorrow", "{}"),  # not offered
    ],
)
def test_a_malformed_call(name: str, arguments: str) -> None:
    assert judge_calls(message((name, arguments)), TOOLS) == CallForm(1, 1)


@pytest.mark.parametrize("required", [None, 5, "city", {"city": 1}, [5, ["city"], None]])
def test_an_odd_schema_requires_nothing(required: Any) -> None:
    tool = {"type": "function", "function": {"name": "odd", "parameters": {"required": required}}}
    assert judge_calls(message(("odd", "{}")), [tool]) == CallForm(1, 0)


def test_an_answer_without_calls() -> None:
    assert judge_calls(message(content="It rains. {not a call}"), TOOLS) == CallForm(0, 0)
    assert judge_calls(message(content='{"name": "Bern", "rain": true}'), TOOLS) == CallForm(0, 0)
    assert judge_calls(message(), TOOLS) == CallForm(0, 0)


def test_several_calls_are_judged_one_by_one() -> None:
    answer = message(("weather", '{"city": "Bern"}'), ("weather", "{}"), ("now", "{}"))
    assert judge_calls(answer, TOOLS) == CallForm(3, 1)


@pytest.mark.parametrize("marker", [form.marker for form in TOOL_FORMATS.values()])
def test_a_marker_left_in_the_text_is_a_malformed_call(marker: str) -> None:
    assert judge_calls(message(content=f'Well: {marker}{{"name": "weather", '), TOOLS) == CallForm(1, 1)


@pytest.mark.parametrize("key", ["arguments", "parameters"])
def test_a_bare_call_object_left_in_the_text_is_a_malformed_call(key: str) -> None:
    content = f' {{"name": "tomorrow", "{key}": {{}}}}'
    assert judge_calls(message(content=content), TOOLS) == CallForm(1, 1)
    assert judge_calls(message(content="For example " + content), TOOLS) == CallForm(0, 0)


def test_calls_and_attempts_add_up() -> None:
    answer = message(("now", "{}"), content="<tool_call>oops <tool_call>again")
    assert judge_calls(answer, TOOLS) == CallForm(3, 2)


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name": "tomorrow", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "weather", "argum',
        "<tool_call>",
    ],
)
def test_what_the_parser_leaves_as_content_is_seen(text: str) -> None:
    parser = ToolCallParser(HERMES, ["weather", "now"])
    events = parser.push(text) + parser.finish()
    content = "".join(event.text for event in events if isinstance(event, ContentDelta))
    assert parser.num_calls == 0
    assert judge_calls(message(content=content), TOOLS) == CallForm(1, 1)
