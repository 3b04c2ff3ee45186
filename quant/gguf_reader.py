"""A small, bounds-checked reader of GGUF headers, versions 2 and 3, little-endian.

Gives the metadata and where each tensor lies. Nothing in the file is trusted: a count, length, offset or type that does
not fit raises ModelFileError, naming the key or tensor. What the metadata means is `gguf_config.py`'s business.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The test twin is the `gguf` package's reader.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quant.bitnet_import import i2_s_bytes, served_type
from quant.errors import ModelFileError
from quant.formats import BLOCK, I2_S, UNSUPPORTED_NAMES, GGMLType

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_NAME_BYTES = 65535  # the specification's limit for keys; tensor names are shorter
_MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
_DEFAULT_ALIGNMENT = 32
_MIN_ALIGNMENT = 8  # the specification: a multiple of 8
_MIN_KEY_VALUE_BYTES = 8 + 4 + 1  # empty key, type, one byte
_MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8  # empty name, one dimension, type, offset
_BOOL, _STRING, _ARRAY = 7, 8, 9
_UINT32 = struct.Struct("<I")
_UINT64 = struct.Struct("<Q")
_SCALARS: dict[int, np.dtype[Any]] = {  # by value type
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    _BOOL: np.dtype("<u1"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}


@dataclass(frozen=True)
class GGUFTensorInfo:
    """Where a tensor lies: `offset` from the start of the file; `shape` in NumPy order (rows, columns)."""

    name: str
    type: GGMLType
    shape: tuple[int, ...]
    offset: int
    num_bytes: int
    is_i2_s: bool = False
    """The bytes are I2_S, `type` is what they are served as (bitnet_import.py)."""


@dataclass(frozen=True)
class GGUFHeader:
    """The metadata (Python values; arrays are lists) and the tensors in file order."""

    version: int
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensorInfo]
    spans: dict[str, tuple[int, int]]
    """Where each metadata value lies, from its type's number on: (start, end) in the file."""


def read_header(data: bytes | mmap.mmap, path: Path) -> GGUFHeader:
    """Parse the header of a whole file. Raises ModelFileError."""
    return _Reader(data, path).header()


class _Reader:
    def __init__(self, data: bytes | mmap.mmap, path: Path) -> None:
        self._data = data
        self._path = path
        self._size = len(data)
        self._position = 0
        self._where: str | None = None  # the key or tensor being read, for error messages

    def header(self) -> GGUFHeader:
        version = self._version()
        tensor_count, key_count = self._uint64(), self._uint64()
        self._check_count("tensors", tensor_count, _MIN_TENSOR_BYTES)
        self._check_count("metadata keys", key_count, _MIN_KEY_VALUE_BYTES)
        metadata: dict[str, Any] = {}
        spans: dict[str, tuple[int, int]] = {}
        for index in range(key_count):
            self._where = f"metadata key {index}"
            key = self._name()
            self._where = key
            if key in metadata:
                raise self._error("the metadata key occurs twice")
            start = self._position
            metadata[key] = self._value(self._uint32())
            spans[key] = (start, self._position)
        alignment = self._alignment(metadata)
        entries = [self._tensor_entry(index) for index in range(tensor_count)]
        self._where = None
        data_start = -(-self._position // alignment) * alignment
        tensors: dict[str, GGUFTensorInfo] = {}
        for name, raw_type, dimensions, offset in entries:
            self._where = name
            if name in tensors:
                raise self._error("the tensor occurs twice")
            tensors[name] = self._place(name, raw_type, dimensions, offset, data_start, alignment)
        self._check_overlaps(tensors)
        return GGUFHeader(version, metadata, tensors, spans)

    def _error(self, reason: str) -> ModelFileError:
        return ModelFileError(self._path, reason, tensor=self._where)

    def _take(self, size: int) -> int:
        """Position of the next `size` bytes, which are then behind us."""
        start = self._position
        if size > self._size - start:
            raise self._error(f"truncated: {size} bytes wanted at {start}, the file has {self._size}")
        self._position = start + size
        return start

    def _uint32(self) -> int:
        return int(_UINT32.unpack_from(self._data, self._take(4))[0])

    def _uint64(self) -> int:
        return int(_UINT64.unpack_from(self._data, self._take(8))[0])

    def _version(self) -> int:
        start = self._take(4)
        magic = bytes(self._data[start : start + 4])
        if magic != _MAGIC:
            raise self._error(f"not a GGUF file: it begins with {magic!r}")
        version = self._uint32()
        if version & 0xFFFF == 0:
            raise self._error("a big-endian GGUF file; only little-endian ones are read")
        if version not in _VERSIONS:
            raise self._error(f"GGUF version {version} is not supported (accepted: 2, 3)")
        return version

    def _check_count(self, what: str, count: int, min_bytes: int) -> None:
        if count > (self._size - self._position) // min_bytes:
            raise self._error(f"{count} {what} do not fit the file of {self._size} bytes")

    def _name(self) -> str:
        name = self._string(_MAX_NAME_BYTES)
        if not name:
            raise self._error("an empty name")
        return name

    def _string(self, limit: int | None = None) -> str:
        length = self._uint64()
        if limit is not None and length > limit:
            raise self._error(f"a name of {length} bytes (at most {limit})")
        start = self._take(length)
        try:
            return str(self._data[start : start + length], "utf-8")
        except UnicodeDecodeError as error:
            raise self._error(f"the string at {start} is not UTF-8") from error

    def _value(self, value_type: int) -> Any:
        if value_type == _STRING:
            return self._string()
        if value_type == _ARRAY:
            return self._array()
        return self._numbers(value_type, 1)[0]

    def _array(self) -> list[Any]:
        item_type = self._uint32()
        count = self._uint64()
        if item_type == _STRING:
            self._check_count("strings", count, 8)
            return self._strings(count)
        if item_type == _ARRAY:
            raise self._error("an array of arrays is not supported")
        return self._numbers(item_type, count)

    def _numbers(self, value_type: int, count: int) -> list[Any]:
        dtype = _SCALARS.get(value_type)
        if dtype is None:
            raise self._error(f"unknown metadata value type {value_type}")
        start = self._take(count * dtype.itemsize)
        values: list[Any] = np.frombuffer(self._data, dtype, count, start).tolist() if count else []
        if value_type != _BOOL:
            return values
        if any(value > 1 for value in values):
            raise self._error("a truth value that is neither 0 nor 1")
        return [value == 1 for value in values]

    def _strings(self, count: int) -> list[str]:
        """The vocabulary and the merges come through here, 100,000 strings: everything else may be slow, not this."""
        data, position, size = self._data, self._position, self._size
        unpack = _UINT64.unpack_from
        strings: list[str] = []
        append = strings.append
        try:
            for _ in range(count):
                start = position + 8
                position = start + unpack(data, position)[0]
                if position > size:
                    raise self._error(f"truncated: string {len(strings)} of {count} ends behind the file's end")
                append(str(data[start:position], "utf-8"))
        except struct.error as error:
            raise self._error(f"truncated: string {len(strings)} of {count} begins at the file's end") from error
        except UnicodeDecodeError as error:
            raise self._error(f"string {len(strings)} of {count} is not UTF-8") from error
        self._position = position
        return strings

    def _alignment(self, metadata: dict[str, Any]) -> int:
        self._where = "general.alignment"
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < _MIN_ALIGNMENT or alignment & (alignment - 1):
            raise self._error(f"{alignment!r} is not a power of two of at least {_MIN_ALIGNMENT}")
        return alignment

    def _tensor_entry(self, index: int) -> tuple[str, int, list[int], int]:
        self._where = f"tensor {index}"
        self._where = name = self._name()
        count = self._uint32()
        if not 1 <= count <= _MAX_DIMENSIONS:
            raise self._error(f"{count} dimensions (accepted: 1 to {_MAX_DIMENSIONS})")
        dimensions = [self._uint64() for _ in range(count)]
        return name, self._uint32(), dimensions, self._uint64()

    def _place(
        self, name: str, raw_type: int, dimensions: list[int], offset: int, data_start: int, alignment: int
    ) -> GGUFTensorInfo:
        if min(dimensions) == 0:
            raise self._error(f"a dimension is 0: {dimensions}")
        type_, num_bytes = self._type_and_size(raw_type, dimensions)
        if offset % alignment:
            raise self._error(f"its offset {offset} is not a multiple of the alignment {alignment}")
        start = data_start + offset
        if start + num_bytes > self._size:
            raise self._error(
                f"truncated: its {num_bytes} bytes at {start} end behind the file's end at {self._size}"
                f" ({type_.name}, dimensions {dimensions})"
            )
        return GGUFTensorInfo(name, type_, tuple(reversed(dimensions)), start, num_bytes, raw_type == I2_S)

    def _type_and_size(self, raw_type: int, dimensions: list[int]) -> tuple[GGMLType, int]:
        if raw_type == I2_S and len(dimensions) == 2:
            try:
                return served_type(dimensions[0]), i2_s_bytes(math.prod(dimensions))
            except ValueError as error:
                raise self._error(str(error)) from error
        try:
            type_ = GGMLType(raw_type)
        except ValueError:
            known = ", ".join([*(member.name for member in GGMLType), "I2_S matrices"])
            label = UNSUPPORTED_NAMES.get(raw_type, str(raw_type))
            raise self._error(f"tensor type {label} is not supported (accepted: {known})") from None
        elements, block_bytes = BLOCK[type_]
        if dimensions[0] % elements:
            raise self._error(
                f"rows of {dimensions[0]} values are not a multiple of {type_.name}'s block of {elements}"
            )
        return type_, math.prod(dimensions) // elements * block_bytes

    def _check_overlaps(self, tensors: dict[str, GGUFTensorInfo]) -> None:
        last: GGUFTensorInfo | None = None
        for info in sorted(tensors.values(), key=lambda tensor: tensor.offset):
            if last is not None and info.offset < last.offset + last.num_bytes:
                self._where = info.name
                raise self._error(f"its bytes at {info.offset} overlap {last.name!r}")
            last = info
