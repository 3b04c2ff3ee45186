"""Packing: the panels hold exactly the values that the `gguf` package reads from the same blocks."""

import gguf
import numpy as np
import pytest

import _sterna
from quant.formats import BLOCK, GGMLType
from tests.quant.kernel_data import matrix, random_blocks, reference


@pytest.mark.parametrize("kind", list(GGMLType), ids=lambda k: k.name)
@pytest.mark.parametrize("rows", [1, 16, 37])
def test_round_trip_is_exact(kind: GGMLType, rows: int) -> None:
    cols = 512
    data = random_blocks(kind, rows, cols, seed=rows)
    got = matrix(kind, data, rows, cols).to_float()
    # d * q + m is rounded as in the twin: equal to the last bit or two
    np.testing.assert_allclose(got, reference(kind, data, rows, cols), rtol=3e-7, atol=1e-9)


def test_row_map_permutes_rows() -> None:
    data = random_blocks(GGMLType.Q8_0, 20, 64)
    order = np.random.default_rng(0).permutation(20).astype(np.int32)
    got = _sterna.Matrix(int(GGMLType.Q8_0), data, 20, 64, order).to_float()
    np.testing.assert_allclose(got, reference(GGMLType.Q8_0, data, 20, 64)[order], rtol=3e-7)


@pytest.mark.parametrize("kind", list(GGMLType), ids=lambda k: k.name)
def test_non_finite_scales_are_refused(kind: GGMLType) -> None:
    elements, size = BLOCK[kind]
    data = random_blocks(kind, 16, 256)
    if elements == 1:
        data[size - 2 : size] = [0x80, 0x7F] if kind != GGMLType.F16 else [0x00, 0x7C]
    else:
        at = {GGMLType.Q6_K: 208, GGMLType.TQ1_0: 52, GGMLType.TQ2_0: 64}.get(kind, 0)
        data[at : at + 2] = np.array([np.inf], np.float16).view(np.uint8)
    with pytest.raises(ValueError, match="not finite"):
        matrix(kind, data, 16, 256)


def test_wrong_sizes_are_refused() -> None:
    data = random_blocks(GGMLType.Q4_0, 16, 64)
    with pytest.raises(ValueError, match="bytes instead of"):
        matrix(GGMLType.Q4_0, data[:-1].copy(), 16, 64)
    with pytest.raises(ValueError, match="blocks of 32"):
        matrix(GGMLType.Q4_0, data, 16, 65)
    with pytest.raises(ValueError, match="not supported"):
        _sterna.Matrix(10, data, 16, 64)


def test_python_and_core_agree_on_types() -> None:
    """The Python table of block sizes and the core's are one: packing accepts exactly BLOCK's byte counts."""
    for kind, (elements, size) in BLOCK.items():
        rows, cols = 3, 256
        assert len(random_blocks(kind, rows, cols)) == rows * cols // elements * size
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(int(kind))] == (elements, size)
