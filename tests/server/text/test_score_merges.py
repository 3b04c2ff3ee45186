"""Ranked merges and the plain algorithm give the same tokens wherever the former say they are exact."""

import json
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from server.text.score_merges import ScoreMerger, ranked_merges
from tests.server.text import make_corpus

_NORMAL, _BYTE = 1, 6
_SMALL: dict[str, Any] = json.loads(make_corpus.SMALL_CORPUS.read_text())
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _both(pieces: list[str], scores: list[float]) -> tuple[Tokenizer, ScoreMerger, bool]:
    tokens = [*_BYTES, *pieces]
    kinds = bytes([_BYTE] * 256 + [_NORMAL] * len(pieces))
    values = np.array([0.0] * 256 + scores, np.float32)
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    merges, is_exact = ranked_merges(tokens, kinds, values, ids)
    return Tokenizer(models.BPE(ids, merges, byte_fallback=True)), ScoreMerger(tokens, kinds, values, ids), is_exact


@given(text=st.text(st.sampled_from("ab▁c"), max_size=60), data=st.data())
@settings(max_examples=300, deadline=None)
def test_distinct_scores_are_exact(text: str, data: st.DataObject) -> None:
    multi = data.draw(st.lists(st.text(st.sampled_from("ab▁"), min_size=2, max_size=6), unique=True, max_size=12))
    library, plain, is_exact = _both([*multi, "a", "b", "▁"], [-float(rank) for rank in range(len(multi) + 3)])
    assert is_exact
    assert library.encode(text, add_special_tokens=False).ids == plain.tokenize(text)


@given(text=st.text(st.sampled_from("a▁"), max_size=80), lengths=st.sets(st.integers(2, 20)))
@settings(max_examples=300, deadline=None)
def test_ties_among_runs_of_one_character_are_exact(text: str, lengths: set[int]) -> None:
    """Llama's vocabulary gives all runs of spaces one score."""
    runs = ["▁" * length for length in sorted(lengths)]
    library, plain, is_exact = _both(["▁a", "a▁▁", *runs, "a", "▁"], [-1.0, -2.0] + [-1e9] * len(runs) + [-3.0, -4.0])
    assert is_exact
    assert library.encode(text, add_special_tokens=False).ids == plain.tokenize(text)


def test_other_ties_and_missing_characters_are_not_exact() -> None:
    assert not _both(["ab", "bc", "a", "b", "c"], [-1.0, -1.0, -2.0, -3.0, -4.0])[2]
    assert not _both(["ab", "a"], [-1.0, -2.0])[2]


def test_ties_go_to_the_leftmost_pair() -> None:
    _, plain, _ = _both(["bc", "ab", "a", "b", "c"], [-1.0, -1.0, -2.0, -3.0, -4.0])
    assert plain.tokenize("abc") == [256 + 1, 256 + 4]


def test_tokens_that_nothing_makes_may_tie() -> None:
    assert _both(["xyz", "uvw", *"uvwxyz"], [0.0, 0.0] + [-float(rank) for rank in range(6)])[2]
