"""A trained model as a GGUF file: the very values that its products were computed with, in the blocks that hold them.

Ternary matrices become TQ2_0 or TQ1_0 (or Q4_0, for groups of 64 and 128, which TQ's blocks of 256 cannot have);
embedding and head Q8_0 or Q4_0; norms float32. Rows of Q and K go into the file's order. Nothing is rounded a second
time: what is written is read as exactly the values that were trained with.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.errors import TrainingError
from finetune.qat.quantizers import BLOCK, ternary_parts
from finetune.qat.shape import ROW, STREAM_SHAPE, Shape, is_ternary
from finetune.qat.weights import Weights, check_finite
from quant.formats import GGMLType
from quant.gguf_metadata import config_metadata
from quant.gguf_writer import TensorSource, write_gguf
from quant.quantize import quantize
from quant.rope_order import file_rows
from quant.tensor_rules import STREAMS
from quant.ternary import pack_tq1_0, pack_tq2_0

ACTIVATIONS_KEY = "sterna.activations"
"""Metadata: the granularity of the activations' int8 scales that the model was trained with."""
ACTIVATIONS = f"int8 per {BLOCK}"
RULE_KEY, GROUP_KEY = "sterna.ternary.rule", "sterna.ternary.group"
TERNARY_TYPES = (GGMLType.TQ2_0, GGMLType.TQ1_0)


def export_gguf(
    path: Path,
    shape: Shape,
    parameters: Mapping[str, Tensor],
    tokenizer: Mapping[str, Any],
    *,
    matrix_type: GGMLType | None = None,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    on_tensor: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """`tokenizer`: metadata keys, as `BPEVocabulary.metadata` gives. `matrix_type`: TQ2_0 or TQ1_0 where the groups
    allow; None: `shape.matrix_type`. `on_tensor(done, total)`.

    Raises TrainingError for weights that are not finite or a type that cannot hold them, ModelFileError for the file.
    """
    kind = check_matrix_type(shape, matrix_type)
    check_finite(parameters, f"{path.name} cannot be exported")
    weights = Weights(shape, parameters, torch.float32)
    sources = []
    for done, name in enumerate(shape.parameter_shapes()):
        sources.append(_source(name, shape, weights, kind))
        on_tensor(done + 1, len(shape.parameter_shapes()))
    write_gguf(path, _metadata(shape, kind) | dict(tokenizer) | dict(metadata or {}), sources, overwrite=overwrite)


def check_matrix_type(shape: Shape, wanted: GGMLType | None) -> GGMLType:
    """The type of the ternary matrices. Raises TrainingError for one that cannot hold them."""
    kind = wanted or shape.matrix_type
    if kind is not shape.matrix_type and not {kind, shape.matrix_type} <= set(TERNARY_TYPES):
        whose = f"groups of {shape.ternary.group}" if shape.ternary.group else "one scale a tensor"
        raise TrainingError(f"{kind.name} is not what holds {whose}: that is {shape.matrix_type.name}")
    return kind


def _metadata(shape: Shape, kind: GGMLType) -> dict[str, Any]:
    found = config_metadata(shape.config(), kind)
    return found | {ACTIVATIONS_KEY: ACTIVATIONS, RULE_KEY: shape.ternary.rule, GROUP_KEY: shape.ternary.group or 0}


def _source(name: str, shape: Shape, weights: Weights, kind: GGMLType) -> TensorSource:
    tensor = weights.parameters[name].detach().float().cpu()
    rows = file_rows(shape.config(), name)
    if rows is not None:
        tensor = tensor[torch.from_numpy(rows.astype(np.int64))]
    if tensor.ndim == 1:
        size = STREAM_SHAPE if name.endswith(STREAMS) else tuple(tensor.shape)
        data = tensor.numpy().tobytes()
        return TensorSource(name, GGMLType.F32, size, lambda: (data,))
    if not is_ternary(name):
        kind = GGMLType[shape.embedding_type.upper()]
        blocks = quantize(tensor.numpy().reshape(-1).view(np.uint8), GGMLType.F32, kind)
    elif kind is GGMLType.Q4_0:
        blocks = _ternary_q4_0(tensor, shape)
    else:
        codes, scales = ternary_parts(tensor, shape.ternary)
        halves = scales.half().numpy().reshape(-1)
        whole = codes.to(torch.int8).view(-1, ROW).numpy()
        pack = pack_tq2_0 if kind is GGMLType.TQ2_0 else pack_tq1_0
        blocks = pack(whole, halves.repeat(len(whole) // len(halves)))
    return TensorSource(name, kind, tuple(tensor.shape), lambda: (blocks.tobytes(),))


def _ternary_q4_0(tensor: Tensor, shape: Shape) -> np.ndarray:
    """Codes 7, 8 and 9 around Q4_0's offset of 8, each block of 32 with its group's scale."""
    codes, scales = ternary_parts(tensor, shape.ternary)
    size = codes.shape[1]
    nibbles = (codes.to(torch.int8) + 8).view(-1, BLOCK).numpy().view(np.uint8)
    found = np.empty((len(nibbles), 18), np.uint8)
    halves = scales.half().numpy().repeat(size // BLOCK, axis=0)
    found[:, :2] = halves.view(np.uint8)
    found[:, 2:] = nibbles[:, :16] | nibbles[:, 16:] << 4
    return found
