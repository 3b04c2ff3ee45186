"""Writes a LoRA adapter as llama.cpp reads it: one GGUF file of pairs `<base tensor>.lora_a` and `.lora_b`.

llama.cpp scales every pair by alpha / rank, with one alpha for the whole file; a pair whose scale is another has the
rest multiplied into its B. Rows of B for Q and K go in the order of the base's own GGUF file, interleaved for llama.
Values are float32 whatever the source was: that holds all of them exactly, and for f16 pairs ggml would round the
activations to f16 too. Facts: llama.cpp's src/llama-adapter.cpp.

Not covered: reading such files; adapters of the embedding or the head, whose pairs lie the other way round there.
"""

import os
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quant.errors import ModelFileError
from quant.model_types import ModelConfig
from quant.rope_order import file_rows

FOLDED_KEY = "sterna.lora.folded"
"""Metadata: names of the base tensors whose B has a part of the scale in it; absent when there is none."""
_ROUNDING = 2.0**-23
"""Alpha is float32: pairs whose scales differ by no more than its rounding have the same one."""
_MAX_NAME_BYTES = 63  # GGML_MAX_NAME with its terminator is 64


@dataclass(frozen=True, eq=False, slots=True)
class LoraPair:
    """One adapted matrix: y += scale * b @ (a @ x)."""

    tensor: str
    """The base tensor's GGUF name, such as blk.0.attn_q.weight."""
    a: np.ndarray
    """float32 (r, in)"""
    b: np.ndarray
    """float32 (out, r), rows in half-split order."""
    scale: float


def write_lora_gguf(
    path: Path, config: ModelConfig, pairs: Sequence[LoraPair], facts: Mapping[str, str]
) -> tuple[str, ...]:
    """Write `path`, whole or not at all; gives the base tensors whose B has a part of the scale in it.

    `facts` are further metadata. Raises ModelFileError for a pair that such a file cannot hold, a path that exists, or
    a disk that fails.
    """
    import gguf  # the only part of the quant room that needs it

    if os.path.lexists(path):
        raise ModelFileError(path, "it exists already")
    alpha = _common_alpha(pairs)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    writer = gguf.GGUFWriter(beside, config.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for key, value in facts.items():
        writer.add_string(key, value)
    folded = []
    for pair in pairs:
        rest, b = pair.scale * pair.a.shape[0] / alpha, pair.b
        if abs(rest - 1) > _ROUNDING:
            folded.append(pair.tensor)
            b = _folded(path, pair, rest)
        _add(writer, f"{pair.tensor}.lora_a", pair.a)
        _add(writer, f"{pair.tensor}.lora_b", _in_file_order(config, pair.tensor, b))
    if folded:
        writer.add_array(FOLDED_KEY, folded)
    try:
        _write(writer, beside)
        beside.rename(path)
    except OSError as error:
        raise ModelFileError(path, error.strerror or str(error)) from error
    finally:
        beside.unlink(missing_ok=True)
    return tuple(folded)


def _add(writer: Any, name: str, values: np.ndarray) -> None:
    assert len(name.encode()) <= _MAX_NAME_BYTES, name
    assert values.dtype == np.float32, (name, values.dtype)
    writer.add_tensor(name, np.ascontiguousarray(values))


def _write(writer: Any, path: Path) -> None:
    """To the disk, synced."""
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.flush()
    finally:
        writer.close()
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _common_alpha(pairs: Sequence[LoraPair]) -> float:
    """The alpha, as float32, that gives most pairs their scale. Never 0, which llama.cpp takes for a scale of 1."""
    alphas = Counter(float(np.float32(pair.scale * pair.a.shape[0])) for pair in pairs)
    alphas.pop(0.0, None)
    return alphas.most_common(1)[0][0] if alphas else 1.0


def _folded(path: Path, pair: LoraPair, rest: float) -> np.ndarray:
    with np.errstate(over="ignore", under="ignore"):
        b = (pair.b.astype(np.float64) * rest).astype(np.float32)
    largest = float(np.abs(b).max())
    is_lost = rest != 0 and pair.b.any() and largest < np.finfo(np.float32).tiny
    if is_lost or not np.isfinite(largest):
        reason = f"its scale {pair.scale:g} is too far from the others' to be put into its values as float32"
        raise ModelFileError(path, reason, tensor=f"{pair.tensor}.lora_b")
    return b


def _in_file_order(config: ModelConfig, tensor: str, b: np.ndarray) -> np.ndarray:
    rows = file_rows(config, tensor)
    if rows is None:
        return b
    assert len(rows) == len(b), (tensor, b.shape)
    return b[rows]
