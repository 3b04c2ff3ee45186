"""StopMatcher against its slow twin: a character at a time, comparing ends."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.tools.stop import StopMatcher


def naive(text: str, stops: list[str]) -> tuple[str, str | None]:
    for end in range(1, len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            stop = max(matches, key=len)
            return text[: end - len(stop)], stop
    return text, None


def run(chunks: list[str], stops: list[str]) -> tuple[str, str | None]:
    matcher = StopMatcher(stops)
    out = "".join(matcher.push(chunk)[0] for chunk in chunks)
    return out + matcher.flush(), matcher.stopped_by


@given(
    st.lists(st.text("ab<é", max_size=6), max_size=8),
    st.lists(st.text("ab<é", min_size=1, max_size=4), max_size=4),
)
def test_equals_the_naive_matcher_for_any_chunking(chunks: list[str], stops: list[str]) -> None:
    text = "".join(chunks)
    expected = naive(text, stops)
    assert run(chunks, stops) == expected
    assert run(list(text), stops) == expected
    assert run([text], stops) == expected


@pytest.mark.parametrize(
    ("text", "stops", "emitted", "held"),
    [
        ("hello", ["\n\n"], "hello", ""),
        ("hello\n", ["\n\n"], "hello", "\n"),
        ("x<|im", ["<|im_end|>", "m"], "x<|i", ""),
        ("aab", ["aabc", "bd"], "", "aab"),
        ("anything", [], "anything", ""),
    ],
)
def test_holds_back_no_more_than_needed(text: str, stops: list[str], emitted: str, held: str) -> None:
    matcher = StopMatcher(stops)
    assert matcher.push(text)[0] == emitted
    if matcher.stopped_by is None:
        assert matcher.flush() == held


def test_nothing_comes_after_a_stop() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("one EN") == ("one ", None)
    assert matcher.push("D two") == ("", "END")
    assert matcher.push("three") == ("", "END")
    assert matcher.flush() == ""


def test_of_two_stops_the_one_completed_first_wins_however_the_text_is_cut() -> None:
    assert run(["abcd"], ["abcd", "c"]) == run(list("abcd"), ["abcd", "c"]) == ("ab", "c")
