"""The safetensors file of an adapter, bounds-checked, as raw tensors of the three float types that adapters come in.

Own reading of the bytes, because the safetensors package needs torch for bfloat16. Format: 8 bytes header length
(little-endian), a JSON header {name: {dtype, shape, data_offsets}}, the data.
Source: https://github.com/huggingface/safetensors#format
"""

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from server.engine.core_api import FloatArray
from server.errors import AdapterError

_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True, slots=True)
class RawTensor:
    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    def to_float32(self) -> FloatArray:
        """A copy, C-contiguous."""
        if self.dtype == "BF16":  # the upper half of a float32
            values = (np.frombuffer(self.data, "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.frombuffer(self.data, "<f4" if self.dtype == "F32" else "<f2").astype(np.float32)
        return values.reshape(self.shape)


def read_tensors(data: bytes) -> dict[str, RawTensor]:
    """Every tensor of the file. Raises AdapterError when an entry is malformed or reaches outside of it."""
    if len(data) < 8:
        raise AdapterError("the safetensors file is truncated: it has no header")
    header_bytes = int.from_bytes(data[:8], "little")
    if header_bytes > len(data) - 8:
        raise AdapterError(f"the safetensors file is truncated: its header of {header_bytes} bytes is cut off")
    try:
        header = json.loads(data[8 : 8 + header_bytes])
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"the safetensors header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise AdapterError("the safetensors header must be an object")
    header.pop("__metadata__", None)
    body = memoryview(data)[8 + header_bytes :]
    return {name: _tensor(name, entry, body) for name, entry in header.items()}


def _tensor(name: str, entry: Any, body: memoryview) -> RawTensor:
    if not isinstance(entry, dict):
        raise AdapterError(f"tensor {name}: its header entry is not an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise AdapterError(f"tensor {name} has type {str(dtype)[:40]} (accepted: {', '.join(_ITEM_BYTES)})")
    if not _is_int_list(shape) or not _is_int_list(offsets) or len(offsets) != 2:
        raise AdapterError(f"tensor {name}: shape or data_offsets is not a list of natural numbers")
    start, stop = offsets
    if not start <= stop <= len(body):
        raise AdapterError(f"tensor {name} lies outside the file: bytes {start} to {stop} of {len(body)}")
    if stop - start != math.prod(shape) * _ITEM_BYTES[dtype]:
        raise AdapterError(f"tensor {name} has {stop - start} bytes, which is not what {dtype} {shape} takes")
    return RawTensor(dtype, tuple(shape), body[start:stop])


def _is_int_list(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
