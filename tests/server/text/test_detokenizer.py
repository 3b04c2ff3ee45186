"""The incremental detokenizer gives, in pieces, what decoding gives at once."""

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.text.detokenizer import Detokenizer
from server.text.tokenizer import Tokenizer
from tests.server.text import make_corpus, small_vocabularies
from tests.server.text.corpus_texts import TEXTS
from tests.server.text.vocabulary_files import tokenizer_from

_SMALL: dict[str, Any] = json.loads(make_corpus.SMALL_CORPUS.read_text())
_BYTE_LEVEL = tokenizer_from(small_vocabularies.byte_level_metadata("smollm", _SMALL["merges"]))
_SENTENCEPIECE = tokenizer_from(small_vocabularies.sentencepiece_metadata(_SMALL["pieces"]), 2000)
_TOKENIZERS = pytest.mark.parametrize("tokenizer", [_BYTE_LEVEL, _SENTENCEPIECE], ids=["byte level", "sentencepiece"])


def _pieces(tokenizer: Tokenizer, ids: list[int], cuts: list[int], **options: bool) -> list[str]:
    """What `push` gives for `ids` cut at these places, and `flush`."""
    detokenizer = Detokenizer(tokenizer, **options)
    edges = [0, *sorted(cuts), len(ids)]
    return [detokenizer.push(ids[a:b]) for a, b in pairwise(edges)] + [detokenizer.flush()]


def _chunked(tokenizer: Tokenizer) -> st.SearchStrategy[tuple[list[int], list[int]]]:
    """Token ids, many of them single bytes (torn and invalid UTF-8), and places to cut."""
    byte_ids = [i for i in range(tokenizer.num_tokens) if len(tokenizer.token_bytes(i)) == 1]
    any_id = st.integers(0, tokenizer.vocab_size - 1)
    ids = st.lists(st.sampled_from(byte_ids) | any_id, max_size=30)
    return ids.flatmap(lambda i: st.tuples(st.just(i), st.lists(st.integers(0, len(i)), max_size=6)))


@_TOKENIZERS
@given(data=st.data(), skip_special=st.booleans(), at_start=st.booleans())
@settings(max_examples=150, deadline=None)
def test_pieces_make_up_the_decoded_text(
    tokenizer: Tokenizer, data: st.DataObject, skip_special: bool, at_start: bool
) -> None:
    ids, cuts = data.draw(_chunked(tokenizer))
    pieces = _pieces(tokenizer, ids, cuts, skip_special=skip_special, at_start=at_start)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special=skip_special, at_start=at_start)


@_TOKENIZERS
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_text_comes_out_whole_characters_at_a_time(tokenizer: Tokenizer, data: st.DataObject) -> None:
    text = data.draw(st.text(max_size=20))
    ids = tokenizer.encode(text, add_special=False, parse_special=False)
    pieces = _pieces(tokenizer, ids, list(range(len(ids))), at_start=True)
    assert "".join(pieces) == text.replace("▁", " " if tokenizer is _SENTENCEPIECE else "▁")
    assert pieces[-1] == ""
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@_TOKENIZERS
@pytest.mark.parametrize("text", TEXTS)
def test_one_token_at_a_time(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special=True, parse_special=True)
    for skip_special in (True, False):
        pieces = _pieces(tokenizer, ids, list(range(len(ids))), skip_special=skip_special, at_start=True)
        assert "".join(pieces) == tokenizer.decode(ids, skip_special=skip_special)


def test_a_character_comes_with_its_last_byte() -> None:
    byte_ids = [_SENTENCEPIECE.token_to_id(f"<0x{byte:02X}>") for byte in "👍".encode()]
    assert _pieces(_SENTENCEPIECE, byte_ids, [1, 2, 3]) == ["", "", "", "👍", ""]


def test_a_torn_tail_is_flushed_as_one_replacement_character() -> None:
    byte_ids = [_SENTENCEPIECE.token_to_id(f"<0x{byte:02X}>") for byte in "👍".encode()[:3]]
    assert _pieces(_SENTENCEPIECE, byte_ids, [1, 2]) == ["", "", "", "\ufffd"]


def test_a_generated_leading_space_is_kept_and_that_of_a_whole_text_is_not() -> None:
    ids = _SENTENCEPIECE.encode("the", add_special=True, parse_special=True)
    assert _SENTENCEPIECE.token_bytes(ids[1]).startswith(b" ")
    assert "".join(_pieces(_SENTENCEPIECE, ids, [1])) == " the"
    assert "".join(_pieces(_SENTENCEPIECE, ids, [1], at_start=True)) == "the" == _SENTENCEPIECE.decode(ids)


def test_special_tokens_are_skipped_or_kept() -> None:
    ids = _BYTE_LEVEL.encode("<|im_start|>x<think>y<|im_end|>", add_special=False, parse_special=True)
    assert "".join(_pieces(_BYTE_LEVEL, ids, [2])) == "x<think>y"
    assert "".join(_pieces(_BYTE_LEVEL, ids, [2], skip_special=False)) == "<|im_start|>x<think>y<|im_end|>"
