"""A frozen matrix: kept at the bits that its file has, unpacked into a given buffer whenever a pass needs it.

Codes are laid out once, when the model is opened, so that unpacking is a handful of contiguous torch operations on any
device: a plane of b-bit codes holds in bits [b*k, b*(k+1)) of byte j the code of element j + k*n*b/8. The default
model's layers (106 million weights, Q4_1) unpack in 25 ms on two Zen 4 cores, 2 % of a step of 1,024 tokens.
Not covered: what the formats mean (blocks.py), which matrices a layer has (weights.py).
"""

import threading
import warnings
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from finetune.model.blocks import Blocks, split_blocks
from quant.formats import GGMLType
from quant.model_types import Tensor as FileTensor
from quant.quantize import to_float32

_PLANES: dict[int, tuple[int, ...]] = {2: (2,), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}
_DTYPES = {GGMLType.F32: torch.float32, GGMLType.F16: torch.float16, GGMLType.BF16: torch.bfloat16}


class FrozenMatrix(Protocol):
    """(rows, columns) of constants."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def unpack(self, out: torch.Tensor) -> None:
        """Write the values into `out`, rounded to its type."""

    @property
    def num_bytes(self) -> int: ...


class Scratch(threading.local):
    """Buffers that unpacking reuses: one uint8 and one float32 for each element of the largest matrix. Every thread
    that computes has its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._codes = torch.empty(0, dtype=torch.uint8, device=device)
        self._values = torch.empty(0, dtype=torch.float32, device=device)

    def take(self, num_elements: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self._codes.numel() < num_elements:
            self._codes = torch.empty(num_elements, dtype=torch.uint8, device=self._device)
            self._values = torch.empty(num_elements, dtype=torch.float32, device=self._device)
        return self._codes[:num_elements], self._values[:num_elements]

    def clear(self) -> None:
        self._codes, self._values = self._codes[:0].clone(), self._values[:0].clone()

    @property
    def num_bytes(self) -> int:
        return 5 * self._codes.numel()


@dataclass(frozen=True, eq=False)
class _Floats:
    """A matrix whose file holds floats: a view of the mapped file, where it can be."""

    shape: tuple[int, int]
    values: torch.Tensor

    def unpack(self, out: torch.Tensor) -> None:
        out.copy_(self.values)

    @property
    def num_bytes(self) -> int:
        return self.values.numel() * self.values.element_size()


class _Quantized:
    """A matrix of blocks; `rows` says which rows to take, in which order (None: all)."""

    def __init__(self, tensor: FileTensor, rows: np.ndarray | None, scratch: Scratch, device: torch.device) -> None:
        self.shape = (tensor.shape[0], tensor.shape[1])
        data = tensor.read()
        blocks = split_blocks(
            data if rows is None else data.reshape(tensor.shape[0], -1)[rows].reshape(-1), tensor.type
        )
        self._scratch = scratch
        self._offset = blocks.offset
        self._planes = [plane.to(device) for plane in _planes(blocks)]
        self._bits = _PLANES[blocks.num_bits]
        kept = (blocks.d, blocks.scale, blocks.d_minimum, blocks.minimum)
        tensors = [None if array is None else torch.from_numpy(array).to(device) for array in kept]
        self._d, self._scale, self._d_minimum, self._minimum = tensors
        assert self._d is not None
        self._num_groups = len(self._d) * (1 if self._scale is None else self._scale.shape[1])

    def unpack(self, out: torch.Tensor) -> None:
        codes, values = self._scratch.take(self.shape[0] * self.shape[1])
        self._unpack_codes(codes)
        groups = values.view(self._num_groups, -1)
        groups.copy_(codes.view(groups.shape))
        if self._offset:
            groups.sub_(self._offset)
        assert self._d is not None
        groups.mul_(_product(self._d, self._scale))
        if self._d_minimum is not None:
            groups.add_(_product(self._d_minimum, self._minimum))
        out.copy_(values.view(self.shape))

    def _unpack_codes(self, codes: torch.Tensor) -> None:
        shift = 0
        for plane, bits in zip(self._planes, self._bits, strict=True):
            size = plane.numel()
            for k in range(8 // bits):
                part = codes[k * size : (k + 1) * size]
                if shift:
                    part.bitwise_or_(((plane >> (bits * k)) & (2**bits - 1)) << shift)
                elif bits * (k + 1) == 8:
                    torch.bitwise_right_shift(plane, bits * k, out=part)
                else:
                    source = plane if k == 0 else plane >> (bits * k)
                    torch.bitwise_and(source, 2**bits - 1, out=part)
            shift += bits

    @property
    def num_bytes(self) -> int:
        kept = (*self._planes, self._d, self._scale, self._d_minimum, self._minimum)
        return sum(tensor.numel() * tensor.element_size() for tensor in kept if tensor is not None)


def _product(d: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
    """One float32 column: d, or d times the integers of its groups (exact: 11 + 8 bits)."""
    wide = d.float()
    return (wide if factor is None else wide * factor).view(-1, 1)


def _planes(blocks: Blocks) -> list[torch.Tensor]:
    codes, planes = blocks.codes.reshape(-1), []
    for bits in _PLANES[blocks.num_bits]:
        parts = (codes & (2**bits - 1)).reshape(8 // bits, -1)
        plane = np.zeros(parts.shape[1], np.uint8)
        for k, part in enumerate(parts):
            plane |= part << (bits * k)
        planes.append(torch.from_numpy(plane))
        codes = codes >> bits
    return planes


def freeze(tensor: FileTensor, rows: np.ndarray | None, scratch: Scratch, device: torch.device) -> FrozenMatrix:
    """`rows[i]` is the row of the file that becomes row i (None: as they are). The mapped pages are given back."""
    if tensor.type not in _DTYPES:
        matrix: FrozenMatrix = _Quantized(tensor, rows, scratch, device)
        tensor.release()
        return matrix
    values = torch_view(tensor.read()).view(_DTYPES[tensor.type]).view(tensor.shape)
    if rows is not None:
        values = values[torch.from_numpy(rows).long()]
    return _Floats((tensor.shape[0], tensor.shape[1]), values.to(device))


def torch_view(data: np.ndarray) -> torch.Tensor:
    """The same memory as a tensor. Mapped files are read-only, which torch cannot express: nobody writes to it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(data)


def read_rows(tensor: FileTensor, ids: np.ndarray) -> np.ndarray:
    """Some rows of a matrix of any type as float32 (len(ids), columns): exact, without unpacking the others."""
    data = tensor.read().reshape(tensor.shape[0], -1)[ids].reshape(-1)
    if tensor.type in _DTYPES:
        return to_float32(data, tensor.type).reshape(len(ids), -1)
    blocks = split_blocks(data, tensor.type)
    values = blocks.codes.astype(np.float32) - np.float32(blocks.offset)
    values = values.reshape(len(values), 1 if blocks.scale is None else blocks.scale.shape[1], -1)
    values *= _factor(blocks.d, blocks.scale)
    if blocks.d_minimum is not None:
        values += _factor(blocks.d_minimum, blocks.minimum)
    return values.reshape(len(ids), -1)


def _factor(d: np.ndarray, integers: np.ndarray | None) -> np.ndarray:
    wide = d.astype(np.float32)
    return (wide if integers is None else wide * integers)[:, :, None]
