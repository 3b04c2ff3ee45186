"""BitNet's ternary tensors as blocks that the kernels serve: bitnet.cpp's I2_S, and transformers' packed uint8.

Both hold codes and one float32 scale for the tensor. A TQ2_0 block has an f16 scale, so every weight of a tensor is off
by the same factor, at most 2^-11 (0.05 %), where one step of the 8-bit activations is 0.4 %; the ternary codes, and so
the integers of every product, are exact. Rows that are no multiple of 256 become Q8_0 with the quants -1, 0 and 1 and
that same scale: exact too, at four times the bytes. Sources: microsoft/BitNet (src/ggml-bitnet-mad.cpp, the layout of
x86, which its published files have; utils/convert-hf-to-gguf-bitnet.py), transformers (integrations/bitnet.py).
"""

from dataclasses import dataclass, field

import numpy as np

from quant.errors import ModelFileError
from quant.formats import BLOCK, GGMLType
from quant.mapping import MappedBytes
from quant.ternary import half_scales, pack_tq2_0

_I2_S_BLOCK = 128
_I2_S_TAIL_BYTES = 32  # the scale, and zeros up to the alignment


def served_type(columns: int) -> GGMLType:
    """The type that ternary rows of so many values get. Raises ValueError where none fits."""
    for type_ in (GGMLType.TQ2_0, GGMLType.Q8_0):
        if columns % BLOCK[type_][0] == 0:
            return type_
    raise ValueError(f"ternary rows of {columns} values are not supported (accepted: multiples of 32)")


def i2_s_bytes(num_elements: int) -> int:
    """Bytes of an I2_S tensor. Raises ValueError for a size without whole blocks."""
    if num_elements % _I2_S_BLOCK:
        raise ValueError(f"{num_elements} values are no whole number of I2_S's blocks of {_I2_S_BLOCK}")
    return num_elements // 4 + _I2_S_TAIL_BYTES


def pack_rows(codes: np.ndarray, scale: float) -> np.ndarray:
    """Codes (int8, (rows, columns), -1..1) times `scale` as the bytes of `served_type(columns)`."""
    if not np.isfinite(scale) or scale < 0:
        raise ValueError(f"its scale {scale} is not a finite number of at least 0")
    half = half_scales(np.array([scale], np.float32))
    if scale > 0 and half[0] == 0:
        raise ValueError(f"its scale {scale} is too small for f16")
    type_ = served_type(codes.shape[1])
    elements, num_bytes = BLOCK[type_]
    blocks = np.empty((codes.size // elements, num_bytes), np.uint8)
    if type_ is GGMLType.TQ2_0:
        pack_tq2_0(codes.reshape(-1, elements), np.repeat(half, len(blocks)), blocks)
    else:
        blocks[:, :2] = half.view(np.uint8)
        blocks[:, 2:] = codes.reshape(-1, elements).view(np.uint8)
    return blocks.reshape(-1)


def i2_s_rows(data: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The bytes of an I2_S tensor as those of `served_type(columns)`.

    Byte i of a block of 128 has the codes i, 32 + i, 64 + i and 96 + i, the first in its highest bits. A file that was
    quantized on ARM (blocks of 64) says nothing of it and would be read wrong; converters and published files have 128.
    """
    num_packed = rows * columns // 4
    packed = data[:num_packed].reshape(-1, 1, 32)
    digits = packed >> np.array([6, 4, 2, 0], np.uint8)[:, None] & 3
    scale = float(np.frombuffer(data[num_packed : num_packed + 4].tobytes(), "<f4")[0])
    return pack_rows(_codes(digits).reshape(rows, columns), scale)


def uint8_rows(packed: np.ndarray, scale: float) -> np.ndarray:
    """Packed (rows / 4, columns) as the bytes of `served_type(columns)`.

    Row r of the packed matrix has the rows r, r + rows/4, r + rows/2 and r + 3 rows/4, the first in its lowest bits.
    """
    digits = packed >> np.array([0, 2, 4, 6], np.uint8)[:, None, None] & 3
    return pack_rows(_codes(digits).reshape(-1, packed.shape[1]), scale)


def _codes(digits: np.ndarray) -> np.ndarray:
    if (digits == 3).any():
        raise ValueError("it holds a code that is none of -1, 0 and 1")
    return digits.view(np.int8) - np.int8(1)


@dataclass(frozen=True, eq=False)
class I2STensor:
    """The bytes of an I2_S tensor of a GGUF file, converted each time they are read."""

    name: str
    shape: tuple[int, ...]
    data: MappedBytes = field(repr=False)

    def read(self) -> np.ndarray:
        try:
            return i2_s_rows(self.data.read(), self.shape[0], self.shape[1])
        except ValueError as error:
            raise ModelFileError(self.data.file.path, str(error), tensor=self.name) from error

    def release(self) -> None:
        self.data.release()
