"""Rows of weights as the types that we write, bit for bit as ggml's reference and `gguf.quants` make them; and back.

Works on slices small enough for the L2 cache, in place, so that a large model is quantized in one pass over its bytes.
"""

import numpy as np

from quant import ternary
from quant.formats import BLOCK, WRITABLE, GGMLType, row_bytes

_SLICE_ELEMENTS = 65536  # 256 KiB of float32: two of these and the bytes fit a 1 MiB L2
_BLOCK = 32
_NOT_FINITE = "it holds a value that is not finite or too large to quantize"


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


def dequantize(data: np.ndarray, type_: GGMLType) -> np.ndarray:
    """Bytes of whole blocks of any type as float32, exactly."""
    if type_ in _FLOAT_TYPES:
        return to_float32(data, type_)
    blocks = data.reshape(-1, BLOCK[type_][1])
    if type_ in _TERNARY:
        codes, scales = _TERNARY[type_][1](blocks)
        return (codes * scales.astype(np.float32)[:, None]).reshape(-1)
    import gguf  # 0.1 s, and only who asks for an error or writes a quantized file anew needs it

    values: np.ndarray = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(int(type_)))
    return values.reshape(-1)


def quantize(data: np.ndarray, source: GGMLType, target: GGMLType, *, absmean: np.float32 | None = None) -> np.ndarray:
    """Bytes of rows, whole blocks of both types, to the bytes of a type in WRITABLE.

    `absmean`: for TQ1_0 and TQ2_0 the one scale of the tensor (ternary.py), else each block's largest magnitude is its.
    Raises ValueError for a value that is not finite or too large for the type or its f16 scale.
    """
    assert absmean is None or target in _TERNARY, target
    source_elements, source_bytes = BLOCK[source]
    elements, num_bytes = BLOCK[target]
    num_elements = data.size // source_bytes * source_elements
    assert data.size % source_bytes == 0, (data.size, source)
    result = np.empty(row_bytes(target, num_elements), np.uint8)
    blocks = result.reshape(-1, num_bytes)
    for start in range(0, num_elements, _SLICE_ELEMENTS):
        end = min(start + _SLICE_ELEMENTS, num_elements)
        piece = data[start // source_elements * source_bytes : end // source_elements * source_bytes]
        values = dequantize(piece, source).reshape(-1, elements)
        out = blocks[start // elements : end // elements]
        if target in _TERNARY:
            _ternary(values, out, target, absmean)
        else:
            _QUANTIZERS[target](values, out)
    return result


def _ternary(values: np.ndarray, out: np.ndarray, target: GGMLType, absmean: np.float32 | None) -> None:
    if absmean is None:
        codes, scales = ternary.absmax(values)
        scales = scales[:, 0]
    else:
        codes, scales = ternary.absmean(values, absmean), np.full(len(values), absmean)
    _TERNARY[target][0](codes, ternary.half_scales(scales), out)


def _f32(values: np.ndarray, out: np.ndarray) -> None:
    if not np.isfinite(values).all():
        raise ValueError(_NOT_FINITE)
    out[:] = values.view(np.uint8)


def _f16(values: np.ndarray, out: np.ndarray) -> None:
    with np.errstate(over="ignore"):
        halves = values.astype(np.float16)
    if not np.isfinite(halves).all():
        raise ValueError(_NOT_FINITE)
    out[:] = halves.view(np.uint8)


def _bf16(values: np.ndarray, out: np.ndarray) -> None:
    """Rounded to nearest, halves to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = bits + (np.uint32(0x7FFF) + (bits >> 16 & 1))
    if ((rounded & 0x7F800000) == 0x7F800000).any() or not np.isfinite(values).all():
        raise ValueError(_NOT_FINITE)
    out[:] = (rounded >> 16).astype(np.uint16).view(np.uint8)


def _store_scales(scales: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Write the f16 scales and give their float32 inverses (0 for 0)."""
    with np.errstate(over="ignore"):
        halves = scales.astype(np.float16)
    if not np.isfinite(halves).all():
        raise ValueError(_NOT_FINITE)
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


def _q4_1(values: np.ndarray, out: np.ndarray) -> None:
    columns = np.ascontiguousarray(values.T)
    high, low = columns.max(axis=0), columns.min(axis=0)
    with np.errstate(invalid="ignore", over="ignore"):
        inverse = _store_scales((high - low) / np.float32(15), out)
        minima = low.astype(np.float16)
    if not np.isfinite(minima).all():
        raise ValueError(_NOT_FINITE)
    out[:, 2:4] = minima.view(np.uint8).reshape(-1, 2)
    scaled = (values - low[:, None]) * inverse[:, None]
    scaled += np.float32(0.5)
    nibbles = scaled.astype(np.uint8)
    np.minimum(nibbles, 15, out=nibbles)
    np.bitwise_or(nibbles[:, :16], nibbles[:, 16:] << 4, out=out[:, 4:])


_FLOAT_TYPES = (GGMLType.F32, GGMLType.F16, GGMLType.BF16)
_TERNARY = {  # (pack, unpack)
    GGMLType.TQ1_0: (ternary.pack_tq1_0, ternary.unpack_tq1_0),
    GGMLType.TQ2_0: (ternary.pack_tq2_0, ternary.unpack_tq2_0),
}
_QUANTIZERS = {
    GGMLType.F32: _f32,
    GGMLType.F16: _f16,
    GGMLType.BF16: _bf16,
    GGMLType.Q8_0: _q8_0,
    GGMLType.Q4_0: _q4_0,
    GGMLType.Q4_1: _q4_1,
}
assert {*_QUANTIZERS, *_TERNARY} == set(WRITABLE)
