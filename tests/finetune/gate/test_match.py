"""Exactly right or not, case by case, and labels in the forms they come in."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.gate.expected import (
    NO_CALL,
    Accepted,
    BadLabelError,
    ExpectedCall,
    expected_from_bfcl,
    expected_from_message,
    parse_arguments,
)
from finetune.gate.match import calls_match, names_match
from finetune.gate.results import Label, judge, label_of

AREA = {
    "type": "function",
    "function": {
        "name": "area",
        "parameters": {
            "type": "object",
            "properties": {
                "base": {"type": "number"},
                "unit": {"type": "string", "default": "cm"},
                "code": {"type": "string"},
                "style": {"type": "object", "properties": {"bold": {"type": "boolean", "default": False}}},
            },
            "required": ["base"],
        },
    },
}
PING = {"type": "function", "function": {"name": "ping", "parameters": {"type": "object", "required": []}}}
TOOLS = [AREA, PING]


def call(name: str, arguments: Any) -> dict[str, Any]:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return {"id": "call_1", "type": "function", "function": {"name": name, "arguments": text}}


def message(*calls: dict[str, Any], content: str | None = None) -> dict[str, Any]:
    return {"role": "assistant", "content": content} | ({"tool_calls": list(calls)} if calls else {})


def is_right(arguments: Any, accepted: dict[str, list[Any]]) -> bool:
    return calls_match([call("area", arguments)], expected_from_bfcl([{"area": accepted}]), TOOLS)


@pytest.mark.parametrize(
    ("arguments", "accepted", "right"),
    [
        ({"base": 1}, {"base": [1]}, True),
        ({"base": 1.0}, {"base": [1]}, True),
        ({"base": 1}, {"base": [2, 1.0]}, True),
        ({"base": 3}, {"base": [1, 2]}, False),
        ({"base": "1"}, {"base": [1]}, False),
        ({"base": True}, {"base": [1]}, False),
        ({"base": 1, "code": True}, {"base": [1], "code": [1]}, False),
        ({"base": 1, "code": "7"}, {"base": [1], "code": [7]}, True),  # the schema says that it is a string
        ({"base": 1, "code": 7}, {"base": [1], "code": ["7"]}, False),
        ({"base": 1, "code": "a"}, {"base": [1], "code": ["A"]}, False),
        ({"base": 1, "code": None}, {"base": [1], "code": [None]}, True),
        ({"base": 1}, {"base": [1], "code": ["x", ""]}, True),  # may be left out
        ({"base": 1, "code": ""}, {"base": [1], "code": ["x", ""]}, True),
        ({"base": 1, "code": ""}, {"base": [1], "code": [7, ""]}, False),
        ({"base": 1, "code": "y"}, {"base": [1], "code": ["x", ""]}, False),
        ({"base": 1}, {"base": [1], "code": ["x"]}, False),
        ({"base": 1}, {"base": [1], "unit": ["cm"]}, True),  # the default
        ({"base": 1}, {"base": [1], "unit": ["m"]}, False),
        ({"base": 1, "unit": "cm"}, {"base": [1]}, True),
        ({"base": 1, "unit": "m"}, {"base": [1]}, False),
        ({"base": 1, "other": 2}, {"base": [1]}, False),
        ({"base": 1, "l": [1, 2]}, {"base": [1], "l": [[1, 2.0]]}, True),
        ({"base": 1, "l": [2, 1]}, {"base": [1], "l": [[1, 2]]}, False),
        ({"base": 1, "l": [1]}, {"base": [1], "l": [[1, 2]]}, False),
        ({"base": 1, "o": {"a": 1, "b": "x"}}, {"base": [1], "o": [{"b": ["x", "y"], "a": [1]}]}, True),
        ({"base": 1, "o": {"a": 1}}, {"base": [1], "o": [{"b": ["x", ""], "a": [1]}]}, True),
        ({"base": 1, "o": {"a": 1}}, {"base": [1], "o": [{"b": ["x"], "a": [1]}]}, False),
        ({"base": 1, "o": [{"a": 1}]}, {"base": [1], "o": [[{"a": [2, 1]}]]}, True),
        ({"base": 1, "style": {}}, {"base": [1], "style": [{"bold": [False]}]}, True),
        ({"base": 1, "style": {"bold": 0}}, {"base": [1], "style": [{"bold": [False]}]}, False),
        ("[1]", {"base": [1]}, False),
        ('{"base": NaN}', {"base": [1]}, False),
        ('{"base": 1', {"base": [1]}, False),
    ],
)
def test_arguments(arguments: Any, accepted: dict[str, list[Any]], right: bool) -> None:
    assert is_right(arguments, accepted) is right


def test_a_required_parameter_is_not_left_out_for_its_default() -> None:
    tools = [{"function": {"name": "f", "parameters": {"properties": {"a": {"default": 1}}, "required": ["a"]}}}]
    assert not calls_match([call("f", {})], expected_from_bfcl([{"f": {"a": [1]}}]), tools)


def test_several_calls_match_in_any_order_each_with_one_of_its_own() -> None:
    expected = expected_from_bfcl([{"area": {"base": [1, 2]}}, {"area": {"base": [1]}}, {"ping": {}}])
    calls = [call("ping", {}), call("area", {"base": 1}), call("area", {"base": 2})]
    assert calls_match(calls, expected, TOOLS)
    assert not calls_match([*calls[:2], call("area", {"base": 3})], expected, TOOLS)
    assert not calls_match([calls[0], calls[2], calls[2]], expected, TOOLS)
    assert not calls_match(calls[:2], expected, TOOLS)
    assert not calls_match([*calls, calls[0]], expected, TOOLS)
    assert names_match(calls, expected)
    assert not names_match(calls[:2], expected)


def test_schemas_that_nobody_checked_say_nothing() -> None:
    for parameters in (None, [], {"properties": [], "required": "base"}, {"properties": {"base": True}}):
        tools = [{"function": {"name": "area", "parameters": parameters}}]
        assert calls_match([call("area", {"base": 1})], expected_from_bfcl([{"area": {"base": [1]}}]), tools)


def test_labels_from_messages_are_exact() -> None:
    right = message(call("area", {"base": 1, "style": {"bold": True}, "l": [{"a": 1}]}))
    expected = expected_from_message(right)
    assert calls_match(right["tool_calls"], expected, TOOLS)
    assert not calls_match([call("area", {"base": 1, "style": {}, "l": [{"a": 1}]})], expected, TOOLS)
    assert expected_from_message(message(content="No.")) == NO_CALL
    with pytest.raises(BadLabelError, match="'area' are no JSON object"):
        expected_from_message(message(call("area", "{")))


def test_labels_in_the_leaderboards_form() -> None:
    expected = expected_from_bfcl([{"area": {"base": [10], "unit": ["cm", ""], "o": [{"min": [3, ""]}]}}])
    assert expected == (
        ExpectedCall(
            "area",
            {
                "base": Accepted((10,)),
                "unit": Accepted(("cm", ""), may_be_absent=True),
                "o": Accepted(({"min": Accepted((3,), may_be_absent=True)},)),
            },
        ),
    )
    with pytest.raises(BadLabelError, match="'base' needs a list of accepted values, got 3"):
        expected_from_bfcl([{"area": {"base": 3}}])  # type: ignore[dict-item]
    with pytest.raises(BadLabelError, match="names one tool"):
        expected_from_bfcl([{}])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), json_values, max_size=4), json_values)
def test_every_answer_matches_itself_and_no_other(arguments: dict[str, Any], other: Any) -> None:
    right = message(call("free", arguments))
    expected = expected_from_message(right)
    assert calls_match([call("free", dict(reversed(arguments.items())))], expected, [])
    changed = {**arguments, "new": other}
    assert calls_match([call("free", changed)], expected, []) is (changed == arguments)
    assert parse_arguments(json.dumps(arguments)) == arguments


def test_an_answer_is_judged_by_what_was_expected() -> None:
    expected = expected_from_bfcl([{"area": {"base": [1]}}])
    right = judge(message(call("area", {"base": 1})), expected, TOOLS, token_loss=0.5)
    assert (right.has_call, right.is_right, right.is_well_formed, right.is_right_tool) == (True, True, True, True)
    assert right.token_loss == 0.5
    wrong = judge(message(call("area", {"base": 2})), expected, TOOLS)
    assert (wrong.is_right, wrong.is_well_formed, wrong.is_right_tool) == (False, True, True)
    malformed = judge(message(call("area", {})), expected, TOOLS)
    assert (malformed.is_right, malformed.is_well_formed, malformed.is_right_tool) == (False, False, True)
    beside = judge(message(call("area", {"base": 1}), content="<tool_call>{"), expected, TOOLS)
    assert (beside.is_right, beside.is_well_formed) == (False, False)
    silent = judge(message(content="1"), expected, TOOLS)
    assert (silent.has_call, silent.is_right, silent.is_well_formed, silent.is_right_tool) == (False,) * 4


def test_where_no_call_was_expected_an_attempt_is_wrong_too() -> None:
    assert judge(message(content="Hello"), NO_CALL, TOOLS).is_right
    assert not judge(message(call("ping", {})), NO_CALL, TOOLS).is_right
    attempt = judge(message(content='<tool_call>{"name": "ping"'), NO_CALL, TOOLS)
    assert (attempt.has_call, attempt.is_right, attempt.is_well_formed) == (True, False, False)


def test_corrections_are_gold_of_audited_traces_only() -> None:
    assert label_of("known_answer", is_audit=False) is Label.KNOWN_ANSWER
    assert label_of("audit_sample", is_audit=True) is Label.AUDIT
    assert label_of("audit_sample", is_audit=False) is Label.CORRECTION
    assert label_of("user_correction", is_audit=True, is_audited=True) is Label.AUDITED_CORRECTION
    assert label_of("user_correction", is_audit=True) is Label.CORRECTION, "nobody looked at those found right"
    assert label_of("user_correction", is_audit=False) is Label.CORRECTION
    assert label_of("thumbs", is_audit=True) is Label.THUMBS
    with pytest.raises(ValueError, match="no source 'guess'"):
        label_of("guess", is_audit=True)
