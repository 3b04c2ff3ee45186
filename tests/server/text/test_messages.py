"""Messages as templates want them."""

from typing import Any

import pytest

from server.errors import InvalidRequestError
from server.text.messages import normalize_messages
from server.tools.hermes import fold_tools


def _one(**message: Any) -> dict[str, Any]:
    return normalize_messages([message])[0]


def test_developer_becomes_system() -> None:
    assert _one(role="developer", content="x") == {"role": "system", "content": "x"}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, ""),
        ("", ""),
        ("a", "a"),
        ([], ""),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab"),
        ([{"type": "refusal", "refusal": "no"}], "no"),
    ],
)
def test_content_is_flattened(content: Any, text: str) -> None:
    assert _one(role="assistant", content=content)["content"] == text


def test_images_are_refused_by_field() -> None:
    part = {"type": "image_url", "image_url": {"url": "data:"}}
    with pytest.raises(InvalidRequestError, match="'image_url' are not supported") as caught:
        normalize_messages(
            [{"role": "user", "content": "a"}, {"role": "user", "content": [{"type": "text", "text": ""}, part]}]
        )
    assert caught.value.param == "messages[1].content[1]"


@pytest.mark.parametrize("content", [5, {"type": "text"}, ["a"]])
def test_content_of_another_type_is_refused(content: Any) -> None:
    with pytest.raises(InvalidRequestError, match="content"):
        _one(role="user", content=content)


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ('{"a": [1, "é"]}', {"a": [1, "é"]}),
        ("", {}),
        (" \n", {}),
        ('{"a": ', '{"a": '),
        ("[1]", "[1]"),
        ({"a": 1}, {"a": 1}),
    ],
)
def test_arguments_become_the_object(arguments: Any, value: Any) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    message = _one(role="assistant", content=None, tool_calls=[call])
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": value}
    assert call["function"]["arguments"] == arguments  # the caller's message stays as it is


def test_null_fields_are_dropped_and_the_rest_is_kept() -> None:
    message = {"role": "tool", "content": "x", "tool_call_id": "1", "name": None, "tool_calls": None}
    assert normalize_messages([message]) == [{"role": "tool", "content": "x", "tool_call_id": "1"}]


def test_reasoning_is_there_under_the_names_that_templates_use() -> None:
    message = _one(role="assistant", content="x", reasoning="because")
    assert message["reasoning_content"] == message["thinking"] == message["reasoning"] == "because"


def test_idempotent() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    once = normalize_messages(
        [{"role": "developer", "content": None}, {"role": "assistant", "tool_calls": [call], "reasoning_content": "r"}]
    )
    assert normalize_messages(once) == once


def test_tools_are_folded_into_the_developers_message() -> None:
    tool = {"type": "function", "function": {"name": "now"}}
    folded = fold_tools(normalize_messages([{"role": "developer", "content": "Be brief."}]), [tool])
    assert [message["role"] for message in folded] == ["system"]
    assert folded[0]["content"].startswith("Be brief.\n\n# Tools")
