"""The leading reasoning block: where it is split off, and that chunk boundaries never matter."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.tools.parser import ContentDelta
from server.tools.reasoning import ReasoningDelta, ReasoningSplitter, opens_reasoning


def split(chunks: list[str], *, opened: bool = False) -> tuple[str, str]:
    splitter = ReasoningSplitter(opened=opened)
    deltas = [delta for chunk in chunks for delta in splitter.push(chunk)] + splitter.finish()
    assert all(delta.text for delta in deltas)
    kinds = [kind for kind, _ in itertools.groupby(deltas, key=type)]
    assert kinds in ([], [ReasoningDelta], [ContentDelta], [ReasoningDelta, ContentDelta])
    reasoning = "".join(delta.text for delta in deltas if isinstance(delta, ReasoningDelta))
    content = "".join(delta.text for delta in deltas if isinstance(delta, ContentDelta))
    return reasoning, content


@pytest.mark.parametrize(
    ("text", "opened", "reasoning", "content"),
    [
        ("<think>\nso\n\nand so\n</think>\n\nYes. \n", False, "so\n\nand so", "Yes. \n"),
        ("\n<think>so</think>Yes", False, "so", "Yes"),
        ("<think>\n\n</think>\n\nYes", False, "", "Yes"),
        ("Yes <think>no</think>", False, "", "Yes <think>no</think>"),
        (" plain\n", False, "", " plain\n"),
        ("", False, "", ""),
        (" \n", False, "", " \n"),
        ("<thin", False, "", "<thin"),
        ("<think>cut off </thi", False, "cut off </thi", ""),
        ("<think>cut off \n", False, "cut off", ""),
        ("\nso\n</think>\nYes</think>", True, "so", "Yes</think>"),
        ("<think>again</think>Yes", True, "again", "Yes"),
        ("never closed", True, "never closed", ""),
        ("</think>Yes", True, "", "Yes"),
        ("<thi", True, "<thi", ""),
        (" \n", True, "", ""),
    ],
)
def test_splits(text: str, opened: bool, reasoning: str, content: str) -> None:
    assert split([text], opened=opened) == (reasoning, content)
    assert split(list(text), opened=opened) == (reasoning, content)


@given(
    st.lists(st.sampled_from(["<think>", "</think>", "<", "</thi", "\n", " ", "x", "é", "think>"]), max_size=10),
    st.data(),
)
def test_chunk_boundaries_never_matter(pieces: list[str], data: st.DataObject) -> None:
    text = "".join(pieces)
    opened = data.draw(st.booleans())
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=6)))
    chunks = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
    assert split(chunks, opened=opened) == split([text], opened=opened) == split(list(text), opened=opened)


def test_the_prompt_tells_whether_reasoning_is_open() -> None:
    assert opens_reasoning("<|im_start|>assistant\n<think>\n")
    assert not opens_reasoning("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert not opens_reasoning("what is <think>? ")
