"""Which type each tensor of a written GGUF file gets, and why it is not the wanted one: decided here, nowhere else.

Vectors (norms, biases) and what is no weight are F32. What does not get the wanted type stays as it is where the source
has quantized it already: another quantization would only lose. Else the embedding and the head, whose errors reach
every logit, are Q8_0 under a type of four bits or fewer; and rows that are no whole number of blocks fall back, ternary
types to Q4_0 and these to F16. Patterns of the caller's come first, but no pattern makes a row fit.
"""

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from quant.errors import ModelFileError
from quant.formats import BLOCK, WRITABLE, GGMLType
from quant.tensor_rules import EMBEDDING, HEAD

_TERNARY = (GGMLType.TQ1_0, GGMLType.TQ2_0)
_FLOATS = (GGMLType.F32, GGMLType.F16, GGMLType.BF16)
_COARSE = (GGMLType.Q4_0, GGMLType.Q4_1, *_TERNARY)


@dataclass(frozen=True)
class TypeChoice:
    """A tensor's type in the new file; `note` says why it is not the wanted one, "" where it is."""

    type: GGMLType
    note: str = ""


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether it may be quantized: not the ten numbers a layer that mix two residual streams."""
    return len(shape) > 1 and name.endswith(".weight")


def fitting_type(wanted: GGMLType, columns: int) -> GGMLType:
    """`wanted`, or the nearest type of which rows of so many values are whole blocks."""
    if columns % BLOCK[wanted][0] == 0:
        return wanted
    return GGMLType.Q4_0 if wanted in _TERNARY and columns % BLOCK[GGMLType.Q4_0][0] == 0 else GGMLType.F16


def choose_types(
    path: Path,
    tensors: Mapping[str, tuple[GGMLType, tuple[int, ...]]],
    wanted: GGMLType,
    keep: Sequence[tuple[str, GGMLType]] = (),
) -> dict[str, TypeChoice]:
    """The choice for each tensor (type and shape now). `keep`: patterns of names (*, ?, [...]), the first that fits.

    Raises ModelFileError for a pattern that no matrix matches.
    """
    assert wanted in WRITABLE, wanted
    for pattern, _ in keep:
        if not any(is_matrix(n, shape) and fnmatch.fnmatchcase(n, pattern) for n, (_, shape) in tensors.items()):
            raise ModelFileError(path, f"no matrix has a name like {pattern!r}")
    return {name: _choose(name, type_, shape, wanted, keep) for name, (type_, shape) in tensors.items()}


def _choose(
    name: str, source: GGMLType, shape: tuple[int, ...], wanted: GGMLType, keep: Sequence[tuple[str, GGMLType]]
) -> TypeChoice:
    if not is_matrix(name, shape):
        return TypeChoice(GGMLType.F32, "a vector" if len(shape) == 1 else "not a weight")
    kept = next((type_ for pattern, type_ in keep if fnmatch.fnmatchcase(name, pattern)), None)
    target, note = wanted, ""
    if kept is not None:
        target, note = kept, "--keep"
    elif name in (EMBEDDING, HEAD) and wanted in _COARSE:
        note = "embedding" if name == EMBEDDING else "head"
        target = GGMLType.Q8_0 if source in _FLOATS else source
    columns = shape[-1]
    if columns % BLOCK[target][0] == 0:
        return TypeChoice(target, note)
    note = f"rows of {columns}, no multiple of {BLOCK[target][0]}"
    return TypeChoice(fitting_type(target, columns) if source in _FLOATS else source, note)
