"""Writes GGUF files (version 3, little-endian): metadata, then tensors whose bytes come a piece at a time.

The file is written beside its name, synced and renamed, so it is whole or not there. Values have the types that
llama.cpp asks for: sizes are UINT32, floats FLOAT32, lists of whole numbers INT32. A value of another file is taken
over as its bytes (`RawValue`), whatever its type. What belongs into a model's metadata is in `gguf_metadata.py`.
Own code, not the `gguf` package's writer: that one wants each tensor whole and drops empty strings and arrays, and it
cannot take over a value untouched. The package's reader is the test twin.
"""

import math
import os
import struct
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from quant.errors import ModelFileError
from quant.formats import BLOCK, GGMLType, row_bytes

_HEADER = struct.Struct("<4sIQQ")
_ALIGNMENT = 32
_MAX_NAME_BYTES = 63  # GGML_MAX_NAME with its terminator is 64
_ALIGNMENT_KEY = "general.alignment"
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY, _UINT64, _INT64 = 4, 5, 6, 7, 8, 9, 10, 11
_FORMATS = {_UINT32: "<I", _INT32: "<i", _FLOAT32: "<f", _BOOL: "<?", _UINT64: "<Q", _INT64: "<q"}
_DTYPES = {_INT32: "<i4", _FLOAT32: "<f4", _BOOL: "|u1", _INT64: "<i8"}


@dataclass(frozen=True, slots=True)
class RawValue:
    """A metadata value as it lies in a file: its type's number and its bytes."""

    data: bytes


@dataclass(frozen=True, eq=False, slots=True)
class TensorSource:
    """A tensor to write. `shape` is in NumPy order, and so are its rows' bytes, which `pieces` gives in order."""

    name: str
    type: GGMLType
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[np.ndarray | bytes]]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape[:-1]) * row_bytes(self.type, self.shape[-1])


def write_gguf(
    path: Path, metadata: Mapping[str, Any], tensors: Sequence[TensorSource], *, overwrite: bool = False
) -> None:
    """Write `path` whole or not at all. Values are bool, int, float, str, lists or arrays of these, or RawValue.

    Raises ModelFileError for a path that exists (unless `overwrite`) or cannot be written, a name that is too long or
    occurs twice, a row that is no whole number of blocks; and passes on whatever a tensor's `pieces` raise.
    """
    if os.path.lexists(path) and not overwrite:
        raise ModelFileError(path, "it exists already")
    _check(path, tensors)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with beside.open("xb") as file:
            _write(file, metadata, tensors)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        raise ModelFileError(path, error.strerror or str(error)) from error
    finally:
        beside.unlink(missing_ok=True)


def _check(path: Path, tensors: Sequence[TensorSource]) -> None:
    seen = set()
    for tensor in tensors:
        elements = BLOCK[tensor.type][0]
        if len(tensor.name.encode()) > _MAX_NAME_BYTES:
            raise ModelFileError(path, f"a name of more than {_MAX_NAME_BYTES} bytes", tensor=tensor.name)
        if tensor.name in seen:
            raise ModelFileError(path, "the tensor occurs twice", tensor=tensor.name)
        if not tensor.shape or 0 in tensor.shape or tensor.shape[-1] % elements:
            reason = f"shape {tensor.shape} is no whole number of {tensor.type.name}'s blocks of {elements} a row"
            raise ModelFileError(path, reason, tensor=tensor.name)
        seen.add(tensor.name)


def _write(file: BinaryIO, metadata: Mapping[str, Any], tensors: Sequence[TensorSource]) -> None:
    values = {key: value for key, value in metadata.items() if key != _ALIGNMENT_KEY}  # ours is the default
    file.write(_HEADER.pack(b"GGUF", 3, len(tensors), len(values)))
    for key, value in values.items():
        file.write(_string(key) + _value(key, value))
    offset = 0
    for tensor in tensors:
        dimensions = tensor.shape[::-1]
        file.write(_string(tensor.name) + struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions))
        file.write(struct.pack("<IQ", tensor.type, offset))
        offset += tensor.num_bytes + -tensor.num_bytes % _ALIGNMENT
    _pad(file)
    for tensor in tensors:
        start = file.tell()
        for piece in tensor.pieces():
            file.write(piece.data if isinstance(piece, np.ndarray) else piece)
        written = file.tell() - start
        assert written == tensor.num_bytes, (tensor.name, written, tensor.num_bytes)
        _pad(file)


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % _ALIGNMENT))


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(key: str, value: Any) -> bytes:
    """The type's number and the value."""
    if isinstance(value, RawValue):
        return value.data
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, bool | int | float):
        kind = _kind(key, [value], _UINT32, _UINT64)
        return struct.pack("<I", kind) + struct.pack(_FORMATS[kind], value)
    items = value.tolist() if isinstance(value, np.ndarray) else list(value)
    if items and all(isinstance(item, str) for item in items):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(items)) + b"".join(map(_string, items))
    kind = _kind(key, items, _INT32, _INT64)
    return struct.pack("<IIQ", _ARRAY, kind, len(items)) + np.asarray(items, _DTYPES[kind]).tobytes()


def _kind(key: str, items: Sequence[Any], small: int, large: int) -> int:
    """The number of the type that holds all items: numbers are `small` or `large`, negative ones signed."""
    types = {type(item) for item in items}
    if types == {bool}:
        return _BOOL
    if float in types and types <= {int, float}:
        return _FLOAT32
    assert types <= {int}, (key, types)  # an empty list too, as int32
    lowest, highest = min(items, default=0), max(items, default=0)
    if lowest < 0:
        small, large = _INT32, _INT64
    return small if lowest >= -(2**31) and highest < (2**32 if small == _UINT32 else 2**31) else large
