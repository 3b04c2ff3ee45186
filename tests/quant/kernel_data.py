"""Random and adversarial GGUF blocks for kernel tests, and their float values by the `gguf` package (the slow twin)."""

import gguf
import numpy as np

import _sterna
from quant.formats import BLOCK, GGMLType

QUANTIZED = [t for t in GGMLType if BLOCK[t][0] > 1]
FLOAT = [GGMLType.F32, GGMLType.F16, GGMLType.BF16]
ISAS = _sterna.available_isas()

_HALVES_AT = {  # byte offsets of the f16 scales in a block
    GGMLType.Q4_0: (0,),
    GGMLType.Q4_1: (0, 2),
    GGMLType.Q5_0: (0,),
    GGMLType.Q5_1: (0, 2),
    GGMLType.Q8_0: (0,),
    GGMLType.Q4_K: (0, 2),
    GGMLType.Q5_K: (0, 2),
    GGMLType.Q6_K: (208,),
    GGMLType.TQ1_0: (52,),
    GGMLType.TQ2_0: (64,),
}


def random_blocks(kind: GGMLType, rows: int, cols: int, seed: int = 0, *, fill: int | None = None) -> np.ndarray:
    """Bytes of a (rows, cols) tensor: every quant value occurs; `fill` sets all quant bytes (saturation tests)."""
    rng = np.random.default_rng(seed)
    elements, size = BLOCK[kind]
    if kind in FLOAT:
        values = rng.standard_normal((rows, cols)).astype(np.float32)
        return gguf.quants.quantize(values, gguf.GGMLQuantizationType(int(kind))).view(np.uint8).reshape(-1)
    blocks = rng.integers(0, 256, size=(rows * cols // elements, size), dtype=np.uint8)
    if fill is not None:
        blocks[:] = fill
    if kind == GGMLType.TQ2_0 and fill is None:  # 2-bit value 3 does not occur in ternary files
        low, high = blocks & 0x55, (blocks >> 1) & 0x55
        blocks = low | ((high & ~low) << 1)
    for at in _HALVES_AT[kind]:
        scale = (rng.standard_normal(len(blocks)) * 0.02).astype(np.float16)
        blocks[:, at : at + 2] = scale.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(-1)


def reference(kind: GGMLType, data: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """float32 (rows, cols)."""
    values = gguf.quants.dequantize(data.reshape(rows, -1), gguf.GGMLQuantizationType(int(kind)))
    return np.asarray(values, dtype=np.float32).reshape(rows, cols)


def matrix(kind: GGMLType, data: np.ndarray, rows: int, cols: int) -> "_sterna.Matrix":
    return _sterna.Matrix(int(kind), data, rows, cols)
