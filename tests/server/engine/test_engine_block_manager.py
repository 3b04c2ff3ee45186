"""The block manager alone: keys, sharing, eviction and the balance of its books."""

from array import array

import pytest

from server.engine.adapters import LoadedAdapter
from server.engine.block_manager import BlockManager
from server.engine.params import SamplingParams
from server.engine.sequence import Sequence


def make(tokens, *, adapter=None, salt=b"", num_prompt_logprobs=None) -> Sequence:
    params = SamplingParams(max_tokens=8, num_prompt_logprobs=num_prompt_logprobs)
    return Sequence(
        0,
        array("i", tokens),
        params,
        seed=0,
        end_token_ids=frozenset(),
        max_length=len(tokens) + 8,
        adapter=adapter,
        cache_salt=salt,
    )


def compute(manager: BlockManager, seq: Sequence) -> int:
    """Admit, compute every token, publish; the number of hit blocks."""
    hits = manager.num_hit_blocks(seq)
    manager.admit(seq, hits)
    seq.num_computed = len(seq.token_ids)
    manager.publish(seq)
    return hits


def test_hit_leaves_the_last_prompt_token():
    manager = BlockManager(16, 4)
    first = make(range(8))
    assert compute(manager, first) == 0
    manager.release(first)
    assert manager.num_hit_blocks(make(range(8))) == 1  # 2 full blocks, but token 7 must be computed
    assert manager.num_hit_blocks(make(range(9))) == 2
    assert manager.num_hit_blocks(make([0, 1, 2, 3])) == 0
    assert manager.num_hit_blocks(make([0, 1, 2, 3, 9, 9, 9, 9, 8])) == 1


def test_only_computed_blocks_are_shared():
    manager = BlockManager(16, 4)
    first = make(range(12))
    manager.admit(first, manager.num_hit_blocks(first))
    assert manager.num_hit_blocks(make(range(12))) == 0
    first.num_computed = 5
    manager.publish(first)
    assert manager.num_hit_blocks(make(range(12))) == 1


def test_adapter_salt_and_order_are_part_of_the_key():
    manager = BlockManager(32, 4)
    old, new = LoadedAdapter(0, "sha256:old"), LoadedAdapter(0, "sha256:new")
    compute(manager, make(range(9), adapter=old, salt=b"a"))
    assert manager.num_hit_blocks(make(range(9), adapter=old, salt=b"a")) == 2
    assert manager.num_hit_blocks(make(range(9), adapter=new, salt=b"a")) == 0
    assert manager.num_hit_blocks(make(range(9), salt=b"a")) == 0
    assert manager.num_hit_blocks(make(range(9), adapter=old)) == 0
    assert manager.num_hit_blocks(make([4, 5, 6, 7, 0, 1, 2, 3, 8], adapter=old, salt=b"a")) == 0
    # Framed: a digest and a salt that only join up to the same bytes differ.
    compute(manager, make(range(9), adapter=LoadedAdapter(1, "ab"), salt=b"c"))
    assert manager.num_hit_blocks(make(range(9), adapter=LoadedAdapter(1, "a"), salt=b"bc")) == 0


def test_prompt_logprobs_and_the_switch_bypass():
    manager = BlockManager(16, 4)
    compute(manager, make(range(9)))
    assert manager.num_hit_blocks(make(range(9), num_prompt_logprobs=0)) == 0
    silent = BlockManager(16, 4, enable_prefix_caching=False)
    compute(silent, make(range(9)))
    assert silent.num_hit_blocks(make(range(9))) == 0
    assert silent.num_cached == 0


def test_shared_blocks_count_their_references():
    manager = BlockManager(8, 4)
    first, second = make(range(9)), make(range(9))
    compute(manager, first)
    assert compute(manager, second) == 2
    assert first.blocks[:2] == second.blocks[:2]
    assert manager.num_used == 4
    manager.check_invariants([first, second])
    manager.release(first)
    manager.check_invariants([second])
    assert manager.num_used == 3
    manager.release(second)
    manager.check_invariants([])
    assert (manager.num_used, manager.num_cached, manager.num_available) == (0, 2, 8)


def test_equal_blocks_computed_twice_keep_one_copy():
    manager = BlockManager(8, 4)
    first, second = make(range(5)), make(range(5))
    manager.admit(first, 0)
    manager.admit(second, 0)
    for seq in (first, second):
        seq.num_computed = 5
        manager.fill_keys(seq, 1)
        manager.publish(seq)
    manager.check_invariants([first, second])
    manager.release(second)
    manager.release(first)
    manager.check_invariants([])
    assert manager.num_cached == 1


def test_eviction_is_least_recently_used_and_tail_first():
    manager = BlockManager(4, 4)
    old, new = make(range(8)), make(range(20, 28))
    compute(manager, old)
    manager.release(old)
    compute(manager, new)
    manager.release(new)
    assert manager.num_cached == 4
    filler = make([50])
    compute(manager, filler)  # evicts the tail block of `old`
    assert manager.num_hit_blocks(make([*range(8), 9])) == 1
    assert manager.num_hit_blocks(make([*range(20, 28), 9])) == 2
    manager.check_invariants([filler])
    # A hit counts as a use: `old`'s head is now younger than `new`.
    again = make(range(5))
    compute(manager, again)
    manager.release(again)
    manager.release(filler)
    compute(manager, make(range(30, 42)))
    assert manager.num_hit_blocks(make(range(5))) == 1
    assert manager.num_hit_blocks(make([*range(20, 28), 9])) == 0


def test_reviving_cached_blocks_is_counted_as_need():
    manager = BlockManager(3, 4)
    first = make(range(8))
    compute(manager, first)
    manager.release(first)
    again = make(range(9))
    hits = manager.num_hit_blocks(again)
    assert (hits, manager.num_available, manager.num_needed(again, hits)) == (2, 3, 3)
    manager.admit(again, hits)
    assert manager.num_available == 0


def test_a_lost_reference_is_noticed():
    manager = BlockManager(4, 4)
    seq = make(range(5))
    compute(manager, seq)
    with pytest.raises(AssertionError, match="reference counts"):
        manager.check_invariants([])
