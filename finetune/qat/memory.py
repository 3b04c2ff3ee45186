"""What a training step from scratch will take, in bytes by part, before it runs.

Follows the code that allocates: float32 shadows, their rounded values in the products' type (weights.py), gradients,
one or two slots of optimizer state, what each layer keeps for its backward pass (model.py, ops.py), and the largest of
what comes and goes: a layer's gradients, the head's, or the optimizer's scratch; and what the heap takes beside that.
Within 15 % of the measured peak of whole runs (tests/finetune/qat/test_memory.py), the process's own bytes included,
which are the caller's to measure. Not covered: CUDA's allocator.
"""

from dataclasses import asdict, dataclass

import torch

from finetune.ops.attention_tiles import MAX_QUERIES, MAX_SCORES
from finetune.ops.cross_entropy import CHUNK_BYTES, SOFTMAX_BYTES
from finetune.ops.numeric import wide_dtype
from finetune.qat.shape import VOCABULARY_TENSORS, Shape, is_ternary

KERNEL_BYTES = 280_000_000
"""Code that oneDNN compiles for the sizes of products and tiles that a run meets, and what else its first steps bring.
Two thirds come in the first 20 steps, all of it in some 150: measured as the peak less all other parts."""
HOLES_SOON, HOLES_LATE = 0.5, 1.5
"""Of the activations, in the first steps and after `STEPS_TO_LATE`: micro-batches differ in their sizes, and freed
memory is not always where the next one fits. Fitted to the test's runs and to the shipped model's two."""
STEPS_TO_LATE = 250


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes at the peak of a step."""

    weights: int
    """Shadows and their values."""
    gradients: int
    optimizer: int
    activations: int
    """Kept from the forward to the backward pass by all layers."""
    passing: int
    """The most that comes and goes besides."""
    heap: int
    """Holes that tensors leave and the next ones do not fit into, and KERNEL_BYTES."""
    process: int
    """Python, torch, the libraries and the data, as given."""

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def plan_memory(
    shape: Shape,
    dtype: torch.dtype,
    num_tokens: int,
    *,
    is_muon: bool,
    num_steps: int = 0,
    process_bytes: int = 0,
    num_loss_rows: int = 0,
) -> MemoryPlan:
    """Of `num_steps` steps, of micro-batches of `num_tokens` rows, `num_loss_rows` of which carry loss (0: all)."""
    wide, narrow = wide_dtype(dtype).itemsize, dtype.itemsize
    shapes = {name: one[0] * (one[1] if len(one) > 1 else 1) for name, one in shape.parameter_shapes().items()}
    total = sum(shapes.values())
    ternary = sum(size for name, size in shapes.items() if is_ternary(name))
    vocabulary = sum(size for name, size in shapes.items() if name in VOCABULARY_TENSORS)
    embedding = shape.vocab_size * shape.hidden_size
    values = (ternary + embedding) * narrow + embedding * wide
    slots = (ternary * (1 if is_muon else 2) + 2 * (total - ternary)) * wide
    head = _loss_bytes(shape, dtype, num_loss_rows or num_tokens)
    largest = max(shapes.values())
    # While weights are rounded: a matrix's magnitudes, codes and values; Muon's update in bfloat16, several times.
    stepping = 4 * largest * wide
    # Gradients of the embedding come twice (its rows', the head's) before they are added up.
    gradients = (total + vocabulary) * wide
    passing = max(head, stepping, _passing_bytes(shape, dtype, num_tokens))
    activations = shape.num_layers * _kept_bytes(shape, dtype) * num_tokens
    holes = HOLES_SOON + (HOLES_LATE - HOLES_SOON) * min(1.0, num_steps / STEPS_TO_LATE)
    return MemoryPlan(
        weights=total * wide + values,
        gradients=gradients,
        optimizer=slots,
        activations=activations,
        passing=passing,
        heap=passing + int(holes * activations) + KERNEL_BYTES,
        process=process_bytes,
    )


def _kept_bytes(shape: Shape, dtype: torch.dtype) -> int:
    """Of a layer and a token."""
    wide, narrow = wide_dtype(dtype).itemsize, dtype.itemsize
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    hidden, ffn = shape.hidden_size, shape.intermediate_size
    # The stream before either norm; normed and rounded inputs; Q, K, V; attention's result; gate and up; their product.
    kept = 2 * hidden * wide + (2 * hidden + 2 * queries + 2 * keys + 3 * ffn) * narrow
    if shape.residual_streams == 2:  # both streams and what is added, of either sublayer
        kept += 2 * (2 * wide + narrow) * hidden
    return kept


def _passing_bytes(shape: Shape, dtype: torch.dtype, num_tokens: int) -> int:
    """The backward pass of the feed-forward part or of attention."""
    wide, narrow = wide_dtype(dtype).itemsize, dtype.itemsize
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    hidden, ffn = shape.hidden_size, shape.intermediate_size
    ffn_part = (6 * ffn * narrow + 4 * hidden * wide) * num_tokens
    rounding = 4 * ffn * wide * num_tokens  # forward: the product in float32, rounded, and what is between
    scores = shape.num_heads * num_tokens * min(MAX_QUERIES, num_tokens)
    tile = 4 * narrow * min(max(MAX_SCORES, shape.num_heads * num_tokens), scores)
    attention = ((2 * queries + 3 * keys) * wide + (4 * queries + 3 * keys) * narrow + 3 * hidden * wide) * num_tokens
    return max(ffn_part, rounding, attention + tile)


def _loss_bytes(shape: Shape, dtype: torch.dtype, num_rows: int) -> int:
    wide, narrow = wide_dtype(dtype).itemsize, dtype.itemsize
    logits = min(num_rows * shape.vocab_size * narrow, CHUNK_BYTES)
    softmax = 4 * min(num_rows * shape.vocab_size * wide, SOFTMAX_BYTES)
    return logits + softmax + 2 * num_rows * shape.hidden_size * narrow + shape.vocab_size * shape.hidden_size * narrow
