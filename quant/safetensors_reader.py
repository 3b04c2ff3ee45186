"""A small, bounds-checked reader of safetensors headers; the tensors stay in the mapped file.

Our own because the `safetensors` package cannot give bf16 to NumPy. Layout: 8 bytes of header length (little-endian),
JSON, then the data, which the tensors must fill without gaps or overlaps (https://github.com/huggingface/safetensors).
"""

import json
import math
from dataclasses import dataclass
from typing import Any

from quant.errors import ModelFileError
from quant.formats import BLOCK, GGMLType
from quant.mapping import MappedBytes, MappedFile

_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_TYPES = {"F32": GGMLType.F32, "F16": GGMLType.F16, "BF16": GGMLType.BF16}


@dataclass(frozen=True)
class SafeTensor:
    """A tensor's type, shape (rows, columns) and mapped bytes."""

    type: GGMLType
    shape: tuple[int, ...]
    data: MappedBytes


@dataclass(frozen=True)
class ByteTensor:
    """Packed values (dtype U8): the shape and the mapped bytes."""

    shape: tuple[int, ...]
    data: MappedBytes


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a name occurs twice")
    return result


def read_tensors(file: MappedFile) -> dict[str, SafeTensor]:
    """Every tensor of a file of floats. Raises ModelFileError."""
    tensors: dict[str, SafeTensor] = {}
    for name, tensor in read_packed_tensors(file).items():
        if isinstance(tensor, ByteTensor):
            raise ModelFileError(file.path, "dtype 'U8' is not supported (accepted: F32, F16, BF16)", tensor=name)
        tensors[name] = tensor
    return tensors


def read_packed_tensors(file: MappedFile) -> dict[str, SafeTensor | ByteTensor]:
    """Every tensor of a file that may hold packed ones too. Raises ModelFileError."""
    if file.size < 8:
        raise ModelFileError(file.path, f"truncated: {file.size} bytes are no safetensors file")
    length = int.from_bytes(file.data[:8], "little")
    if length > min(file.size - 8, _MAX_HEADER_BYTES):
        raise ModelFileError(file.path, f"a header of {length} bytes does not fit the file of {file.size}")
    try:
        header = json.loads(file.data[8 : 8 + length].decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(file.path, f"the header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise ModelFileError(file.path, "the header is not a JSON object")
    header.pop("__metadata__", None)
    tensors: dict[str, SafeTensor | ByteTensor] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        begin, end = _span(file, name, entry)
        tensors[name] = _tensor(file, name, entry, 8 + length + begin, end - begin)
        spans.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise ModelFileError(file.path, f"its bytes begin at {begin}, expected {position}", tensor=name)
        position = end
    if 8 + length + position != file.size:
        raise ModelFileError(file.path, f"the tensors end at {8 + length + position}, the file at {file.size}")
    return tensors


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _span(file: MappedFile, name: str, entry: Any) -> tuple[int, int]:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)) or offsets[0] > offsets[1]:
        raise ModelFileError(file.path, "the header's entry has no valid data_offsets", tensor=name)
    return offsets[0], offsets[1]


def _tensor(file: MappedFile, name: str, entry: dict[str, Any], offset: int, num_bytes: int) -> SafeTensor | ByteTensor:
    shape, dtype = entry.get("shape"), entry.get("dtype")
    if not isinstance(shape, list) or not all(map(_is_size, shape)):
        raise ModelFileError(file.path, "the header's entry has no valid shape", tensor=name)
    type_ = _TYPES.get(dtype) if isinstance(dtype, str) else None
    if type_ is None and dtype != "U8":
        raise ModelFileError(file.path, f"dtype {dtype!r} is not supported (accepted: F32, F16, BF16)", tensor=name)
    expected = math.prod(shape) * (BLOCK[type_][1] if type_ is not None else 1)
    if num_bytes != expected:
        raise ModelFileError(file.path, f"{num_bytes} bytes for {dtype} of shape {shape}: {expected}", tensor=name)
    if offset + num_bytes > file.size:
        raise ModelFileError(file.path, f"truncated: its bytes end behind the file's end at {file.size}", tensor=name)
    data = MappedBytes(file, offset, num_bytes)
    return ByteTensor(tuple(shape), data) if type_ is None else SafeTensor(type_, tuple(shape), data)
