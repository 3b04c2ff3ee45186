"""ToolCallParser: what it reads, what it leaves alone, and that chunk boundaries never matter."""

import itertools
import json
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from server.tools.formats import HERMES, LLAMA3_JSON, MISTRAL, ToolFormat, detect_tool_format
from server.tools.parser import (
    ContentDelta,
    Event,
    ToolCallArguments,
    ToolCallParser,
    ToolCallStart,
    new_call_id,
)

NAMES = ("f", "get_weather")


def parse(form: ToolFormat, pieces: list[str], *, parallel: bool = True) -> list[Event]:
    """All events, neighbours of one kind merged, ids numbered."""
    ids = itertools.count()
    parser = ToolCallParser(form, NAMES, parallel_tool_calls=parallel, make_id=lambda: f"call_{next(ids)}")
    events = [event for piece in pieces for event in parser.push(piece)] + parser.finish()
    assert parser.num_calls == sum(isinstance(event, ToolCallStart) for event in events)
    merged: list[Event] = []
    for event in events:
        last = merged[-1] if merged else None
        if isinstance(event, ContentDelta) and isinstance(last, ContentDelta):
            merged[-1] = ContentDelta(last.text + event.text)
        elif isinstance(event, ToolCallArguments) and isinstance(last, ToolCallArguments):
            assert event.index == last.index
            merged[-1] = ToolCallArguments(event.index, last.text + event.text)
        else:
            merged.append(event)
    return merged


def read(form: ToolFormat, text: str, *, parallel: bool = True) -> tuple[str, list[tuple[str, str]]]:
    """(content, [(name, arguments)]) of an answer parsed in one piece and, equally, a character at a time."""
    events = parse(form, [text], parallel=parallel)
    assert parse(form, list(text), parallel=parallel) == events
    content = "".join(event.text for event in events if isinstance(event, ContentDelta))
    calls: list[tuple[str, str]] = []
    for event in events:
        if isinstance(event, ToolCallStart):
            assert event.index == len(calls)
            assert event.id == f"call_{event.index}"
            calls.append((event.name, ""))
        elif isinstance(event, ToolCallArguments):
            calls[event.index] = (calls[event.index][0], calls[event.index][1] + event.text)
    return content, calls


CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (CALL, "", [("f", '{"a": 1}')]),
        (f"Sure.\n{CALL}\n", "Sure.", [("f", '{"a": 1}')]),
        (f"{CALL}\n{CALL}", "", [("f", '{"a": 1}')] * 2),
        (f"A {CALL}\nB", "A\nB", [("f", '{"a": 1}')]),
        (
            '<tool_call>{"name":"f","arguments":{ "x" : [1, {"y":"}"}] }}</tool_call>',
            "",
            [("f", '{ "x" : [1, {"y":"}"}] }')],
        ),
        ('<tool_call>{"arguments": {"a":"é"}, "name": "f"}</tool_call>', "", [("f", '{"a":"é"}')]),
        ('<tool_call>{"id": 7, "name": "f", "arguments": {}, "x": [1]}</tool_call>', "", [("f", "{}")]),
        ('<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [("f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", '{"a": 1}')]),
        # brace missing, brace too many, closing tag missing
        ('<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call>', "", [("f", '{"a": 1}')]),
        ('<tool_call>{"name": "f", "arguments": {"a": 1}}}</tool_call>', "", [("f", '{"a": 1}')]),
        ('<tool_call>{"name": "f", "arguments": {"a": 1}} and so', " and so", [("f", '{"a": 1}')]),
        ('<tool_call>{"name": "f", "arguments": {"a": 1', "", [("f", '{"a": 1')]),
        ('<tool_call>{"name": "f", "arguments": {"a": 1}}\n</tool_', "", [("f", '{"a": 1}')]),
        # a raw newline inside a string is repaired, whitespace between tokens is kept
        ('<tool_call>{"name": "f", "arguments": {\n"a": "1\n2"}}</tool_call>', "", [("f", '{\n"a": "1\\n2"}')]),
        # arguments that break off after the announcement: the rest is content
        ('<tool_call>{"name": "f", "arguments": {"a": oops}} x', "oops}} x", [("f", '{"a": ')]),
    ],
)
def test_hermes_reads_calls(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert read(HERMES, text) == (content, calls)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n",
        "no call < here <tool <tool_call",
        "<tool_call>",
        "<tool_call>\n",
        "x  <tool_call> {",
        '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1} 2"}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "not json"}</tool_call>',
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        '<tool_call>{"name": ' + "9" * 5000 + ', "arguments": {}}</tool_call>',
        '<tool_call>{"arguments": {}}</tool_call>',
        "<tool_call>{}</tool_call>",
        '<tool_call>{"name": "f",}</tool_call>',
        '<tool_call>{"name": "f" "arguments": {}}</tool_call>',
        '<tool_call>{"arguments": {"a": 01}, "name": "f"}</tool_call>',
        "<tool_call>not json</tool_call>\n",
        '{"name": "f", "arguments": {}}',
    ],
)
def test_hermes_leaves_everything_else_verbatim(text: str) -> None:
    assert read(HERMES, text) == (text, [])


def test_a_call_inside_a_broken_one_is_found() -> None:
    assert read(HERMES, f"<tool_call>{CALL}") == ("<tool_call>", [("f", '{"a": 1}')])
    assert read(HERMES, f'<tool_call>{{"name": "{CALL}') == ('<tool_call>{"name": "', [("f", '{"a": 1}')])


def test_deep_nesting_needs_no_stack() -> None:
    arguments = '{"a":' + "[" * 5000 + "]" * 5000 + "}"
    assert read(HERMES, f'<tool_call>{{"name":"f","arguments":{arguments}}}</tool_call>') == ("", [("f", arguments)])


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ('{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
        ('\n<|python_tag|>{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
        (
            '{"name": "f", "arguments": {}}; {"name": "get_weather", "parameters": {}}',
            "",
            [("f", "{}"), ("get_weather", "{}")],
        ),
        ('{"name": "f", "parameters": {}} done', " done", [("f", "{}")]),
        ('{"name": "f", "parameters": {}}; {"name": "no"}', '; {"name": "no"}', [("f", "{}")]),
        ('{"answer": 42}', '{"answer": 42}', []),
        ('{"answer": ', '{"answer": ', []),
        ('Text {"name": "f", "parameters": {}}', 'Text {"name": "f", "parameters": {}}', []),
        ("<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
        (" \n", " \n", []),
    ],
)
def test_llama3_json(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert read(LLAMA3_JSON, text) == (content, calls)


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ('[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}]', "", [("f", '{"a": 1}')]),
        ('[TOOL_CALLS] [ {"name": "f", "arguments": {}} , {"arguments": {}, "name": "f"} ] ', "", [("f", "{}")] * 2),
        ('Hm [TOOL_CALLS][{"name": "f", "arguments": {}}, {"x', 'Hm, {"x', [("f", "{}")]),
        ('[TOOL_CALLS]{"name": "f"}', '[TOOL_CALLS]{"name": "f"}', []),
        ("[TOOL_CALLS][]", "[TOOL_CALLS][]", []),
    ],
)
def test_mistral(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert read(MISTRAL, text) == (content, calls)


def test_without_parallel_calls_only_the_first_is_kept_and_done_is_told() -> None:
    assert read(HERMES, f"a {CALL} b {CALL} c", parallel=False) == ("a", [("f", '{"a": 1}')])
    parser = ToolCallParser(HERMES, NAMES, parallel_tool_calls=False)
    parser.push(CALL[: -len("\n</tool_call>")])
    assert parser.done
    assert parser.push("anything") == []
    assert parser.finish() == []


def test_the_name_is_told_at_once_and_arguments_as_they_arrive() -> None:
    parser = ToolCallParser(HERMES, NAMES)
    assert parser.push('Hi <tool_call>{"name": "get_weather"') == [ContentDelta("Hi")]
    start, arguments = parser.push(', "arguments": {"ci')
    assert isinstance(start, ToolCallStart)
    assert (start.name, start.index) == ("get_weather", 0)
    assert re.fullmatch(r"call_[A-Za-z0-9_-]{24}", start.id)
    assert arguments == ToolCallArguments(0, '{"ci')
    assert parser.push('ty": "') == [ToolCallArguments(0, 'ty": "')]


def test_ids_do_not_repeat() -> None:
    assert len({new_call_id() for _ in range(1000)}) == 1000


_ARGUMENTS = st.dictionaries(
    st.text(max_size=4),
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
        max_leaves=4,
    ),
    max_size=3,
)


@st.composite
def _call_json(draw: st.DrawFn) -> str:
    key = draw(st.sampled_from(["arguments", "parameters"]))
    arguments = draw(_ARGUMENTS | st.none() | _ARGUMENTS.map(json.dumps))
    members = [("name", draw(st.sampled_from([*NAMES, "other"]))), (key, arguments), ("x", draw(st.integers()))]
    chosen = draw(st.permutations(members))[: draw(st.integers(1, 3))]
    dumped = json.dumps(dict(chosen), ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 1])))
    if draw(st.booleans()):
        position = draw(st.integers(0, len(dumped)))
        dumped = (
            dumped[:position] + draw(st.sampled_from(["", "}", '"', "\\", ",", "\n", "<"])) + dumped[position + 1 :]
        )
    return dumped


_MARKUP = [
    "<tool_call>",
    "</tool_call>",
    "[TOOL_CALLS]",
    "<|python_tag|>",
    "[",
    "]",
    ",",
    ";",
    "{",
    "}",
    "<",
    " ",
    "\n",
]
_PIECES = st.lists(
    st.sampled_from(_MARKUP)
    | _call_json()
    | st.text(max_size=5)
    | _call_json().map("<tool_call>{}</tool_call>".format),
    max_size=8,
)


@st.composite
def _chunked(draw: st.DrawFn) -> list[str]:
    text = "".join(draw(_PIECES))
    cuts = draw(st.sets(st.integers(0, len(text)), max_size=12))
    edges = [0, *sorted(cuts), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


@given(_chunked(), st.sampled_from([HERMES, LLAMA3_JSON, MISTRAL]), st.booleans())
@example(["<tool_call>", '{"name": "f"', "}", "</tool_call", ">"], HERMES, True)
def test_chunk_boundaries_never_matter(chunks: list[str], form: ToolFormat, parallel: bool) -> None:
    whole = parse(form, ["".join(chunks)], parallel=parallel)
    assert parse(form, chunks, parallel=parallel) == whole
    assert parse(form, list("".join(chunks)), parallel=parallel) == whole
    if not any(isinstance(event, ToolCallStart) for event in whole):
        assert "".join(event.text for event in whole if isinstance(event, ContentDelta)) == "".join(chunks)


@given(_ARGUMENTS, st.booleans())
def test_a_well_formed_call_gives_its_arguments_exactly(arguments: dict[str, object], ascii_only: bool) -> None:
    dumped = json.dumps(arguments, ensure_ascii=ascii_only)
    content, calls = read(HERMES, f'<tool_call>\n{{"name": "f", "arguments": {dumped}}}\n</tool_call>')
    assert (content, calls) == ("", [("f", dumped)])


@pytest.mark.parametrize(
    ("template", "supports_tools", "form"),
    [
        (None, False, HERMES),
        ("{{ messages }} [TOOL_CALLS]", False, HERMES),
        ("<|im_start|> <tools> <tool_call>", True, HERMES),
        ("{{ tools }} [TOOL_CALLS]", True, MISTRAL),
        ("<|start_header_id|> {{ tools }}", True, LLAMA3_JSON),
        ("{{ tools }}", True, HERMES),
    ],
)
def test_the_format_is_read_off_the_template(template: str | None, supports_tools: bool, form: ToolFormat) -> None:
    assert detect_tool_format(template, supports_tools) is form
