"""Counting a pattern's repetitions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.tools.schema import max_repetitions


@pytest.mark.parametrize(
    ("pattern", "repetitions"),
    [
        ("", 1),
        ("abc*", 1),
        ("a{3}", 3),
        ("a{3,}", 3),
        ("a{2,7}b{5}", 7),
        ("a{,7}", 7),
        ("(a{10}b){20}", 200),
        ("((a{10}){10}|b){10}c{2}", 1000),
        ("(a{10})b{20}", 20),
        ("a{4}{5}", 20),
        ("(a{10})+", 10),
        ("[{3}]{2}", 2),
        ("[]{9}(]{2}", 2),
        ("[^]]{2}", 2),
        (r"\{3}", 1),
        (r"\({3}", 3),
        ("a{99999999999999999999}", 10**9),
        ("((((", 1),
        ("))){2}", 2),
        ("[", 1),
        ("\\", 1),
    ],
)
def test_counts(pattern: str, repetitions: int) -> None:
    assert max_repetitions(pattern) == repetitions


@given(st.text("a(){},[]\\123*|", max_size=30))
def test_any_text_gets_a_number(pattern: str) -> None:
    assert max_repetitions(pattern) >= 0
