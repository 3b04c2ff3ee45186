"""NF4 as bitsandbytes stores it: 4-bit codes of a fixed table, a scale for 64 weights, the scales quantized once more.

Two weights a byte, the first in the high half; a block's scale is its largest magnitude. With double quantization a
scale is an 8-bit code of another table (in the file) times one float for 256 scales, plus the mean of all scales.
Everything is multiplied in float32 and then rounded to the type that the checkpoint had, as bitsandbytes does, bit for
bit. Which tensors of a checkpoint belong together is `hf_quantized.py`'s business. QLoRA: arXiv 2305.14314, appendix E.
"""

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from quant.formats import GGMLType

# fmt: off
CODE_BOOK = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
], np.float32)
# fmt: on
_ZERO = np.uint8(7)
_MIDDLES = (CODE_BOOK[1:] + CODE_BOOK[:-1]) / np.float32(2)
_DTYPES = {"float32": GGMLType.F32, "float16": GGMLType.F16, "bfloat16": GGMLType.BF16}
_MAX_BLOCK = 4096  # bitsandbytes' largest


@dataclass(frozen=True)
class NF4State:
    """What `weight.quant_state.bitsandbytes__nf4` says."""

    dtype: GGMLType
    """Of the checkpoint before it was quantized: values are rounded to it."""
    shape: tuple[int, ...]
    block: int
    nested_block: int | None
    """Scales that share a second scale; None without double quantization."""
    nested_offset: float

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_blocks(self) -> int:
        return -(-self.num_elements // self.block)


def read_state(data: bytes) -> NF4State:
    """From the JSON text. Raises ValueError naming the key."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its quant_state is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError("its quant_state is not a JSON object")
    if values.get("quant_type") != "nf4":
        raise ValueError(f"quant_type {values.get('quant_type')!r} is not supported (accepted: nf4)")
    shape, dtype = values.get("shape"), values.get("dtype")
    if not isinstance(shape, list) or not shape or not all(_is_size(size, 2**31) for size in shape):
        raise ValueError(f"shape {shape!r} of its quant_state is not a list of sizes")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype {dtype!r} of its quant_state is not supported (accepted: {', '.join(_DTYPES)})")
    nested = values.get("nested_blocksize")
    for key, size in (("blocksize", values.get("blocksize")), ("nested_blocksize", nested)):
        if not _is_size(size, _MAX_BLOCK) and not (key == "nested_blocksize" and size is None):
            raise ValueError(f"{key} {size!r} of its quant_state is not a whole number of 1 to {_MAX_BLOCK}")
    offset = values.get("nested_offset", 0.0)
    if type(offset) not in (int, float) or not math.isfinite(offset):
        raise ValueError(f"nested_offset {offset!r} of its quant_state is not a finite number")
    return NF4State(_DTYPES[dtype], tuple(shape), values["blocksize"], nested, float(offset))


def _is_size(value: Any, largest: int) -> bool:
    return type(value) is int and 1 <= value <= largest


def scales(state: NF4State, absmax: np.ndarray, nested_absmax: np.ndarray, nested_map: np.ndarray) -> np.ndarray:
    """Each block's scale, float32: `absmax` itself, or decoded where it is 8-bit codes."""
    if state.nested_block is None:
        result = absmax
    else:
        result = nested_map[absmax] * np.repeat(nested_absmax, state.nested_block)[: state.num_blocks]
        result += np.float32(state.nested_offset)
    if not np.isfinite(result).all():
        raise ValueError("a scale is not finite")
    return result


def dequantize(state: NF4State, packed: np.ndarray, block_scales: np.ndarray) -> np.ndarray:
    """Codes (uint8, two a byte) as float32, flat, before they are rounded to `state.dtype`."""
    codes = np.empty(packed.size * 2, np.uint8)
    codes[::2], codes[1::2] = packed >> 4, packed & 15
    values = CODE_BOOK[codes[: state.num_elements]]
    whole = state.num_elements // state.block
    head = values[: whole * state.block].reshape(whole, state.block)
    head *= block_scales[:whole, None]
    values[whole * state.block :] *= block_scales[whole:]  # none, or the last and shorter block's
    return values


def quantize(values: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """float32 to packed codes and scales without double quantization. A block of zeros has the scale 0."""
    flat = values.reshape(-1)
    if not np.isfinite(flat).all():
        raise ValueError("it holds a value that is not finite")
    padded = np.zeros(-(-flat.size // block) * block, np.float32)
    padded[: flat.size] = flat
    blocks = padded.reshape(-1, block)
    absmax = np.abs(blocks).max(axis=1)
    inverse = np.divide(np.float32(1), absmax, out=np.zeros_like(absmax), where=absmax > 0)
    codes = np.searchsorted(_MIDDLES, (blocks * inverse[:, None]).reshape(-1)[: flat.size]).astype(np.uint8)
    if codes.size % 2:
        codes = np.append(codes, _ZERO)
    return codes[::2] << 4 | codes[1::2], absmax
