"""Quantize rows of weights to Q8_0 and Q4_0 blocks, bit for bit as ggml's reference and `gguf.quants` do.

Works on slices small enough for the L2 cache, in place, so that a large model is quantized in one pass over its bytes.
"""

import numpy as np

from quant.formats import BLOCK, GGMLType, row_bytes

_SLICE_ELEMENTS = 65536  # 256 KiB of float32: two of these and the bytes fit a 1 MiB L2
_BLOCK = 32


def to_float32(data: np.ndarray, type_: GGMLType) -> np.ndarray:
    """Bytes (uint8) of F32, F16 or BF16 values as float32, exactly."""
    if type_ is GGMLType.F32:
        return data.view(np.float32)
    if type_ is GGMLType.F16:
        return data.view(np.float16).astype(np.float32)
    assert type_ is GGMLType.BF16, type_
    wide = data.view(np.uint16).astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def quantize(data: np.ndarray, source: GGMLType, target: GGMLType) -> np.ndarray:
    """Bytes of F32, F16 or BF16 rows (whole blocks of 32) to the bytes of Q8_0 or Q4_0 blocks.

    Raises ValueError for a value that is not finite or too large for the f16 scale.
    """
    quantize_slice = {GGMLType.Q8_0: _q8_0, GGMLType.Q4_0: _q4_0}[target]
    source_bytes = BLOCK[source][1]
    assert data.size % (_BLOCK * source_bytes) == 0, data.size
    num_elements = data.size // source_bytes
    result = np.empty((num_elements // _BLOCK, BLOCK[target][1]), np.uint8)
    for start in range(0, num_elements, _SLICE_ELEMENTS):
        end = min(start + _SLICE_ELEMENTS, num_elements)
        values = to_float32(data[start * source_bytes : end * source_bytes], source).reshape(-1, _BLOCK)
        quantize_slice(values, result[start // _BLOCK : end // _BLOCK])
    assert result.size == row_bytes(target, num_elements)
    return result.reshape(-1)


def _store_scales(scales: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Write the f16 scales and give their float32 inverses (0 for 0)."""
    with np.errstate(over="ignore"):
        halves = scales.astype(np.float16)
    if not np.isfinite(halves).all():
        raise ValueError("it holds a value that is not finite or too large to quantize")
    out[:, :2] = halves.view(np.uint8).reshape(-1, 2)
    # Scales below 2^-128 have no float32 inverse; their f16 is 0, so is the block's value, whatever the integers.
    usable = np.abs(scales) > np.float32(2.0**-127)
    return np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=usable)


def _q8_0(values: np.ndarray, out: np.ndarray) -> None:
    magnitude = np.abs(values)
    largest = np.ascontiguousarray(magnitude.T).max(axis=0)  # twice as fast as max(axis=1) over rows of 32
    inverse = _store_scales(largest / np.float32(127), out)
    # Round half away from zero. floor(x + 0.5) would be wrong just below a half, hence the fraction by itself.
    magnitude *= inverse[:, None]
    whole = np.floor(magnitude)
    magnitude -= whole
    whole += magnitude >= np.float32(0.5)
    out[:, 2:] = np.copysign(whole, values, out=whole).astype(np.int8).view(np.uint8)


def _q4_0(values: np.ndarray, out: np.ndarray) -> None:
    columns = np.ascontiguousarray(values.T)
    high, low = columns.max(axis=0), columns.min(axis=0)
    extreme = np.where(high > -low, high, low)
    tied = np.flatnonzero(high == -low)  # +x and -x: the one that comes first counts
    if tied.size:
        first = np.abs(values[tied]).argmax(axis=1)
        extreme[tied] = values[tied, first]
    inverse = _store_scales(extreme / np.float32(-8), out)
    scaled = values * inverse[:, None]
    scaled += np.float32(8.5)
    nibbles = scaled.astype(np.uint8)
    np.minimum(nibbles, 15, out=nibbles)
    np.bitwise_or(nibbles[:, :16], nibbles[:, 16:] << 4, out=out[:, 2:])
