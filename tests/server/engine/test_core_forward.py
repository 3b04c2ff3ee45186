"""The C++ forward pass against its NumPy twin, and the promise that a row never depends on the batch around it."""

from dataclasses import replace

import numpy as np
import pytest

import _sterna
from quant.formats import GGMLType
from tests.server.engine.core_twin import Shape, Twin, assert_close, i32, run

ISAS = _sterna.available_isas()


SHAPES = {
    "llama": Shape(),
    "qwen2-bias": Shape(qkv_bias=True),
    "qwen3-norm": Shape(qk_norm=True, head_dim=32, rope_dim=32),
    "odd-head-dim": Shape(head_dim=24, rope_dim=24, heads=3, kv_heads=1),
    "wide-head": Shape(head_dim=80, rope_dim=80, heads=2, kv_heads=2),
    "partial-rope": Shape(rope_dim=8),
    "rope-factors": Shape(rope_factors=tuple(1.0 + 0.5 * i for i in range(8))),
    "odd-hidden": Shape(hidden=50, ffn=70, head_dim=16),
    "bitnet": Shape(sub_norms=True, squared_relu=True, row_scales=True),
    "bitnet-silu-odd-head-dim": Shape(sub_norms=True, head_dim=24, rope_dim=24, heads=3, kv_heads=1),
    "two-streams": Shape(two_streams=True),
    "odd-all": Shape(hidden=50, ffn=70, sub_norms=True, squared_relu=True, two_streams=True, qkv_bias=True),
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", SHAPES)
def test_float_model_equals_the_twin(name: str, isa: str) -> None:
    twin = Twin(SHAPES[name])
    ids = np.random.default_rng(1).integers(0, 101, 200).astype(np.int32)
    got = run(twin.core(isa=isa), [(ids, 0, range(3, 16), -1)])[0]
    assert_close(got, twin.logits(ids))
    assert np.mean(got.argmax(1) == twin.logits(ids).argmax(1)) >= 0.99


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", [GGMLType.Q4_0, GGMLType.Q4_1, GGMLType.Q5_1, GGMLType.Q8_0], ids=lambda k: k.name)
def test_quantized_model_stays_near_the_twin(kind: GGMLType, isa: str) -> None:
    twin = Twin(Shape(), kind)
    ids = np.random.default_rng(1).integers(0, 101, 60).astype(np.int32)
    got, expected = run(twin.core(isa=isa), [(ids, 0, range(4), -1)])[0], twin.logits(ids)
    # int8 activations: half a step of 1/127 of a block's largest value, over seven matmuls a layer
    assert np.corrcoef(got.ravel(), expected.ravel())[0, 1] > 0.9995
    assert np.abs(got - expected).max() < 0.12 * expected.std() + 0.05 * np.abs(expected).max()


TERNARY = {"hidden": 256, "ffn": 512, "head_dim": 64, "rope_dim": 64}  # blocks of 256
BITNET = Shape(**TERNARY, sub_norms=True, squared_relu=True, row_scales=True)


@pytest.mark.parametrize("isa", ISAS)
def test_activations_of_a_ternary_bitnet_have_one_scale_a_row(isa: str) -> None:
    """The twin rounds activations as transformers' BitNet does. The cache puts some of them on the other side of a
    rounding boundary: that is 0.024 of the spread, two thirds of the distance that scales per 32 values have."""
    twin = Twin(BITNET, GGMLType.TQ2_0)
    ids = np.random.default_rng(1).integers(0, 101, 60).astype(np.int32)
    expected = twin.logits(ids)
    blocks = Twin(replace(BITNET, row_scales=False), GGMLType.TQ2_0)
    near, far = (
        np.sqrt(np.square(run(one.core(isa=isa), [(ids, 0, range(4), -1)])[0] - expected).mean()) / expected.std()
        for one in (twin, blocks)
    )
    assert near < 0.03
    assert far > 1.2 * near


@pytest.mark.parametrize("isa", ISAS)
def test_one_scale_a_row(isa: str) -> None:
    x = np.random.default_rng(1).standard_normal((5, 96)).astype(np.float32)
    values, scales = _sterna.quantize_activations(x, isa, one_scale=True)
    largest = np.abs(x).max(1, keepdims=True)
    np.testing.assert_allclose(scales, np.repeat(largest / 127, 3, 1), rtol=1e-6)
    np.testing.assert_array_equal(values, np.round(x * (np.float32(127) / largest)))
    assert not _sterna.quantize_activations(np.zeros((2, 96), np.float32), isa, one_scale=True)[0].any()


@pytest.mark.parametrize("isa", ISAS)
def test_two_streams_that_mix_evenly_are_the_plain_network(isa: str) -> None:
    """With the mean read and every output added to both, the mean of the streams is the plain residual."""
    mixed, plain = Twin(Shape(two_streams=True)), Twin(Shape())
    for i in range(mixed.shape.layers):
        mixed.weights["streams", i] = np.array([0.7, 0.5, 0.5, 1, 1, -3, 0.5, 0.5, 1, 1], np.float32)
    plain.weights = {key: values for key, values in mixed.weights.items() if key[0] != "streams"}
    plain.blocks = mixed.blocks
    ids = np.random.default_rng(1).integers(0, 101, 60).astype(np.int32)
    got, expected = (run(twin.core(isa=isa), [(ids, 0, range(4), -1)])[0] for twin in (mixed, plain))
    assert np.abs(got - expected).max() < 1e-4 * expected.std()


INVARIANT = {
    "float": (Shape(), GGMLType.F32),
    "Q4_1": (Shape(), GGMLType.Q4_1),
    "streams": (Shape(two_streams=True), GGMLType.Q4_1),
    "bitnet": (replace(BITNET, two_streams=True), GGMLType.TQ2_0),
    # down's activations are more than a core's cache holds: rows by blocks of 40, pieces of work across their ends
    "wide": (Shape(layers=1, hidden=96, ffn=8192), GGMLType.Q8_0),
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", INVARIANT)
def test_bits_do_not_depend_on_chunks_threads_or_neighbours(name: str, isa: str) -> None:
    twin = Twin(*INVARIANT[name])
    rng = np.random.default_rng(2)
    ids = rng.integers(0, 101, 170).astype(np.int32)
    whole = run(twin.core(isa=isa), [(ids, 0, range(11), -1)])[0]
    for threads in (2, 3):
        assert np.array_equal(run(twin.core(isa=isa, threads=threads), [(ids, 0, range(11), -1)])[0], whole)
    core = twin.core(isa=isa, threads=2)
    for chunks in ([1] * 170, [7, 60, 3, 100], [16] * 10 + [10], [129, 41]):
        parts, at = [], 0
        for n in chunks:
            neighbours = [
                (rng.integers(0, 101, int(rng.integers(1, 20))), 0, [40 + 2 * j, 41 + 2 * j], -1)
                for j in range(int(rng.integers(0, 4)))
            ]
            mine = (ids[at : at + n], at, [30, 2, 17, 5, 9, 12, 1, 33, 8, 21, 35], -1)
            parts.append(run(core, [*neighbours, mine])[-1])
            at += n
        assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "shape", [Shape(), Shape(heads=3, kv_heads=3, head_dim=24, rope_dim=24)], ids=["grouped", "odd"]
)
def test_threads_that_share_long_contexts_give_the_same_bits(shape: Shape, isa: str) -> None:
    """Contexts of more than 512 tokens beside others, by one or a few tokens or as one prompt, on one thread or two."""
    twin = Twin(shape)
    ids = np.random.default_rng(2).integers(0, 101, 660).astype(np.int32)
    one, two = (
        twin.core(isa=isa, threads=threads, num_blocks=128, max_batch_tokens=660, max_logit_rows=660)
        for threads in (1, 2)
    )
    whole = run(one, [(ids, 0, range(42), -1)], width=42)[0]
    assert_close(whole, twin.logits(ids))
    for core in (one, two):
        run(core, [(ids[:650], 0, range(42), -1), (ids[:10], 0, range(50, 92), -1)], width=42)
        at = 650
        for n in (1, 1, 5, 3):  # a token alone, or with drafts
            sequences = [(ids[at : at + n], at, range(42), -1), (ids[10:11], 10, range(50, 92), -1)]
            mine, other = run(core, sequences, width=42)
            assert np.array_equal(mine, whole[at : at + n])
            at += n
            assert np.array_equal(other, whole[10:11])


def test_more_chunks_of_work_than_a_ticket_counts() -> None:
    """1,024 sequences with 64 KV heads are 65,536 tasks of attention, one more than the team's 16 bits hold."""
    twin = Twin(Shape(layers=1, heads=64, kv_heads=64, head_dim=2, rope_dim=2))
    ids = np.arange(1024, dtype=np.int32) % twin.shape.vocab
    limits = {"max_num_seqs": 1024, "max_batch_tokens": 1024, "max_logit_rows": 1024}
    alone, team = (
        run(twin.core(threads=threads, num_blocks=1024, **limits), [(ids[i : i + 1], 0, [i], -1) for i in range(1024)])
        for threads in (1, 2)
    )
    np.testing.assert_array_equal(team, alone)
    np.testing.assert_array_equal(team[0], team[twin.shape.vocab])


def test_a_whole_context_of_masked_garbage_does_not_leak() -> None:
    """A recycled block holds another sequence's keys past the current position: they must not matter."""
    twin = Twin(Shape())
    core = twin.core()
    rng = np.random.default_rng(8)
    ids = rng.integers(0, 101, 5).astype(np.int32)
    clean = run(core, [(ids, 0, [7], -1)])[0]
    run(core, [(rng.integers(0, 101, 16), 0, [9], -1)])
    assert np.array_equal(run(core, [(ids, 0, [9], -1)])[0], clean)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("key", "value"), [(30, 0), (0, 30), (60, 30)])
def test_channels_far_above_the_others_cost_no_accuracy(key: int, value: int, isa: str) -> None:
    """A row of the cache has one scale. Measured: at most 3.1e-4; an f16 cache had 1.8e-3 in the first case."""
    twin = Twin(Shape(qkv_bias=True))
    for layer in range(twin.shape.layers):
        twin.weights["k_bias", layer][[5, 21]] += key  # of both KV heads
        twin.weights["v_bias", layer][[3, 19]] += value
    ids = np.random.default_rng(1).integers(0, 101, 200).astype(np.int32)
    expected = twin.logits(ids)
    error = run(twin.core(isa=isa), [(ids, 0, range(3, 16), -1)])[0] - expected
    assert np.sqrt((error**2).mean()) < 5e-4 * expected.std()


@pytest.mark.parametrize("isa", ISAS)
def test_a_token_that_is_not_finite_spoils_no_other_sequence(isa: str) -> None:
    """Its keys and values stay in the blocks that others get after it, behind their last token."""
    twin = Twin(Shape())
    embedding = twin.blocks["embedding", -1].view(np.float32).reshape(101, -1)
    embedding[:, 3], embedding[100, 3] = 0, 50
    twin.weights["attn_norm", 0][3] = 3e38  # infinite, after the norm, for token 100 alone
    core = twin.core(isa=isa)
    ids = np.random.default_rng(8).integers(0, 100, 40).astype(np.int32)
    expected = run(core, [(ids, 0, [7, 8, 9], -1)])[0]
    assert np.isfinite(expected).all()
    assert not np.isfinite(run(core, [(np.full(48, 100, np.int32), 0, [7, 8, 9], -1)])[0]).any()
    assert np.array_equal(run(core, [(ids, 0, [7, 8, 9], -1)])[0], expected)


def test_bad_batches_are_refused() -> None:
    core = Twin(Shape()).core(num_blocks=4)
    good = (i32(1, 2), i32(0, 2), i32(0), i32(0, 1)[None], i32(-1), i32(1))
    core.forward(*good)
    bad = {
        0: (i32(1, 101), "token id 101"),
        1: (i32(0, 1), "seq_starts"),
        2: (i32(31), "block table"),
        3: (i32(9, 1)[None], "KV block"),
        4: (i32(9), "LoRA"),
        5: (i32(2), "logit row"),
    }
    for at, (value, message) in bad.items():
        arguments = list(good)
        arguments[at] = value
        with pytest.raises(ValueError, match=message):
            core.forward(*arguments)
    with pytest.raises(TypeError):
        core.forward(np.array([1, 2]), *good[1:])  # int64
