"""Grammars on a tiny vocabulary: every walk through the masks is valid, parses back, and ends properly."""

import json
import threading
from typing import Any

import jsonschema_rs
import llguidance
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.errors import InvalidRequestError
from server.tools.constraint import CompiledGrammar, ConstraintFactory, GrammarError
from server.tools.formats import HERMES, LLAMA3_JSON, MISTRAL, ToolFormat
from server.tools.parser import ContentDelta, ToolCallArguments, ToolCallParser, ToolCallStart
from tests.server.tools.grammar_walk import TinyTokenizer, allowed_ids, make_factory, walk

PLAIN = TinyTokenizer()
MARKED = TinyTokenizer(specials=("<end>", "<eot>", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "</think>"))
TOKENIZERS = pytest.mark.parametrize("tokenizer", [PLAIN, MARKED], ids=["markers_as_text", "markers_as_tokens"])
FORMATS = pytest.mark.parametrize("form", [HERMES, LLAMA3_JSON, MISTRAL], ids=lambda form: form.name)

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "é"]}, "maxItems": 2},
        "home": {"$ref": "#/$defs/place"},
    },
    "required": ["name", "age", "home"],
    "additionalProperties": False,
    "$defs": {"place": {"anyOf": [{"type": "null"}, {"type": "string", "pattern": "^[A-Z]{2}-\\d{1,3}$"}]}},
}
CITY = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"]}


def tool(name: str, parameters: object, **more: object) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


TOOLS = [tool("person", PERSON), tool("get_city", {**CITY, "additionalProperties": False}), tool("now", None)]
SCHEMAS = {t["function"]["name"]: t["function"]["parameters"] for t in TOOLS}
SCHEMAS["now"] = {"type": "object", "maxProperties": 0}


def run(compiled: CompiledGrammar, tokenizer: TinyTokenizer, seed: int) -> str:
    return walk(compiled, tokenizer, seed, mask_words=-(-tokenizer.vocab_size // 32) + 1)


def parsed(text: str, form: ToolFormat, names: list[str]) -> tuple[str, list[tuple[str, Any]]]:
    parser = ToolCallParser(form, names)
    events = parser.push(text) + parser.finish()
    starts = [event.name for event in events if isinstance(event, ToolCallStart)]
    arguments = [json.loads(event.text) for event in events if isinstance(event, ToolCallArguments)]
    content = "".join(event.text for event in events if isinstance(event, ContentDelta))
    return content, list(zip(starts, arguments, strict=True))


def test_every_walk_through_a_schema_validates() -> None:
    compiled = make_factory(PLAIN).json_schema(PERSON, param="response_format")
    texts = {run(compiled, PLAIN, seed) for seed in range(60)}
    assert len(texts) > 50
    for text in texts:
        jsonschema_rs.validate(PERSON, json.loads(text))


def test_json_object_gives_objects() -> None:
    compiled = make_factory(PLAIN).json_object()
    assert all(isinstance(json.loads(run(compiled, PLAIN, seed)), dict) for seed in range(40))


@TOKENIZERS
@FORMATS
def test_required_calls_parse_back_with_valid_arguments(tokenizer: TinyTokenizer, form: ToolFormat) -> None:
    compiled = make_factory(tokenizer).forced_tools(TOOLS, form)
    seen, numbers = set(), set()
    for seed in range(40):
        content, calls = parsed(run(compiled, tokenizer, seed), form, list(SCHEMAS))
        assert content == ""
        for name, arguments in calls:
            jsonschema_rs.validate(SCHEMAS[name], arguments)
            seen.add(name)
        numbers.add(len(calls))
    assert seen == set(SCHEMAS)
    assert 0 not in numbers
    assert len(numbers) > 1


@TOKENIZERS
@FORMATS
def test_one_call_when_parallel_calls_are_off_or_a_tool_is_named(tokenizer: TinyTokenizer, form: ToolFormat) -> None:
    factory = make_factory(tokenizer)
    single = factory.forced_tools(TOOLS, form, parallel=False)
    named = factory.forced_tools(TOOLS, form, name="get_city")
    for seed in range(10):
        assert len(parsed(run(single, tokenizer, seed), form, list(SCHEMAS))[1]) == 1
        content, ((name, arguments),) = parsed(run(named, tokenizer, seed), form, list(SCHEMAS))
        assert (content, name) == ("", "get_city")
        jsonschema_rs.validate(CITY, arguments)


def test_the_hermes_layout_is_the_trained_one() -> None:
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False}
    compiled = make_factory(MARKED).forced_tools([tool("f", schema)], HERMES, parallel=False)
    grammar = compiled.new()
    text = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    inner = text.removeprefix("<tool_call>").removesuffix("</tool_call>")
    ids = [MARKED.token_to_id("<tool_call>"), *map(int, inner.encode()), MARKED.token_to_id("</tool_call>")]
    assert all(token_id is not None and grammar.advance(token_id) for token_id in ids)
    assert grammar.is_finished()


@TOKENIZERS
@FORMATS
def test_strict_tools_are_constrained_inside_free_text(tokenizer: TinyTokenizer, form: ToolFormat) -> None:
    tools = [tool("get_city", CITY | {"additionalProperties": False}, strict=True), tool("loose", CITY)]
    compiled = make_factory(tokenizer).free_tools(tools, form)
    assert compiled is not None
    call = f'{{"name": "get_city", "{form.argument_keys[0]}": {{"city": "'
    prefix = call if form.starts_bare else f"Well: {form.marker}" + ("\n" if form is HERMES else form.opening) + call
    grammar = advanced(compiled, tokenizer, prefix)
    mask = np.zeros(-(-tokenizer.vocab_size // 32) + 1, dtype=np.int32)
    grammar.fill_mask(mask)
    assert {tokenizer.token_bytes(i)[:1] for i in allowed_ids(mask)} == {b"O", b"R"}
    loose = advanced(compiled, tokenizer, prefix.replace("get_city", "loose").replace('"city": "', ""))
    loose.fill_mask(mask)
    assert len(allowed_ids(mask)) > 2
    free = advanced(compiled, tokenizer, "Just text, no call.")
    free.fill_mask(mask)
    assert tokenizer.eog_token_ids < set(allowed_ids(mask))


def advanced(compiled: CompiledGrammar, tokenizer: TinyTokenizer, text: str) -> Any:
    """A grammar after `text`, whose special tokens are parsed."""
    grammar = compiled.new()
    for special in tokenizer.specials:
        text = text.replace(special, f"\0{special}\0")
    for piece in text.split("\0"):
        special_id = tokenizer.token_to_id(piece) if piece in tokenizer.specials else None
        for token_id in [special_id] if special_id is not None else piece.encode():
            assert grammar.advance(token_id), (piece, token_id)
    return grammar


def test_tools_beside_a_response_format_give_either() -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    compiled = make_factory(PLAIN).free_tools([tool("get_city", CITY)], HERMES, content_schema=schema)
    assert compiled is not None
    kinds = set()
    for seed in range(30):
        text = run(compiled, PLAIN, seed)
        content, calls = parsed(text, HERMES, ["get_city"])
        if not calls:
            jsonschema_rs.validate(schema, json.loads(text))
        kinds.add((bool(content), bool(calls)))
    assert kinds == {(True, False), (False, True)}


def test_without_strict_tools_auto_is_unconstrained() -> None:
    assert make_factory(PLAIN).free_tools(TOOLS, HERMES) is None


@TOKENIZERS
def test_the_grammar_begins_after_open_reasoning(tokenizer: TinyTokenizer) -> None:
    schema = {"const": 1}
    compiled = make_factory(tokenizer).json_schema(schema, param="response_format", after_reasoning=True)
    grammar = advanced(compiled, tokenizer, "so it is {} one</think>\n\n1")
    assert grammar.is_finished()


def test_a_tokenizer_that_puts_a_space_before_texts_is_no_obstacle() -> None:
    class PrefixSpace(TinyTokenizer):
        def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
            return super().encode(" " + text, add_special=add_special, parse_special=parse_special)

    tokenizer = PrefixSpace()
    compiled = make_factory(tokenizer).forced_tools(TOOLS, HERMES)
    assert all(parsed(run(compiled, tokenizer, seed), HERMES, list(SCHEMAS))[1] for seed in range(10))


def test_tokens_outside_the_mask_are_refused() -> None:
    grammar = make_factory(PLAIN).json_object().new()
    assert not grammar.advance(ord("x"))
    assert not grammar.advance(min(PLAIN.eog_token_ids))


def test_a_limit_met_in_the_middle_of_an_answer_is_an_error() -> None:
    factory = make_factory(PLAIN)
    factory._limits = llguidance.LLParserLimits(max_items_in_row=100, verbose_errors=False)
    schema = {"type": "object", "properties": {f"p{i}": {"const": 1} for i in range(100)}}
    grammar = factory.json_schema({"anyOf": [{"const": 1}, schema]}, param="response_format").new()
    mask = np.zeros(-(-PLAIN.vocab_size // 32) + 1, dtype=np.int32)
    grammar.fill_mask(mask)
    assert ord("{") in allowed_ids(mask)
    grammar.advance(ord("{"))
    with pytest.raises(GrammarError, match="max is 100"):
        grammar.fill_mask(mask)
    assert not grammar.advance(min(PLAIN.eog_token_ids))


def test_every_sequence_has_its_own_state_and_equal_requests_share_the_compilation() -> None:
    factory = make_factory(PLAIN)
    compiled = factory.json_object()
    assert factory.json_object() is compiled
    first, second = compiled.new(), compiled.new()
    assert first.advance(ord("{"))
    assert second.advance(ord("{"))
    assert not second.advance(ord("{"))
    assert first.advance(ord("}"))
    assert first.is_finished()
    for number in range(40):
        factory.json_schema({"const": number}, param="response_format")
    assert factory.json_object() is not compiled


def test_threads_may_share_a_factory() -> None:
    factory = make_factory(PLAIN)
    texts: list[str] = []
    threads = [
        threading.Thread(target=lambda n=n: texts.append(run(factory.json_schema(CITY, param="x"), PLAIN, n)))
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 8
    assert all(json.loads(text)["city"] in ("Oslo", "Rome") for text in texts)


def test_end_tokens_cannot_be_spelled_inside_strings() -> None:
    """Even when the model file does not call them special."""
    tokenizer = TinyTokenizer(specials=("</s>",), eog=("</s>",))
    tokenizer.is_special = lambda token_id: False  # type: ignore[method-assign]
    grammar = make_factory(tokenizer).json_schema({"type": "string"}, param="response_format").new()
    assert grammar.advance(ord('"'))
    mask = np.zeros(-(-tokenizer.vocab_size // 32) + 1, dtype=np.int32)
    grammar.fill_mask(mask)
    assert ord("x") in allowed_ids(mask)
    assert not tokenizer.eog_token_ids & set(allowed_ids(mask))


def refused(schema: object, factory: ConstraintFactory | None = None) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        (factory or make_factory(PLAIN)).json_schema(schema, param="response_format")
    assert caught.value.param == "response_format"
    return str(caught.value)


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"not": {"type": "string"}}, "'not'"),
        ({"type": "array", "uniqueItems": True}, "'uniqueItems'"),
        ({"type": "object", "properties": {"a": {"if": True, "then": True}}}, "'if', 'then'"),
        ({"type": "string", "format": "postcode"}, "'format': 'postcode'"),
        ({"type": "string", "pattern": "(?=a)b"}, "'pattern': look-around"),
        ({"type": "string", "pattern": "(a"}, "'pattern': unclosed group"),
        ({"type": "string", "pattern": "((a{99}){99}){99}"}, "repeats more than 10000 times"),
        ({"type": "object", "patternProperties": {"(a{999}){999}": {}}}, "repeats more than 10000 times"),
        ({"oneOf": [{"type": "object"}, {"type": "object", "properties": {"a": {}}}]}, "'oneOf'"),
        ({"type": "strin"}, "strin"),
        ({"type": "object", "properties": [1]}, "properties"),
        ({"type": "object", "required": "a"}, "required"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "nsatisfiable"),
        ({"type": "integer", "minimum": float("nan")}, "not finite"),
        ({"$ref": "http://example.com/schema"}, "example.com"),
        ({"$ref": "#"}, "response_format"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "response_format"),
        ({"const": "\ud800"}, "response_format"),
        ({"type": "object", "not": {}, "x-guidance": {"lenient": True}}, "'not'"),
        ({"enum": ["x" * 60] * 2001}, "at most 120000"),
        ({"properties": {f"p{i}": {} for i in range(1001)}}, "too many properties"),
        (nested(5000), "nested more than 100"),
        ([], "must be a JSON object"),
        ("object", "must be a JSON object"),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_name(schema: object, words: str) -> None:
    assert words in refused(schema)


_VALUES = st.sampled_from(
    [None, True, -1, 3, 2**70, 1.5, "", "a", "(a", "object", "string", [], ["a"], {}, [{}], "#/$defs/a"]
)
_KEYWORDS = st.sampled_from(
    [
        "type",
        "enum",
        "const",
        "anyOf",
        "allOf",
        "oneOf",
        "$ref",
        "$defs",
        "properties",
        "required",
        "additionalProperties",
        "patternProperties",
        "items",
        "prefixItems",
        "minItems",
        "maxItems",
        "minLength",
        "maxLength",
        "pattern",
        "format",
        "minimum",
        "maximum",
        "exclusiveMinimum",
        "multipleOf",
        "minProperties",
        "$schema",
        "$id",
        "a",
    ]
)
_SCHEMAS = st.recursive(
    st.dictionaries(_KEYWORDS, _VALUES, max_size=3),
    lambda inner: (
        st.dictionaries(_KEYWORDS, inner | st.lists(inner, max_size=2) | _VALUES, max_size=3)
        | st.fixed_dictionaries(
            {"type": st.just("object"), "properties": st.dictionaries(st.text("ab", max_size=2), inner)}
        )
    ),
    max_leaves=8,
)


_FUZZED = make_factory(PLAIN)


@given(_SCHEMAS)
@settings(deadline=None)
def test_no_schema_does_worse_than_a_refusal(schema: dict[str, Any]) -> None:
    refusals = []
    try:
        assert not _FUZZED.json_schema(schema, param="response_format").new().is_finished()
    except InvalidRequestError as error:
        refusals.append(error)
    assert all(error.param == "response_format" and str(error) for error in refusals)


def test_properties_may_be_called_like_keywords() -> None:
    schema = {"type": "object", "properties": {"not": {"const": 1}}, "required": ["not"], "additionalProperties": False}
    text = run(make_factory(PLAIN).json_schema(schema, param="response_format"), PLAIN, 1)
    assert json.loads(text) == {"not": 1}


def test_a_schema_at_the_limits_works() -> None:
    schema = {
        "type": "object",
        "properties": {f"p{i}": {"const": 1} for i in range(1000)},
        "additionalProperties": False,
    }
    text = run(make_factory(PLAIN).json_schema(schema, param="response_format"), PLAIN, 1)
    jsonschema_rs.validate(schema, json.loads(text))


@pytest.mark.parametrize("parameters", [{"type": "string"}, {"type": ["string", "null"]}, "x", ["x"], {"not": {}}])
def test_bad_tool_parameters_name_the_tool(parameters: object) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        make_factory(PLAIN).forced_tools([TOOLS[0], tool("f", parameters)], HERMES)
    assert caught.value.param == "tools[1].function.parameters"


def test_a_model_without_an_end_cannot_be_constrained() -> None:
    with pytest.raises(InvalidRequestError, match="no end-of-generation token"):
        make_factory(TinyTokenizer(eog=())).json_object()


def test_a_refusal_does_not_speak_of_our_grammar() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        make_factory(PLAIN).json_schema({"type": "objec"}, param="p")
    assert str(caught.value) == "p: Invalid type: objec"
