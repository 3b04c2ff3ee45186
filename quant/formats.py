"""The GGUF tensor types that Sterna reads, and the size of their blocks.

A quantized row is a run of whole blocks, each holding `elements` weights in `bytes` bytes; the layouts are those of
ggml (ggml-common.h) and the numbers are GGUF's. How the blocks are unpacked is the kernels' business, not ours.
"""

from enum import IntEnum


class GGMLType(IntEnum):
    """A tensor type; values are the numbers in a GGUF file."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35


BLOCK: dict[GGMLType, tuple[int, int]] = {
    GGMLType.F32: (1, 4),
    GGMLType.F16: (1, 2),
    GGMLType.BF16: (1, 2),
    GGMLType.Q4_0: (32, 18),  # f16 scale, 32 nibbles
    GGMLType.Q4_1: (32, 20),  # f16 scale and minimum, 32 nibbles
    GGMLType.Q5_0: (32, 22),  # f16 scale, 32 high bits, 32 nibbles
    GGMLType.Q5_1: (32, 24),  # f16 scale and minimum, 32 high bits, 32 nibbles
    GGMLType.Q8_0: (32, 34),  # f16 scale, 32 int8
    GGMLType.Q4_K: (256, 144),  # f16 scale and minimum, 8 x (6 + 6) bits, 256 nibbles
    GGMLType.Q5_K: (256, 176),  # as Q4_K with 256 high bits
    GGMLType.Q6_K: (256, 210),  # 256 x (4 + 2) bits, 16 int8 scales, f16 scale
    GGMLType.TQ1_0: (256, 54),  # base 3, five weights a byte (the last 16 four a byte), f16 scale
    GGMLType.TQ2_0: (256, 66),  # two bits a weight, f16 scale
}
"""(elements, bytes) of one block."""

I2_S = 36
"""bitnet.cpp's ternary type: read, and served as another one (bitnet_import.py). No type of ggml's has this number."""

WRITABLE = (
    GGMLType.F32,
    GGMLType.F16,
    GGMLType.BF16,
    GGMLType.Q8_0,
    GGMLType.Q4_0,
    GGMLType.Q4_1,
    GGMLType.TQ1_0,
    GGMLType.TQ2_0,
)
"""The types that we also write (quantize.py)."""

UNSUPPORTED_NAMES: dict[int, str] = {
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    39: "MXFP4",
    40: "NVFP4",
    41: "Q1_0",
}
"""Types that exist but are not read, so that a refusal can name them."""


def row_bytes(type_: GGMLType, columns: int) -> int:
    """Bytes of one row; `columns` must be a multiple of the type's block."""
    elements, size = BLOCK[type_]
    assert columns % elements == 0, (type_, columns)
    return columns // elements * size
