"""Writes an open model as a GGUF file with tensors of other types: a slice at a time, the errors measured on the way.

From a GGUF file all metadata is taken over, from a Hugging Face directory the caller brings it (the tokenizer is the
serving room's). Rows of Q and K of llama models go into the order of such files. A tensor that keeps its type keeps its
bytes. Which type a tensor gets is decided in `export_types.py`.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from quant.errors import ModelFileError
from quant.export_types import TypeChoice
from quant.formats import BLOCK, GGMLType, row_bytes
from quant.gguf_metadata import ROPE_FACTORS, copied_metadata, file_type_metadata, rope_factor_tensors
from quant.gguf_reader import read_header
from quant.gguf_writer import TensorSource, write_gguf
from quant.hf_names import hf_name
from quant.model_types import ModelFile, Tensor
from quant.quantize import dequantize, quantize
from quant.rope_order import file_rows
from quant.tensor_rules import expected_tensors
from quant.ternary import absmean_scale

_SLICE_ELEMENTS = 1 << 20  # 4 MiB of float32, a few of which are alive at once; below, Python's share is felt
_TERNARY = (GGMLType.TQ1_0, GGMLType.TQ2_0)
_BLOCKS = frozenset(type_ for type_, (elements, _) in BLOCK.items() if elements > 1)


@dataclass
class TensorReport:
    """What became of one tensor."""

    name: str
    shape: tuple[int, ...]
    source_type: GGMLType
    choice: TypeChoice
    num_bytes: int
    square_error: float = field(default=0.0, repr=False)
    square_sum: float = field(default=0.0, repr=False)

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def relative_error(self) -> float:
        """The root of the squared differences' sum over the squares' sum; 0 for a tensor of zeros."""
        return math.sqrt(self.square_error / self.square_sum) if self.square_sum else 0.0


def export_gguf(
    file: ModelFile,
    path: Path,
    choices: Mapping[str, TypeChoice],
    metadata: Mapping[str, Any],
    *,
    absmean: bool = False,
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> list[TensorReport]:
    """Write `path`, whole or not at all. `absmean`: ternary tensors get one scale each (ternary.py).

    `progress` hears how many bytes of the new file are done. Raises ModelFileError, naming the tensor.
    """
    reports, sources = [], []
    done = 0

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        progress(done)

    for tensor in _in_order(file):
        choice = choices[tensor.name]
        report = TensorReport(tensor.name, tensor.shape, tensor.type, choice, _num_bytes(tensor, choice))
        reports.append(report)
        conversion = _Conversion(file, tensor, report, absmean and choice.type in _TERNARY, advance)
        sources.append(TensorSource(tensor.name, choice.type, tensor.shape, conversion.pieces))
    write_gguf(path, metadata, [*sources, *_rope_tensors(file)])
    return reports


def written_bytes(file: ModelFile, choices: Mapping[str, TypeChoice]) -> int:
    """What `progress` counts up to."""
    return sum(_num_bytes(tensor, choices[tensor.name]) for tensor in file.tensors.values())


def _num_bytes(tensor: Tensor, choice: TypeChoice) -> int:
    return math.prod(tensor.shape[:-1]) * row_bytes(choice.type, tensor.shape[-1])


def gguf_metadata(file: ModelFile, main_type: GGMLType) -> dict[str, Any]:
    """All values of an open GGUF file but the labels of its types, which follow the new ones."""
    assert file.tokenizer.kind == "gguf", file.path
    mapping = file.mappings[0]
    return copied_metadata(read_header(mapping.data, file.path), mapping.data) | file_type_metadata(main_type)


def _in_order(file: ModelFile) -> list[Tensor]:
    """As in the GGUF file; those of a directory in the order of the forward pass."""
    if file.tokenizer.kind == "gguf":
        return list(file.tensors.values())
    return [file.tensors[name] for name, _ in expected_tensors(file.config)]


def _rope_tensors(file: ModelFile) -> list[TensorSource]:
    """Llama 3's rotary factors: the tensor of the GGUF file as it is, or one from the configuration."""
    if file.tokenizer.kind != "gguf":
        return rope_factor_tensors(file.config)
    mapping = file.mappings[0]
    info = read_header(mapping.data, file.path).tensors.get(ROPE_FACTORS)
    if info is None or file.config.architecture != "llama":
        return []
    data = mapping.data[info.offset : info.offset + info.num_bytes]
    return [TensorSource(info.name, info.type, info.shape, lambda: (data,))]


@dataclass(frozen=True)
class _Conversion:
    """One tensor on its way into the file."""

    file: ModelFile
    tensor: Tensor
    report: TensorReport
    is_absmean: bool
    advance: Callable[[int], None]

    def pieces(self) -> Iterator[np.ndarray]:
        tensor, target = self.tensor, self.report.choice.type
        rows = tensor.read().reshape(math.prod(tensor.shape[:-1]), -1)
        order = None
        if not tensor.rope_interleaved:
            order = file_rows(self.file.config, tensor.name)
        if order is not None and len(tensor.shape) == 1:  # a bias: its values are the rows
            rows = rows.reshape(tensor.shape[0], -1)
        num_rows = max(1, _SLICE_ELEMENTS // tensor.shape[-1])
        slices = [slice(start, start + num_rows) for start in range(0, len(rows), num_rows)]
        try:
            scale = self._absmean(rows, slices) if self.is_absmean and tensor.type is not target else None
            for part in slices:
                piece = (rows[part] if order is None else rows[order[part]]).reshape(-1)
                yield self._converted(piece, scale)
        except ValueError as error:
            if isinstance(error, ModelFileError):
                raise
            name = tensor.name if self.file.tokenizer.kind == "gguf" else hf_name(tensor.name)
            raise ModelFileError(self.file.path, str(error), tensor=name) from error
        finally:
            tensor.release()

    def _absmean(self, rows: np.ndarray, slices: Sequence[slice]) -> np.float32:
        tensor = self.tensor
        total = sum(
            float(np.abs(dequantize(rows[part].reshape(-1), tensor.type)).sum(dtype=np.float64)) for part in slices
        )
        return absmean_scale(total, math.prod(tensor.shape))

    def _converted(self, piece: np.ndarray, scale: np.float32 | None) -> np.ndarray:
        source, target, report = self.tensor.type, self.report.choice.type, self.report
        if source is target and source in _BLOCKS:
            self.advance(piece.size)
            return np.ascontiguousarray(piece)
        result = quantize(piece, source, target, absmean=scale)  # floats to the same type too: it looks for NaN
        values = dequantize(piece, source).astype(np.float64)  # squares of bf16 values overflow float32
        difference = values - dequantize(result, target)
        report.square_error += float(np.dot(difference, difference))
        report.square_sum += float(np.dot(values, values))
        self.advance(result.size)
        return result
