"""Grammars on the default model's vocabulary, where tokens cut across every boundary of the grammar."""

import json

import jsonschema_rs
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quant.model_file import open_model
from server.config import DEFAULT_MODEL, Settings
from server.models.catalog import resolve_model
from server.text.tokenizer import Tokenizer, build_tokenizer
from server.tools.constraint import CompiledGrammar, ConstraintFactory
from server.tools.formats import HERMES
from tests.server.tools.grammar_walk import allowed_ids, walk
from tests.server.tools.test_constraint import PERSON, SCHEMAS, TOOLS, parsed, tool

pytestmark = pytest.mark.real_model

MASK_WORDS = 49_152 // 32
RUN = settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    model = open_model(resolve_model(DEFAULT_MODEL, Settings().cache_dir).path)
    try:
        return build_tokenizer(model.tokenizer, model.config.vocab_size)
    finally:
        model.close()


@pytest.fixture(scope="module")
def factory(tokenizer: Tokenizer) -> ConstraintFactory:
    return ConstraintFactory(tokenizer, mask_words=MASK_WORDS)


def test_walks_validate_and_parse_back(factory: ConstraintFactory, tokenizer: Tokenizer) -> None:
    person = factory.json_schema(PERSON, param="response_format")
    calls = factory.forced_tools(TOOLS, HERMES)
    for seed in range(40):
        text = walk(person, tokenizer, seed, mask_words=MASK_WORDS)
        jsonschema_rs.validate(PERSON, json.loads(text))
        content, found = parsed(walk(calls, tokenizer, seed, mask_words=MASK_WORDS), HERMES, list(SCHEMAS))
        assert content == ""
        assert found
        for name, arguments in found:
            jsonschema_rs.validate(SCHEMAS[name], arguments)


def assert_accepts(compiled: CompiledGrammar, tokenizer: Tokenizer, text: str) -> None:
    """The text's own tokens are in every mask: the grammar does not force the model out of its usual tokens."""
    grammar = compiled.new()
    mask = np.zeros(MASK_WORDS, dtype=np.int32)
    for token_id in tokenizer.encode(text, add_special=False, parse_special=False):
        grammar.fill_mask(mask)
        assert token_id in allowed_ids(mask), (text, tokenizer.token_bytes(token_id))
        assert grammar.advance(token_id)
    grammar.fill_mask(mask)
    assert tokenizer.eog_token_ids <= set(allowed_ids(mask))


@st.composite
def _people(draw: st.DrawFn) -> dict[str, object]:
    """Instances of PERSON with the properties in the schema's order, which the grammar fixes."""
    person: dict[str, object] = {
        "name": draw(st.text("abé 'x\n", min_size=1, max_size=8)),
        "age": draw(st.integers(0, 120)),
    }
    if draw(st.booleans()):
        person["tags"] = draw(st.lists(st.sampled_from(["a", "é"]), max_size=2))
    return {**person, "home": draw(st.sampled_from([None, "NO-7", "XY-123"]))}


@RUN
@given(_people(), st.sampled_from([None, 2]))
def test_the_usual_tokens_of_an_answer_are_allowed(
    factory: ConstraintFactory, tokenizer: Tokenizer, instance: dict[str, object], indent: int | None
) -> None:
    text = json.dumps(instance, ensure_ascii=False, indent=indent)
    assert_accepts(factory.json_schema(PERSON, param="response_format"), tokenizer, text)
    call = f'<tool_call>\n{{"name": "person", "arguments": {text}}}\n</tool_call>'
    assert_accepts(factory.forced_tools(TOOLS, HERMES), tokenizer, call)
    assert_accepts(factory.forced_tools(TOOLS, HERMES), tokenizer, f"{call}\n{call}")
    free = factory.free_tools([tool("person", PERSON, strict=True)], HERMES)
    assert free is not None
    assert_accepts(free, tokenizer, f"Sure, <tag>.\n{call}\nDone.")
