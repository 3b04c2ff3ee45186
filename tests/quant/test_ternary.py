"""Ternary quantizers and blocks: bit for bit `gguf.quants`', both ways, and transformers' absmean."""

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quant.formats import BLOCK, GGMLType
from quant.quantize import dequantize, quantize
from quant.ternary import (
    absmax,
    absmean,
    absmean_scale,
    half_scales,
    pack_tq1_0,
    pack_tq2_0,
    unpack_tq1_0,
    unpack_tq2_0,
)

TYPES = [GGMLType.TQ1_0, GGMLType.TQ2_0]
PACKING = {GGMLType.TQ1_0: (pack_tq1_0, unpack_tq1_0), GGMLType.TQ2_0: (pack_tq2_0, unpack_tq2_0)}


def number(type_: GGMLType) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType(int(type_))


def raw(values: np.ndarray) -> np.ndarray:
    return values.reshape(-1).view(np.uint8)


def hard_rows() -> np.ndarray:
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((16, 512)).astype(np.float32)
    rows[0] = 0
    rows[1] = np.where(np.arange(512) % 2, 1, -1)
    rows[2] = rng.choice([-0.125, 0, 0.125], 512)
    rows[3, :256] = 0  # a block of zeros before an ordinary one
    rows[4] = 1
    rows[4, 1::2] = 0.5  # ties, away from zero
    rows[5] = -rows[4]
    rows[6] = 3
    rows[6, 1::2] = 1.5  # 1/3 is not exact: the tie is decided by w * (1/s)
    rows[7] = np.nextafter(np.float32(0.5), np.float32(0))
    rows[7, ::256] = 1
    rows[8] *= 1e4
    rows[9] *= 1e-6  # below what f16 holds in full
    rows[10] *= 1e-12  # the f16 scale is 0
    rows[11] = -0.0
    return rows


@pytest.mark.parametrize("type_", TYPES)
def test_hard_rows_and_more_than_one_slice_equal_gguf(type_: GGMLType) -> None:
    for rows in (hard_rows(), np.random.default_rng(0).standard_normal((700, 256)).astype(np.float32)):
        ours = quantize(raw(rows), GGMLType.F32, type_)
        assert np.array_equal(ours, gguf.quants.quantize(rows, number(type_)).reshape(-1))
        assert np.array_equal(dequantize(ours, type_), gguf.quants.dequantize(ours, number(type_)).reshape(-1))


ROWS = hnp.arrays(np.float32, (2, 256), elements=st.floats(-60000, 60000, width=32, allow_subnormal=False))


@settings(max_examples=100, deadline=None)
@given(rows=ROWS, type_=st.sampled_from(TYPES))
def test_any_row_equals_gguf(rows: np.ndarray, type_: GGMLType) -> None:
    rows = np.where(np.abs(rows) < 1e-30, np.float32(0), rows)  # below, the twin divides by a subnormal
    expected = gguf.quants.quantize(rows, number(type_)).reshape(-1)
    assert np.array_equal(quantize(raw(rows), GGMLType.F32, type_), expected)


CODES = hnp.arrays(np.int8, (3, 256), elements=st.integers(-1, 1))
SCALES = hnp.arrays(np.float16, 3, elements=st.floats(0, 60000, width=16))


@settings(max_examples=100, deadline=None)
@given(codes=CODES, scales=SCALES, type_=st.sampled_from(TYPES))
def test_packing_and_back(codes: np.ndarray, scales: np.ndarray, type_: GGMLType) -> None:
    pack, unpack = PACKING[type_]
    blocks = pack(codes, scales)
    assert blocks.shape == (3, BLOCK[type_][1])
    unpacked, back = unpack(blocks)
    assert np.array_equal(unpacked, codes)
    assert np.array_equal(back, scales)
    expected = codes * scales.astype(np.float32)[:, None]
    assert np.array_equal(gguf.quants.dequantize(blocks, number(type_)), expected)


@pytest.mark.parametrize("type_", TYPES)
def test_any_bytes_unpack_as_in_gguf(type_: GGMLType) -> None:
    blocks = np.random.default_rng(1).integers(0, 256, (300, BLOCK[type_][1]), dtype=np.uint8)
    blocks[:, -1] &= 0x3F  # a finite scale
    expected = gguf.quants.dequantize(blocks, number(type_)).reshape(-1)
    assert np.array_equal(dequantize(blocks.reshape(-1), type_), expected)


@pytest.mark.parametrize("group", [64, 128, 256])
def test_groups_have_their_own_scales(group: int) -> None:
    rows = np.random.default_rng(2).standard_normal((5, 768)).astype(np.float32)
    rows[1, :group] = 0
    codes, scales = absmax(rows, group)
    assert scales.shape == (5, 768 // group)
    assert scales[1, 0] == 0
    groups = rows.reshape(5, -1, group)
    assert np.array_equal(scales, np.abs(groups).max(-1))
    nearest = np.abs(groups[..., None] - scales[..., None, None] * np.array([-1, 0, 1])).argmin(-1) - 1
    nearest[1, 0] = 0
    assert np.array_equal(codes.reshape(groups.shape), nearest)


def test_ternary_weights_come_out_of_absmax_as_they_are() -> None:
    codes = np.random.default_rng(4).integers(-1, 2, (8, 256)).astype(np.int8)
    again, scales = absmax(codes * np.float32(0.037))
    assert np.array_equal(again, codes)
    assert (scales == np.float32(0.037)).all()


def test_absmean_is_what_transformers_computes() -> None:
    torch = pytest.importorskip("torch")
    weights = np.random.default_rng(5).standard_normal((32, 256)).astype(np.float32)
    weights[0, :3] = 0, 1e30, -1e30
    weights[1:] *= 1e30 / 31  # magnitudes that float32 sums lose nothing of importance of
    scale = absmean_scale(float(np.abs(weights).sum(dtype=np.float64)), weights.size)
    tensor = torch.from_numpy(weights)
    theirs = 1.0 / tensor.abs().mean().clamp_(min=1e-5)
    assert abs(float(theirs) * float(scale) - 1) < 1e-6
    expected = (tensor * (1 / torch.tensor(scale))).round().clamp(-1, 1).numpy()
    assert np.array_equal(absmean(weights, scale), expected)


def test_absmean_scale_has_a_floor_and_refuses_what_is_not_finite() -> None:
    assert absmean_scale(0.0, 100) == np.float32(1e-5)
    assert not absmean(np.zeros((1, 256), np.float32), absmean_scale(0.0, 256)).any()
    for total in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not finite"):
            absmean_scale(total, 1)


@pytest.mark.parametrize("type_", TYPES)
def test_one_scale_for_the_tensor_in_every_block(type_: GGMLType) -> None:
    rows = np.random.default_rng(6).standard_normal((300, 512)).astype(np.float32)
    scale = absmean_scale(float(np.abs(rows).sum(dtype=np.float64)), rows.size)
    codes, scales = PACKING[type_][1](quantize(raw(rows), GGMLType.F32, type_, absmean=scale).reshape(600, -1))
    assert np.array_equal(codes, absmean(rows, scale).reshape(600, 256))
    assert (scales == np.float16(scale)).all()


@pytest.mark.parametrize("type_", TYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 70000.0])
def test_values_that_do_not_fit_are_refused(type_: GGMLType, value: float) -> None:
    rows = np.ones((2, 512), np.float32)
    rows[1, 300] = value
    with pytest.raises(ValueError, match="not finite"):
        quantize(raw(rows), GGMLType.F32, type_)
    with pytest.raises(ValueError, match="not finite"):
        half_scales(np.array([1e6], np.float32))


def test_odd_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="rows of 100 values in groups of 64"):
        absmax(np.zeros((2, 100), np.float32), 64)
    with pytest.raises(ValueError, match="accepted: 64, 128 or 256"):
        absmax(np.zeros((2, 96), np.float32), 32)


def test_tiny_magnitudes_become_zeros() -> None:
    codes, _ = absmax(np.full((1, 256), 1e-39, np.float32))
    assert not codes.any()
