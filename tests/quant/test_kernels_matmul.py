"""Every quantized and float matmul kernel against NumPy, on each ISA of this machine.

The reference multiplies the dequantized weights by the *dequantized int8 activations*, so that what is left is
float32 rounding; how far int8 activations are from float ones is checked against the bound of their step size.
"""

import numpy as np
import pytest

import _sterna
from quant.formats import BLOCK, GGMLType
from tests.quant.kernel_data import FLOAT, ISAS, QUANTIZED, matrix, random_blocks, reference

SHAPES = [(16, 256), (48, 512), (50, 768), (1, 256), (17, 2304)]
SHAPES_32 = [(20, 576), (33, 32), (16, 96)]  # 576 is the default model's width: no multiple of 256


def int8_activations(x: np.ndarray, isa: str) -> np.ndarray:
    q, d = _sterna.quantize_activations(x, isa)
    return (q.reshape(*d.shape, 32) * d[..., None]).reshape(x.shape)


def groups_of(isa: str) -> list[int]:
    return [1, 4, 8] if isa == "avx512" else [1, 4]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda k: k.name)
def test_matches_numpy(kind: GGMLType, isa: str) -> None:
    shapes = SHAPES + (SHAPES_32 if BLOCK[kind][0] == 32 else [])
    for rows, cols in shapes:
        data = random_blocks(kind, rows, cols, seed=rows)
        weights = reference(kind, data, rows, cols)
        x = np.random.default_rng(1).standard_normal((11, cols)).astype(np.float32)
        expected = int8_activations(x, isa).astype(np.float64) @ weights.T.astype(np.float64)
        # float32 accumulation of cols/32 block sums: a few ulp of the sum of magnitudes (offsets folded in)
        bound = 4e-6 * (np.abs(x) @ np.abs(weights).T + np.abs(x).sum(1, keepdims=True) * np.abs(weights).max())
        for group in groups_of(isa):
            got = matrix(kind, data, rows, cols).matmul(x, isa, group)[:, :rows]
            assert np.all(np.abs(got - expected) <= bound + 1e-6), (kind.name, isa, rows, cols, group)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", FLOAT, ids=lambda k: k.name)
def test_float_weights_match_numpy(kind: GGMLType, isa: str) -> None:
    for rows, cols in [(16, 64), (35, 50), (130, 7)]:
        data = random_blocks(kind, rows, cols, seed=3)
        weights = reference(kind, data, rows, cols)
        x = np.random.default_rng(2).standard_normal((9, cols)).astype(np.float32)
        got = matrix(kind, data, rows, cols).matmul(x, isa)[:, :rows]
        np.testing.assert_allclose(got, x.astype(np.float64) @ weights.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda k: k.name)
@pytest.mark.parametrize("fill", [0x00, 0x7F, 0x80, 0xFF, 0x55, 0xAA])
def test_saturating_values(kind: GGMLType, fill: int, isa: str) -> None:
    """Extreme quants against activations of exactly +-127 steps: 16-bit intermediates must not saturate."""
    rows, cols = 16, 512
    data = random_blocks(kind, rows, cols, fill=fill)
    weights = reference(kind, data, rows, cols).astype(np.float64)
    for signs in (np.ones(cols), -np.ones(cols), np.where(np.arange(cols) % 2, 1, -1)):
        x = np.repeat((signs * 127.0).astype(np.float32)[None], 4, 0)
        expected = x.astype(np.float64) @ weights.T
        bound = 1e-5 * (np.abs(x) @ np.abs(weights).T) + 1e-5 * 127 * cols * np.abs(weights).max() + 1e-6
        for group in groups_of(isa):
            got = matrix(kind, data, rows, cols).matmul(x, isa, group)
            assert np.all(np.abs(got - expected) <= bound)


@pytest.mark.parametrize("isa", ISAS)
def test_zero_blocks_and_outliers(isa: str) -> None:
    kind, rows, cols = GGMLType.Q4_1, 32, 576
    data = random_blocks(kind, rows, cols)
    weights = reference(kind, data, rows, cols)
    x = np.random.default_rng(5).standard_normal((3, cols)).astype(np.float32)
    x[0, 64:160] = 0  # whole blocks of zeros: scale 0, not NaN
    x[1] = 0
    x[2, 100] = 1e4  # an outlier must only cost its own block's precision
    got = matrix(kind, data, rows, cols).matmul(x, isa, 4)[:, :rows]
    assert np.all(got[1] == 0)
    step = np.repeat(np.abs(x.reshape(3, -1, 32)).max(-1) / 127, 32, axis=1)
    bound = (0.51 * step) @ np.abs(weights).T + 1e-4 * (np.abs(x) @ np.abs(weights).T) + 1e-5
    assert np.all(np.abs(got - x @ weights.T) <= bound)


@pytest.mark.parametrize("isa", ISAS)
def test_activation_rounding_is_half_a_step(isa: str) -> None:
    x = np.random.default_rng(7).standard_normal((5, 576)).astype(np.float32) * 10
    q, d = _sterna.quantize_activations(x, isa)
    assert np.abs(q).max() == 127
    blocks = x.reshape(5, -1, 32)
    np.testing.assert_allclose(d, np.abs(blocks).max(-1) / 127, rtol=1e-6)
    error = np.abs(q.reshape(blocks.shape) * d[..., None] - blocks)
    assert np.all(error <= 0.5001 * d[..., None])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", [*QUANTIZED, *FLOAT], ids=lambda k: k.name)
def test_rows_do_not_depend_on_their_neighbours(kind: GGMLType, isa: str) -> None:
    """Bit for bit: the same row alone, in any batch size and in any activation group."""
    rows, cols = 80, 768
    m = matrix(kind, random_blocks(kind, rows, cols), rows, cols)
    x = np.random.default_rng(9).standard_normal((23, cols)).astype(np.float32)
    alone = np.concatenate([m.matmul(x[i : i + 1], isa, 1) for i in range(len(x))])
    for group in groups_of(isa):
        for count in (1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 23):
            assert np.array_equal(m.matmul(x[:count].copy(), isa, group), alone[:count])
