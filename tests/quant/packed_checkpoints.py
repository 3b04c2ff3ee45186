"""Packed checkpoints for tests: ternary codes as I2_S and as transformers packs them, NF4 as bitsandbytes stores it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from quant import nf4
from tests.tiny_models import bfloat16_bits


def pack_i2_s(codes: np.ndarray, scale: float) -> np.ndarray:
    """One code at a time: within 128, code i is in byte i % 32, in the bits 6 - 2 * (i // 32)."""
    flat = codes.reshape(-1).astype(int) + 1
    data = np.zeros(flat.size // 4 + 32, np.uint8)
    for i, digit in enumerate(flat.tolist()):
        block, j = divmod(i, 128)
        data[32 * block + j % 32] |= digit << 6 - 2 * (j // 32)
    data[flat.size // 4 : flat.size // 4 + 4] = np.frombuffer(np.float32(scale).tobytes(), np.uint8)
    return data


def pack_uint8(codes: np.ndarray) -> np.ndarray:
    """Row r of the result has the rows r, r + rows/4, ... of `codes`, the first in its lowest bits."""
    quarter = len(codes) // 4
    packed = np.zeros((quarter, codes.shape[1]), np.uint8)
    for row, values in enumerate((codes + 1).astype(np.uint8)):
        packed[row % quarter] |= values << 2 * (row // quarter)
    return packed


def nf4_tensors(name: str, values: np.ndarray, dtype: str = "float32", **state: Any) -> dict[str, np.ndarray]:
    """A weight without double quantization and its companions. `state` changes what its quant_state says."""
    codes, absmax = nf4.quantize(values, 64)
    said = {"quant_type": "nf4", "blocksize": 64, "dtype": dtype, "shape": list(values.shape)} | state
    return {
        name: codes.reshape(-1, 1),
        f"{name}.absmax": absmax,
        f"{name}.quant_map": nf4.CODE_BOOK,
        f"{name}.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(said).encode(), np.uint8),
    }


def save_mixed(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Safetensors of float32, float16 and uint8 arrays; uint16 are the bits of bfloat16."""
    codes = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", np.dtype(np.uint8): "U8"}
    codes |= {np.dtype(np.uint16): "BF16"}
    header: dict[str, Any] = {}
    body = b""
    for name, array in tensors.items():
        data = np.ascontiguousarray(array).tobytes()
        offsets = [len(body), len(body) + len(data)]
        header[name] = {"dtype": codes[array.dtype], "shape": list(array.shape), "data_offsets": offsets}
        body += data
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def brain(value: float) -> np.ndarray:
    """One bfloat16, as `save_mixed` takes it."""
    return bfloat16_bits(np.array([value], np.float32))
