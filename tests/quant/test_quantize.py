"""Our quantizer against `gguf.quants`, byte for byte."""

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quant.formats import BLOCK, WRITABLE, GGMLType
from quant.quantize import dequantize, quantize, to_float32
from tests.tiny_models import bfloat16_bits, random_blocks

TARGETS = [GGMLType.Q8_0, GGMLType.Q4_0, GGMLType.Q4_1]
FLOATS = [GGMLType.F32, GGMLType.F16, GGMLType.BF16]


def twin(values: np.ndarray, target: GGMLType) -> np.ndarray:
    return gguf.quants.quantize(values, gguf.GGMLQuantizationType(int(target))).reshape(-1)


def raw(values: np.ndarray) -> np.ndarray:
    return values.reshape(-1).view(np.uint8)


def hard_rows() -> np.ndarray:
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((16, 96)).astype(np.float32)
    rows[0] = 0
    rows[1, ::2], rows[1, 1::2] = 1, -1  # ties of +x and -x, either first
    rows[2] = -rows[1]
    rows[3] = np.arange(96) * 0.5 % 64  # halves, to be rounded away from zero
    rows[3, ::32] = 127
    rows[4] = -rows[3]
    rows[5] *= 1e4
    rows[6] *= 1e-6
    rows[7, 5] = 1e4  # an outlier flattens its block
    rows[8] = np.nextafter(np.float32(0.5), np.float32(0))  # floor(x + 0.5) would round up
    rows[8, ::32] = 127
    rows[9] = -0.0
    return rows


@pytest.mark.parametrize("target", TARGETS)
def test_hard_rows_equal_gguf(target: GGMLType) -> None:
    rows = hard_rows()
    assert np.array_equal(quantize(raw(rows), GGMLType.F32, target), twin(rows, target))


@pytest.mark.parametrize("target", TARGETS)
def test_more_than_one_slice_equals_gguf(target: GGMLType) -> None:
    rows = np.random.default_rng(0).standard_normal((700, 192)).astype(np.float32)
    assert np.array_equal(quantize(raw(rows), GGMLType.F32, target), twin(rows, target))


@pytest.mark.parametrize("target", TARGETS)
def test_16_bit_sources_equal_gguf(target: GGMLType) -> None:
    rows = hard_rows()
    half = rows.astype(np.float16)
    assert np.array_equal(quantize(raw(half), GGMLType.F16, target), twin(half.astype(np.float32), target))
    brain = bfloat16_bits(rows)
    wide = to_float32(raw(brain), GGMLType.BF16).reshape(rows.shape)
    assert np.array_equal(quantize(raw(brain), GGMLType.BF16, target), twin(wide, target))


ROWS = hnp.arrays(np.float32, (2, 32), elements=st.floats(-60000, 60000, width=32, allow_subnormal=False))


@settings(max_examples=200, deadline=None)
@given(rows=ROWS, target=st.sampled_from(TARGETS))
def test_any_row_equals_gguf(rows: np.ndarray, target: GGMLType) -> None:
    rows = np.where(np.abs(rows) < 1e-30, np.float32(0), rows)  # below, the twin divides by a subnormal
    assert np.array_equal(quantize(raw(rows), GGMLType.F32, target), twin(rows, target))


@pytest.mark.parametrize("target", TARGETS)
def test_values_without_an_inverse_scale_become_zero(target: GGMLType) -> None:
    rows = np.full((1, 32), 1e-40, np.float32)
    blocks = quantize(raw(rows), GGMLType.F32, target)
    assert not gguf.quants.dequantize(blocks.reshape(1, -1), gguf.GGMLQuantizationType(int(target))).any()


@pytest.mark.parametrize("target", FLOATS)
def test_float_types_equal_gguf(target: GGMLType) -> None:
    rows = np.concatenate([hard_rows(), np.random.default_rng(0).standard_normal((700, 96)).astype(np.float32)])
    ours = quantize(raw(rows), GGMLType.F32, target)
    assert np.array_equal(ours, twin(rows, target).view(np.uint8))
    assert np.array_equal(dequantize(ours, target), to_float32(ours, target))


@pytest.mark.parametrize("source", list(GGMLType))
@pytest.mark.parametrize("target", WRITABLE)
def test_every_type_can_be_written_anew(source: GGMLType, target: GGMLType) -> None:
    if source in WRITABLE:
        values = np.random.default_rng(0).standard_normal((2, 1024)).astype(np.float32)
        data = quantize(raw(values), GGMLType.F32, source)
    elif source in (GGMLType.Q5_0, GGMLType.Q5_1):
        values = np.random.default_rng(0).standard_normal((2, 1024)).astype(np.float32)
        data = twin(values, source)
    else:
        data = random_blocks(source, (2, 1024), np.random.default_rng(0)).reshape(-1)
    number = gguf.GGMLQuantizationType(int(source))
    wide = gguf.quants.dequantize(data.reshape(-1, BLOCK[source][1]), number).reshape(-1)
    assert np.array_equal(dequantize(data, source), wide)
    assert np.array_equal(quantize(data, source, target), quantize(raw(wide), GGMLType.F32, target))


@pytest.mark.parametrize("target", [*TARGETS, GGMLType.F16, GGMLType.BF16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3.4e38])
def test_values_that_do_not_fit_are_refused(target: GGMLType, value: float) -> None:
    rows = np.ones((2, 64), np.float32)
    rows[1, 40] = value
    with pytest.raises(ValueError, match="not finite or too large"):
        quantize(raw(rows), GGMLType.F32, target)
