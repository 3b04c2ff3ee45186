"""Near-duplicates: the fast finder agrees with comparing every pair."""

import random

import pytest

from finetune.dataset.near import NearTexts, jaccard, near_groups, normalized, shingle_hashes

LONG = "Could you please calculate the area of a triangle that has a base of 10 units and a height of 5 units for me?"


def slow_jaccard(a: str, b: str) -> float:
    def runs(text: str) -> set[str]:
        padded = f" {normalized(text)} ".ljust(5)
        return {padded[i : i + 5] for i in range(len(padded) - 4)}

    return len(runs(a) & runs(b)) / len(runs(a) | runs(b))


def changed(text: str, draw: random.Random) -> str:
    words = text.split()
    for _ in range(draw.randrange(4)):
        words[draw.randrange(len(words))] = draw.choice(["red", "seven", "x", "calculate"])
    return " ".join(words)


def test_the_fast_index_finds_what_all_pairs_find() -> None:
    draw = random.Random(7)
    stems = [" ".join(draw.choice(LONG.split()) for _ in range(16)) for _ in range(12)]
    texts = [changed(draw.choice(stems), draw) for _ in range(120)]
    known = NearTexts()
    for number, text in enumerate(texts):
        expected = [other for other in range(number) if slow_jaccard(texts[other], text) >= 0.8]
        assert known.has(text) == bool(expected)
        assert known.add(text) == expected


@pytest.mark.parametrize("pair", [("", ""), ("a", "b"), ("hello", "hello!"), (LONG, LONG.replace("10", "12"))])
def test_hashes_give_the_jaccard_index_of_the_texts(pair: tuple[str, str]) -> None:
    assert jaccard(*map(shingle_hashes, pair)) == slow_jaccard(*pair)


def test_case_punctuation_and_spaces_do_not_count() -> None:
    known = NearTexts(1.0)
    known.add("What's  the weather, in Zürich?")
    assert known.has("what s THE weather in zürich")
    assert not known.has("What's the weather in Zürich today?")


def test_templated_questions_are_not_nearly_equal() -> None:
    known = NearTexts()
    known.add("What is the weather in Paris?")
    assert not known.has("What is the weather in London?")


def test_groups_are_connected_over_others() -> None:
    words = [f"word{i}" for i in range(60)]
    chain = [" ".join(words[i : i + 50]) for i in range(0, 11, 2)]  # neighbours are near, the ends are not
    assert slow_jaccard(chain[0], chain[-1]) < 0.8
    assert near_groups(["something else entirely", *chain]) == [0, 1, 1, 1, 1, 1, 1]


def test_a_threshold_that_would_miss_pairs_is_refused() -> None:
    with pytest.raises(ValueError, match=r"between 0\.7 and 1"):
        NearTexts(0.5)
