"""KV blocks: who holds which, and which full ones can be shared (the prefix cache).

A block holds 16 tokens. Its key is a 128-bit keyed digest of (parent key, token ids), and the first parent is the
digest of the adapter version and the API key's cache salt: equal keys mean the same tokens, at the same place, computed
by the same weights, for somebody who may know of it. Blocks whose KV was really computed are published under their
key; an unreferenced published block stays until the pool needs it, least recently used first.

Terms as in the PagedAttention paper (Kwon et al., 2023). Not covered: when to allocate (scheduler.py).
"""

import secrets
from collections import OrderedDict
from hashlib import blake2b

from server.engine.sequence import Sequence

KEY_BYTES = 16


class BlockManager:
    """Invariant: every block is exactly one of free, cached (unreferenced, published) or used (ref_counts > 0)."""

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True) -> None:
        assert num_blocks > 0
        assert block_size > 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        # A secret of this process: nobody can construct colliding prompts against it.
        self._digest_key = secrets.token_bytes(32)
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack; block 0 goes out first
        self._ref_counts = [0] * num_blocks
        self._keys: list[bytes | None] = [None] * num_blocks
        self._published: dict[bytes, int] = {}
        self._unreferenced: OrderedDict[int, None] = OrderedDict()  # published, oldest first

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can hand out, cached ones included."""
        return len(self._free) + len(self._unreferenced)

    @property
    def num_cached(self) -> int:
        return len(self._unreferenced)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_available

    # -- the prefix cache -------------------------------------------------------------------------------------------

    def fill_keys(self, seq: Sequence, num_full_blocks: int) -> None:
        """Extend `seq.block_keys` to the first `num_full_blocks` blocks of its tokens."""
        keys = seq.block_keys
        if len(keys) >= num_full_blocks:
            return
        size = self.block_size
        parent = keys[-1] if keys else self._root_key(seq)
        for index in range(len(keys), num_full_blocks):
            digest = blake2b(parent, digest_size=KEY_BYTES, key=self._digest_key)
            digest.update(seq.token_ids[index * size : (index + 1) * size].tobytes())
            parent = digest.digest()
            keys.append(parent)

    def _root_key(self, seq: Sequence) -> bytes:
        digest = blake2b(b"sterna-kv-root", digest_size=KEY_BYTES, key=self._digest_key)
        for part in (seq.adapter.digest.encode() if seq.adapter is not None else b"", seq.cache_salt):
            digest.update(len(part).to_bytes(8, "little"))  # framed: ("ab", "c") is not ("a", "bc")
            digest.update(part)
        return digest.digest()

    def num_hit_blocks(self, seq: Sequence) -> int:
        """Leading blocks that are cached; at least the last token is left to compute, for its logits."""
        if not (self.enable_prefix_caching and seq.uses_prefix_cache):
            return 0
        num_full = (len(seq.token_ids) - 1) // self.block_size
        self.fill_keys(seq, num_full)
        published = self._published
        keys = seq.block_keys
        for index in range(num_full):
            if keys[index] not in published:
                return index
        return num_full

    def publish(self, seq: Sequence) -> None:
        """Offer the full computed blocks of `seq` that are not in the cache yet. Call after the step, never before."""
        num_full = seq.num_computed // self.block_size
        if num_full <= seq.num_published or not (self.enable_prefix_caching and seq.uses_prefix_cache):
            return
        self.fill_keys(seq, num_full)
        for index in range(seq.num_published, num_full):
            key, block = seq.block_keys[index], seq.blocks[index]
            # Computed twice at the same time: the first copy serves, the second stays private and dies with its owner.
            if key not in self._published:
                assert self._keys[block] is None
                self._published[key] = block
                self._keys[block] = key
        seq.num_published = num_full

    # -- blocks -----------------------------------------------------------------------------------------------------

    def num_needed(self, seq: Sequence, num_hit_blocks: int) -> int:
        """How much `num_available` falls when `seq` is admitted with that many hits."""
        num_revived = sum(1 for key in seq.block_keys[:num_hit_blocks] if self._ref_counts[self._published[key]] == 0)
        return self._num_blocks_for(len(seq.token_ids)) - num_hit_blocks + num_revived

    def _num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def admit(self, seq: Sequence, num_hit_blocks: int) -> None:
        """Give `seq` blocks for all of its present tokens, the first `num_hit_blocks` of them from the cache."""
        assert not seq.blocks
        for key in seq.block_keys[:num_hit_blocks]:
            block = self._published[key]
            if self._ref_counts[block] == 0:
                del self._unreferenced[block]
            self._ref_counts[block] += 1
            seq.blocks.append(block)
        seq.num_published = num_hit_blocks
        seq.num_computed = num_hit_blocks * self.block_size
        for _ in range(self._num_blocks_for(len(seq.token_ids)) - num_hit_blocks):
            seq.blocks.append(self._allocate())

    def append_block(self, seq: Sequence) -> int:
        """One more block for a growing sequence; the caller has checked `num_available`."""
        block = self._allocate()
        seq.blocks.append(block)
        return block

    def _allocate(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._unreferenced.popitem(last=False)
            key = self._keys[block]
            assert key is not None
            del self._published[key]
            self._keys[block] = None
        self._ref_counts[block] = 1
        return block

    def release(self, seq: Sequence) -> None:
        """Take the blocks back. The tail goes first, so that a shared head outlives it in the cache."""
        for block in reversed(seq.blocks):
            self._ref_counts[block] -= 1
            assert self._ref_counts[block] >= 0
            if self._ref_counts[block] > 0:
                continue
            if self._keys[block] is None:
                self._free.append(block)
            else:
                self._unreferenced[block] = None
        seq.blocks.clear()
        seq.num_published = 0
        seq.num_computed = 0

    def check_invariants(self, sequences: list[Sequence]) -> None:
        """For tests: raise AssertionError when the books do not balance against the live `sequences`."""
        counts = [0] * self.num_blocks
        for seq in sequences:
            for block in seq.blocks:
                counts[block] += 1
        assert counts == self._ref_counts, "reference counts do not match the block tables"
        used = {block for block, count in enumerate(counts) if count}
        free, cached = set(self._free), set(self._unreferenced)
        assert len(free) == len(self._free), "a block is free twice"
        assert used.isdisjoint(free | cached), "a block is used and not"
        assert free.isdisjoint(cached), "a block is free and cached"
        assert len(used) + len(free) + len(cached) == self.num_blocks, "a block was lost"
        assert {block: key for key, block in self._published.items()} == {
            block: key for block, key in enumerate(self._keys) if key is not None
        }, "published keys and blocks disagree"
        assert all(self._keys[block] is not None for block in cached)
        assert all(self._keys[block] is None for block in free)
