"""Orders that are the same everywhere, and shares that no key exceeds."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.dataset.order import NUM_STAGES, curriculum, difficulty, shuffled
from finetune.dataset.shares import key_limit, scan_limit
from finetune.packed import Example

IDS = [f"trace-{number}" for number in range(64)]


def test_an_epoch_has_its_own_order_and_an_example_its_own_draw() -> None:
    first = shuffled(IDS, seed=1, epoch=0)
    assert sorted(first) == list(range(64))
    assert first == shuffled(IDS, seed=1, epoch=0)
    assert first != shuffled(IDS, seed=1, epoch=1)
    assert first != shuffled(IDS, seed=2, epoch=0)
    assert [index for index in first if index != 63] == shuffled(IDS[:63], seed=1, epoch=0)  # others do not move
    assert first[:4] == [40, 1, 15, 23]  # on every machine


def test_a_curriculum_goes_up_in_stages() -> None:
    hard = [float((number * 37) % 64) for number in range(64)]
    order = curriculum(hard, IDS, seed=0, epoch=0)
    size = 64 // NUM_STAGES
    stages = [[hard[index] for index in order[start : start + size]] for start in range(0, 64, size)]
    assert [sorted(stage) for stage in stages] == [list(map(float, range(s, s + size))) for s in range(0, 64, size)]
    assert any(stage != sorted(stage) for stage in stages)
    assert curriculum([], [], seed=0, epoch=0) == []


def test_difficulty_is_the_bases_loss_or_the_length_of_the_answer() -> None:
    weights = np.array([0, 0, 1, 2, 0.5], np.float32)
    one = Example("a", np.arange(5, dtype=np.int32), weights, "c")
    assert difficulty([one]) == [3.0]
    assert difficulty([one], [0.25]) == [0.25]


@given(st.dictionaries(st.text(max_size=2), st.integers(1, 500), max_size=6), st.floats(0.2, 0.9), st.integers(1, 50))
def test_no_key_has_more_than_its_share_or_the_floor(counts: dict[str, int], share: float, floor: int) -> None:
    limit = key_limit(counts, max_share=share, min_count=floor)
    kept = {key: min(count, limit) for key, count in counts.items()}
    if len(counts) < 2:
        assert kept == counts
        return
    total = sum(kept.values())
    assert all(count <= max(floor, share * total) for count in kept.values())
    if any(kept[key] < counts[key] for key in counts):  # as large as it can be
        more = {key: min(count, limit + 1) for key, count in counts.items()}
        assert max(more.values()) > max(floor, int(share * sum(more.values())))


@pytest.mark.parametrize(("num_keys", "expected"), [(0, 100), (1, 100), (2, 50), (9, 50)])
def test_a_flood_does_not_use_up_the_budget(num_keys: int, expected: int) -> None:
    assert scan_limit(num_keys, 100, max_share=0.5, min_count=20) == expected
    assert scan_limit(5, 30, max_share=0.5, min_count=20) == 20
