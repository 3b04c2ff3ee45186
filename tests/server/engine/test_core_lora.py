"""Adapters in the C++ forward pass against the NumPy twin: each alone, mixed in a batch, in float32 and in 8 bits."""

import threading

import numpy as np
import pytest

import _sterna
from quant.formats import GGMLType
from server.adapters.store import memory_bytes
from server.engine.lora_types import LoraProjection, LoraWeights
from tests.server.engine.core_twin import PROJECTIONS, Shape, Twin, assert_close, run

ISAS = _sterna.available_isas()


def _random_lora(shape: Shape, rank: int, seed: int, names: tuple[str, ...] = PROJECTIONS) -> dict:
    rng = np.random.default_rng(seed)
    lora = {}
    for layer in range(shape.layers):
        for name in names:
            rows, cols = shape.size(name)
            a = (rng.standard_normal((rank, cols)) / np.sqrt(cols)).astype(np.float32)
            lora[layer, name] = (a, (rng.standard_normal((rows, rank)) * 0.3).astype(np.float32), 0.5)
    return lora


def _load(core: "_sterna.Core", slot: int, lora: dict) -> None:
    packed = core.new_lora()
    for (layer, name), (a, b, scale) in lora.items():
        packed.add(layer, name, a, b, scale)
    core.set_lora(slot, packed)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("rank", "streams"), [(1, False), (16, False), (17, True), (64, False)])
def test_lora_equals_the_twin(rank: int, streams: bool, isa: str) -> None:
    twin = Twin(Shape(two_streams=streams))
    core, lora = twin.core(isa=isa), _random_lora(twin.shape, rank, 5)
    _load(core, 2, lora)
    ids = np.random.default_rng(1).integers(0, 101, 40).astype(np.int32)
    expected = twin.logits(ids, lora)
    assert_close(run(core, [(ids, 0, range(3), 2)])[0], expected)
    assert np.abs(expected - twin.logits(ids)).max() > 1  # the adapter does something


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rank", [1, 8, 16, 17, 33, 48, 49, 64])
def test_lora_in_eight_bits_costs_what_its_rounding_costs(rank: int, isa: str) -> None:
    """Beside quantized weights the factors are 8-bit: measured 2.5 to 5.3 % of the logits' spread with adapters that
    move them by 0.4 to 1.3 times it, where 8-bit activations alone cost 2.4 %. A panel or half block out of place would
    be the size of the adapter's effect."""
    twin = Twin(Shape(), GGMLType.Q8_0)
    core, lora = twin.core(isa=isa), _random_lora(twin.shape, rank, 5)
    _load(core, 1, lora)
    ids = np.random.default_rng(1).integers(0, 101, 40).astype(np.int32)
    without = twin.logits(ids)
    plain_error = np.square(run(core, [(ids, 0, range(3), -1)])[0] - without).mean() ** 0.5
    expected = twin.logits(ids, lora)
    error = np.square(run(core, [(ids, 0, range(3), 1)])[0] - expected).mean() ** 0.5
    assert np.square(expected - without).mean() ** 0.5 > 10 * plain_error
    assert error < 3 * plain_error


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e-3, 1e6])
def test_the_size_of_lora_factors_does_not_matter_in_eight_bits(size: float, isa: str) -> None:
    """Their f16 scales would be lost below 1e-7 and rough below 1e-2; trained B's are about 1e-3."""
    twin = Twin(Shape(), GGMLType.Q8_0)
    core, lora = twin.core(isa=isa), _random_lora(twin.shape, 8, 5)
    _load(core, 0, lora)
    _load(core, 1, {key: (a, b * np.float32(size), scale / size) for key, (a, b, scale) in lora.items()})
    ids = np.random.default_rng(1).integers(0, 101, 20).astype(np.int32)
    one, other = (run(core, [(ids, 0, range(2), slot)])[0] for slot in (0, 1))
    assert np.square(one - other).mean() ** 0.5 < 0.03 * one.std()


def test_isas_agree_on_lora_in_eight_bits() -> None:
    """The integer sums are equal; the order of float sums is not, and puts a few activations on the other side of a
    rounding boundary."""
    twin = Twin(Shape(), GGMLType.Q8_0)
    ids = np.random.default_rng(1).integers(0, 101, 40).astype(np.int32)
    got = []
    for isa in ISAS:
        core = twin.core(isa=isa)
        _load(core, 0, _random_lora(twin.shape, 24, 5))
        got.append(run(core, [(ids, 0, range(3), 0)])[0])
    for one in got[:-1]:
        assert np.square(one - got[-1]).mean() ** 0.5 < 0.02 * got[-1].std()


def test_the_bytes_of_a_lora_are_those_that_the_registry_counts() -> None:
    for kind in (GGMLType.F32, GGMLType.Q8_0):
        twin = Twin(Shape(), kind)
        for rank in (1, 16, 24, 40):
            lora = _random_lora(twin.shape, rank, 1)
            packed = twin.core().new_lora()
            for (layer, name), (a, b, scale) in lora.items():
                packed.add(layer, name, a, b, scale)
            parts = tuple(LoraProjection(layer, name, *values) for (layer, name), values in lora.items())
            counted = memory_bytes(LoraWeights(rank, parts, "digest"), is_float=kind == GGMLType.F32)
            assert packed.num_bytes == counted


def test_lora_factors_that_are_not_finite_are_refused() -> None:
    one, bad = np.ones((1, 64), np.float32), np.full((1, 64), np.inf, np.float32)
    for kind in (GGMLType.F32, GGMLType.Q8_0):
        lora = Twin(Shape(), kind).core().new_lora()
        for a, b in ((bad, one), (one, bad), (one * np.nan, one)):
            with pytest.raises(ValueError, match="not finite"):
                lora.add(0, "q_proj", a, b.T.copy(), 1.0)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_lora_on_one_projection(projection: str) -> None:
    twin = Twin(Shape())
    core, lora = twin.core(), _random_lora(twin.shape, 8, 6, (projection,))
    _load(core, 0, lora)
    ids = np.random.default_rng(1).integers(0, 101, 40).astype(np.int32)
    assert_close(run(core, [(ids, 0, range(3), 0)])[0], twin.logits(ids, lora))


def test_adapters_come_and_go_in_other_slots_while_the_core_steps() -> None:
    twin = Twin(Shape())
    core = twin.core(threads=2)
    _load(core, 1, _random_lora(twin.shape, 8, 1))
    sequences = [(np.arange(40), 0, range(3), 1), (np.arange(9), 0, range(3, 5), -1)]
    expected = run(core, sequences)
    new = _random_lora(twin.shape, 16, 2)
    is_over = threading.Event()

    def load_again_and_again() -> None:
        while not is_over.is_set():
            for slot in (0, 2):
                _load(core, slot, new)
            core.clear_lora(0)

    loader = threading.Thread(target=load_again_and_again)
    loader.start()
    for _ in range(50):
        for got, rows in zip(run(core, sequences), expected, strict=True):
            assert np.array_equal(got, rows)
    is_over.set()
    loader.join()


def test_a_lora_in_a_slot_is_read_only_and_belongs_to_its_core() -> None:
    twin = Twin(Shape())
    core, other = twin.core(), twin.core()
    packed, one = core.new_lora(), np.ones((1, 64), np.float32)
    packed.add(0, "q_proj", one, one.T.copy(), 1.0)
    core.set_lora(1, packed)
    with pytest.raises(ValueError, match="cannot be changed"):
        packed.add(1, "q_proj", one, one.T.copy(), 1.0)
    with pytest.raises(ValueError, match="another model"):
        other.set_lora(1, packed)
    for slot in (-1, 4):
        with pytest.raises(ValueError, match="out of range"):
            core.set_lora(slot, packed)
    for bad in ((2, "q_proj", one, one.T.copy()), (0, "lm_head", one, one.T.copy()), (0, "q_proj", one, one)):
        with pytest.raises(ValueError, match=r"LoRA|rank"):
            core.new_lora().add(*bad, 1.0)


@pytest.mark.parametrize("kind", [GGMLType.F32, GGMLType.Q8_0], ids=lambda k: k.name)
def test_mixed_adapters_in_one_batch_equal_each_alone(kind: GGMLType) -> None:
    twin = Twin(Shape(), kind)
    core = twin.core(threads=2)
    _load(core, 0, _random_lora(twin.shape, 16, 1))
    _load(core, 3, _random_lora(twin.shape, 8, 2, ("q_proj", "down_proj")))
    rng = np.random.default_rng(4)
    sequences = [
        (rng.integers(0, 101, n), 0, [2 * j, 2 * j + 1], slot)
        for j, (n, slot) in enumerate([(5, 0), (1, -1), (17, 3), (9, 0), (3, -1), (20, 3), (1, 0)])
    ]
    together = run(core, sequences)
    for sequence, rows in zip(sequences, together, strict=True):
        assert np.array_equal(run(core, [sequence])[0], rows)
    core.clear_lora(3)
    with pytest.raises(ValueError, match="LoRA slot is empty"):
        run(core, [sequences[2]])
