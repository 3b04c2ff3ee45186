"""Examples that teach copying: what is drawn, what carries loss, and that a run takes them in."""

import numpy as np

from finetune.packed import Example
from finetune.qat.copying import LENGTHS, MOST_RUNS, copying_examples, plain_tokens

TOKENS = np.arange(100, 300, dtype=np.int32)


def test_every_token_with_loss_follows_the_pair_that_stood_before() -> None:
    for one in copying_examples(TOKENS, 50, seed=0):
        ids, half = one.token_ids, len(one.token_ids) // 2
        assert sorted(ids[:half]) == sorted(ids[half:])
        assert set(ids) <= set(TOKENS)
        assert LENGTHS[0] <= half <= MOST_RUNS * LENGTHS[1]
        pairs = set(zip(ids[: half - 1].tolist(), ids[1:half].tolist(), strict=True))
        lossy = np.flatnonzero(one.weights)
        assert lossy.min() > half
        assert set(one.weights) == {0.0, 1.0}
        assert {(ids[at - 1], ids[at]) for at in lossy} <= pairs
        assert half - MOST_RUNS <= len(lossy) < half


def test_the_seed_draws_them() -> None:
    first, same, other = (copying_examples(TOKENS, 20, seed=seed) for seed in (3, 3, 4))
    assert all((a.token_ids == b.token_ids).all() and a.id == b.id for a, b in zip(first, same, strict=True))
    assert any(len(a.token_ids) != len(b.token_ids) or (a.token_ids != b.token_ids).any()
               for a, b in zip(first, other, strict=True))  # fmt: skip


def test_tokens_that_never_occur_and_control_tokens_are_not_copied() -> None:
    example = Example("one", np.array([4, 0, 1, 4], np.int32), np.ones(4, np.float32), cluster="one")
    assert plain_tokens({"tokenizer.ggml.token_type": [3, 1, 1, 3, 1]}, [example]).tolist() == [1, 4]
