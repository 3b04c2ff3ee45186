"""Quantized blocks of a GGUF tensor taken apart: integer codes and the few numbers that scale them.

    value = scale * (code - offset) + minimum, in float32, as `gguf.quants` computes it bit for bit

Layouts are ggml's (ggml-common.h). Runs once per tensor when a model is opened, in NumPy; what happens at every pass
is `frozen.py`. Float types have no blocks and are not covered.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from quant.formats import BLOCK, GGMLType


@dataclass(frozen=True, eq=False)
class Blocks:
    """`num_bits` bits a code; the other arrays have one row a block and one column a group of equal scale."""

    codes: np.ndarray
    """uint8 (blocks, elements)"""
    num_bits: int
    offset: int
    d: np.ndarray
    """float16 (blocks, 1)"""
    scale: np.ndarray | None
    """int8 (blocks, groups) that d is multiplied by, where the format has it"""
    d_minimum: np.ndarray | None
    """float16 (blocks, 1): the minimum, or what the next one is multiplied by"""
    minimum: np.ndarray | None
    """int8 (blocks, groups)"""


def split_blocks(data: np.ndarray, type_: GGMLType) -> Blocks:
    """`data` are the bytes (uint8) of whole blocks of a quantized type."""
    return _SPLITTERS[type_](data.reshape(-1, BLOCK[type_][1]))


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16)


def _nibbles(qs: np.ndarray, run: int) -> np.ndarray:
    """Runs of `run` bytes: their low nibbles, then their high ones."""
    runs = qs.reshape(len(qs), -1, 1, run)
    return np.concatenate([runs & 15, runs >> 4], axis=2).reshape(len(qs), -1)


def _q4_0(b: np.ndarray) -> Blocks:
    return Blocks(_nibbles(b[:, 2:], 16), 4, 8, _half(b, 0), None, None, None)


def _q4_1(b: np.ndarray) -> Blocks:
    return Blocks(_nibbles(b[:, 4:], 16), 4, 0, _half(b, 0), None, _half(b, 2), None)


def _fifth_bit(qh: np.ndarray) -> np.ndarray:
    return np.unpackbits(qh, axis=1, bitorder="little") << 4


def _q5_0(b: np.ndarray) -> Blocks:
    return Blocks(_nibbles(b[:, 6:], 16) | _fifth_bit(b[:, 2:6]), 5, 16, _half(b, 0), None, None, None)


def _q5_1(b: np.ndarray) -> Blocks:
    return Blocks(_nibbles(b[:, 8:], 16) | _fifth_bit(b[:, 4:8]), 5, 0, _half(b, 0), None, _half(b, 2), None)


def _q8_0(b: np.ndarray) -> Blocks:
    return Blocks(b[:, 2:] ^ 128, 8, 128, _half(b, 0), None, None, None)  # two's complement: x + 128


def _k_scales(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The eight 6-bit scales and minimums of Q4_K and Q5_K, from their 12 bytes."""
    low_scale, low_minimum, high = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scale = np.concatenate([low_scale & 63, (high & 15) | ((low_scale >> 2) & 48)], axis=1)
    minimum = np.concatenate([low_minimum & 63, (high >> 4) | ((low_minimum >> 2) & 48)], axis=1)
    return scale.astype(np.int8), minimum.astype(np.int8)


def _q4_k(b: np.ndarray) -> Blocks:
    scale, minimum = _k_scales(b[:, 4:16])
    return Blocks(_nibbles(b[:, 16:], 32), 4, 0, _half(b, 0), scale, -_half(b, 2), minimum)


def _q5_k(b: np.ndarray) -> Blocks:
    scale, minimum = _k_scales(b[:, 4:16])
    high = (b[:, 16:48, None] >> np.arange(8, dtype=np.uint8)) & 1  # bit g of byte j: element j of group g
    codes = _nibbles(b[:, 48:], 32) | (high.swapaxes(1, 2).reshape(len(b), -1) << 4)
    return Blocks(codes, 5, 0, _half(b, 0), scale, -_half(b, 2), minimum)


def _q6_k(b: np.ndarray) -> Blocks:
    high = (b[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([[0], [2], [4], [6]], np.uint8)) & 3
    codes = _nibbles(b[:, :128], 64) | (high.reshape(len(b), -1) << 4)
    scale = np.ascontiguousarray(b[:, 192:208]).view(np.int8)
    return Blocks(codes, 6, 32, _half(b, 208), scale, None, None)


def _base_three(qs: np.ndarray, run: int, powers: int) -> np.ndarray:
    """The digits of TQ1_0's bytes: in runs of `run` bytes the first digit of each, then the second of each, ..."""
    shifted = qs.reshape(len(qs), -1, 1, run) * np.array([[1], [3], [9], [27], [81]], np.uint8)[:powers]
    return ((shifted.astype(np.uint16) * 3) >> 8).astype(np.uint8).reshape(len(qs), -1)


def _tq1_0(b: np.ndarray) -> Blocks:
    digits = [_base_three(b[:, :32], 32, 5), _base_three(b[:, 32:48], 16, 5), _base_three(b[:, 48:52], 4, 4)]
    return Blocks(np.concatenate(digits, axis=1), 2, 1, _half(b, 52), None, None, None)


def _tq2_0(b: np.ndarray) -> Blocks:
    digits = (b[:, :64].reshape(-1, 2, 1, 32) >> np.array([[0], [2], [4], [6]], np.uint8)) & 3
    return Blocks(digits.reshape(len(b), -1), 2, 1, _half(b, 64), None, None, None)


_SPLITTERS: dict[GGMLType, Callable[[np.ndarray], Blocks]] = {
    GGMLType.Q4_0: _q4_0,
    GGMLType.Q4_1: _q4_1,
    GGMLType.Q5_0: _q5_0,
    GGMLType.Q5_1: _q5_1,
    GGMLType.Q8_0: _q8_0,
    GGMLType.Q4_K: _q4_k,
    GGMLType.Q5_K: _q5_k,
    GGMLType.Q6_K: _q6_k,
    GGMLType.TQ1_0: _tq1_0,
    GGMLType.TQ2_0: _tq2_0,
}
