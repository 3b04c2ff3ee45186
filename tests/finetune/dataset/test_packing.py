"""Packing loses nothing: every example comes back exactly, each row sees its own past only, and no bin is too long."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.dataset.packing import chain_rows, pack, pack_bins, unpack
from finetune.packed import Example


def example(token_ids: list[int], weights: list[float] | None = None, name: str = "e", kl: bool = False) -> Example:
    if weights is None:
        weights = [0.0] + [1.0] * (len(token_ids) - 1)
    return Example(name, np.array(token_ids, np.int32), np.array(weights, np.float32), "c", kl)


@st.composite
def example_lists(draw: st.DrawFn) -> list[Example]:
    """Few tokens and shared beginnings, so that tries are deep, bushy, and have examples that are prefixes."""
    stems = draw(st.lists(st.lists(st.integers(0, 2), min_size=0, max_size=12), min_size=1, max_size=4))
    found = []
    for number in range(draw(st.integers(1, 14))):
        tail = draw(st.lists(st.integers(0, 2), min_size=1, max_size=10))
        ids = [*draw(st.sampled_from(stems)), *tail]
        weights = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=len(ids) - 1, max_size=len(ids) - 1))
        found.append(example(ids, [0.0, *weights], f"e{number}", draw(st.booleans())))
    return found


@settings(max_examples=150, deadline=None)
@given(example_lists(), st.integers(1, 6), st.integers(24, 60), st.sampled_from([None, 3]))
def test_every_example_comes_back_exactly(
    examples: list[Example], min_shared: int, max_tokens: int, window: int | None
) -> None:
    bins = pack_bins(examples, max_tokens, seed=3, epoch=1, window=window, min_shared=min_shared)
    seen = {}
    for one in bins:
        packed = one.packed
        assert len(packed.token_ids) == len(packed.positions) == packed.segments[-1].end <= max_tokens
        assert packed.num_examples == len(one.placements)
        for place, back in zip(one.placements, unpack(one, examples), strict=True):
            assert place.example not in seen
            seen[place.example] = back
            assert (packed.loss_kl[place.first_loss : place.end_loss] == examples[place.example].kl).all()
        assert packed.num_real_tokens == sum(len(examples[place.example].token_ids) for place in one.placements)
    assert sorted(seen) == list(range(len(examples)))
    for index, back in seen.items():
        assert back.token_ids.tolist() == examples[index].token_ids.tolist()
        assert back.weights.tolist() == examples[index].weights.tolist()


@settings(max_examples=60, deadline=None)
@given(example_lists(), st.integers(1, 6))
def test_segments_are_a_forest_whose_branches_restart_at_their_prefix(examples: list[Example], min_shared: int) -> None:
    for one in pack_bins(examples, 60, seed=0, epoch=0, min_shared=min_shared):
        end = 0
        for number, segment in enumerate(one.packed.segments):
            assert segment.start == end < segment.end
            assert -1 <= segment.parent < number
            end = segment.end
            rows = chain_rows(one.packed.segments, number)
            assert one.packed.positions[rows].tolist() == list(range(len(rows)))


@settings(max_examples=60, deadline=None)
@given(example_lists())
def test_loss_terms_are_those_of_the_plain_examples(examples: list[Example]) -> None:
    """As a multiset of (all tokens before the target, target, weight, kl)."""
    plain = sorted(
        (tuple(one.token_ids[:t].tolist()), int(one.token_ids[t]), float(one.weights[t]), one.kl)
        for one in examples
        for t in range(len(one.token_ids))
        if one.weights[t]
    )
    packed = []
    for one in pack_bins(examples, 48, seed=0, epoch=0, min_shared=2):
        p = one.packed
        segment_of = np.repeat(np.arange(len(p.segments)), [s.end - s.start for s in p.segments])
        for row, target, weight, kl in zip(p.loss_rows, p.loss_targets, p.loss_weights, p.loss_kl, strict=True):
            rows = chain_rows(p.segments, int(segment_of[row]))
            past = tuple(p.token_ids[rows[rows <= row]].tolist())
            packed.append((past, int(target), float(weight), bool(kl)))
    assert sorted(packed) == plain


def test_a_shared_prompt_is_laid_out_once_and_its_last_row_predicts_every_answer() -> None:
    prompt = list(range(40))
    examples = [example([*prompt, 100 + i, 7], [0.0] * 40 + [1.0, 1.0], f"e{i}") for i in range(3)]
    (packed,) = pack(examples, 64, seed=0, epoch=0)
    assert len(packed.token_ids) == 40 + 3 * 2
    assert packed.num_real_tokens == 3 * 42
    assert packed.loss_rows.tolist().count(39) == 3
    assert sorted(packed.loss_targets[packed.loss_rows == 39].tolist()) == [100, 101, 102]


def test_a_short_common_run_is_not_worth_a_branch() -> None:
    examples = [example([*range(31), 50 + i]) for i in range(2)]
    (packed,) = pack(examples, 64, seed=0, epoch=0)
    assert [segment.parent for segment in packed.segments] == [-1, -1]


def test_a_trie_too_long_for_one_bin_repeats_its_prefix() -> None:
    prompt = list(range(40))
    examples = [example([*prompt, *[100 + i] * 10], name=f"e{i}") for i in range(4)]
    found = pack(examples, 60, seed=0, epoch=0)
    assert [len(packed.token_ids) for packed in found] == [60, 60]


def test_bins_are_full_where_they_can_be() -> None:
    rng = np.random.default_rng(0)
    examples = [
        example(rng.integers(0, 1000, int(n)).tolist(), name=str(i)) for i, n in enumerate(rng.integers(20, 300, 200))
    ]
    found = pack(examples, 1024, seed=0, epoch=0)
    total = sum(len(one.token_ids) for one in examples)
    assert len(found) <= -(-total // 1024) + 1


def test_the_same_seed_and_epoch_give_the_same_bins_and_others_another_order() -> None:
    examples = [example([i] * 50, name=str(i)) for i in range(12)]

    def order(seed: int, epoch: int) -> list[int]:
        return [int(packed.token_ids[0]) for packed in pack(examples, 50, seed=seed, epoch=epoch)]

    assert order(1, 0) == order(1, 0)
    assert sorted(order(1, 1)) == sorted(order(1, 0))
    assert len({tuple(order(1, 0)), tuple(order(1, 1)), tuple(order(2, 0))}) == 3


def test_windows_keep_the_order_of_a_curriculum() -> None:
    examples = [example([i] * 50, name=str(i)) for i in range(12)]
    firsts = [int(packed.token_ids[0]) for packed in pack(examples, 50, seed=0, epoch=0, window=4)]
    assert [sorted(firsts[i : i + 4]) for i in (0, 4, 8)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_a_deep_history_does_not_recurse() -> None:
    """An agent's run of 1,200 turns, each a trace whose prompt holds all before it."""
    whole = list(range(2400))
    examples = [example(whole[: 2 * n], [0.0] * (2 * n - 1) + [1.0], str(n)) for n in range(1, 1201)]
    (one,) = pack_bins(examples, len(whole), seed=0, epoch=0, min_shared=2)
    assert one.packed.token_ids.tolist() == whole
    assert sorted(one.packed.loss_targets.tolist()) == whole[1::2]


def test_an_example_longer_than_a_bin_is_refused_and_no_examples_give_no_bins() -> None:
    with pytest.raises(ValueError, match="example e has 9 tokens, a micro-batch at most 8"):
        pack([example([1] * 9)], 8, seed=0, epoch=0)
    assert pack([], 8, seed=0, epoch=0) == []
