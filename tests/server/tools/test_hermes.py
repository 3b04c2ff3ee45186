"""Folding tools into plain messages, and that the parser reads back what the history shows."""

import json

from hypothesis import given
from hypothesis import strategies as st

from server.tools.formats import HERMES
from server.tools.hermes import fold_tools
from server.tools.parser import ToolCallArguments, ToolCallParser, ToolCallStart

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Météo <now>",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        "strict": True,
    },
}


def call(name: str, arguments: object) -> dict[str, object]:
    return {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}


def test_signatures_extend_the_system_message() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    system, user = fold_tools(messages, [TOOL, TOOL])
    assert user == {"role": "user", "content": "Hi"}
    text = system["content"]
    assert text.startswith("Be brief.\n\n# Tools\n")
    assert '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>' in text
    lines = text.split("<tools>\n")[1].split("\n</tools>")[0].split("\n")
    assert len(lines) == 2
    signature = json.loads(lines[0])
    assert signature["function"]["parameters"] == TOOL["function"]["parameters"]
    assert "strict" not in signature["function"]
    assert "Météo <now>" in lines[0]
    assert messages[0]["content"] == "Be brief."


def test_without_a_system_message_one_is_added() -> None:
    system, _ = fold_tools([{"role": "user", "content": "Hi"}], [TOOL])
    assert system["role"] == "system"
    assert system["content"].startswith("# Tools")
    assert fold_tools([{"role": "system", "content": ""}], [TOOL])[0]["content"].startswith("# Tools")


def test_history_is_folded_with_and_without_tools() -> None:
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "Let me see.", "tool_calls": [call("f", {"a": "é"}), call("g", {})]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
        {"role": "tool", "tool_call_id": "call_2", "content": ""},
        {"role": "user", "content": "And?"},
        {"role": "tool", "tool_call_id": "call_3", "content": "late"},
        {"role": "assistant", "content": "", "tool_calls": None},
    ]
    expected = [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": 'Let me see.\n<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call>\n'
            '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>',
        },
        {
            "role": "user",
            "content": "<tool_response>\nrain\n</tool_response>\n<tool_response>\n\n</tool_response>",
        },
        {"role": "user", "content": "And?"},
        {"role": "user", "content": "<tool_response>\nlate\n</tool_response>"},
        {"role": "assistant", "content": ""},
    ]
    assert fold_tools(messages, None) == expected
    assert fold_tools(messages, [TOOL])[1:] == expected


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=9) | st.lists(st.booleans()), max_size=3))
def test_the_parser_reads_back_what_the_history_shows(arguments: dict[str, object]) -> None:
    (folded,) = fold_tools([{"role": "assistant", "content": "", "tool_calls": [call("f", arguments)] * 2}], None)
    parser = ToolCallParser(HERMES, ["f"])
    events = parser.push(folded["content"]) + parser.finish()
    assert [event.name for event in events if isinstance(event, ToolCallStart)] == ["f", "f"]
    texts = [event.text for event in events if isinstance(event, ToolCallArguments)]
    assert [json.loads(text) for text in texts] == [arguments, arguments]
    assert len(events) == 4
