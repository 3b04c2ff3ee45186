"""What a training step will take, in bytes by part, before anything is loaded; and the longest context that fits.

Follows the code that allocates: frozen matrices at their file's bits (frozen.py), one unpacked matrix, the head,
factors with gradients, optimizer state, what each layer keeps for its backward pass (layer.py), and the largest passing
need, of one layer or of one chunk of logits; and what the heap takes beside that. Within 15 % of the measured peak at
512 to 2,048 tokens on the default model, with checkpointing and without (tests/finetune/model/test_memory.py), the
process's own bytes included; those are the caller's to measure, they depend on the build of torch. Not covered: other
processes, CUDA's allocator.
"""

from dataclasses import asdict, dataclass

from finetune.model.layer import check_trainable
from finetune.model.lora import GROUP_PROJECTIONS, LoraSpec, factor_shapes, module_name
from finetune.model.model import ModelOptions
from finetune.model.weights import GROUPS
from finetune.ops.attention_tiles import MAX_QUERIES, MAX_SCORES
from finetune.ops.cross_entropy import CHUNK_BYTES, SOFTMAX_BYTES
from finetune.ops.numeric import wide_dtype
from quant.formats import BLOCK, GGMLType, row_bytes
from quant.model_types import ModelConfig, ModelFile

ADAMW_SLOTS, MUON_SLOTS = 2, 1
LONGEST = 512 * 1024
_SCALE_BYTES = {GGMLType.Q4_K: 20, GGMLType.Q5_K: 20, GGMLType.Q6_K: 18}
"""Of a block, unpacked: f16 scale and minimum, 8 + 8 bytes; f16 scale and 16 bytes. In the file 16, 16 and 18."""
FIRST_STEP_BYTES = 50_000_000
"""What a first step brings into the process: pages of torch's libraries, oneDNN's code and its copies of a tile of the
head. Measured: peak minus all other parts is 50 to 80 MB at 512 to 2,048 tokens, with checkpointing and without."""
_CODE_BITS = {GGMLType.TQ1_0: 2}
"""Kept wider than in the file (1.6)."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes at the peak of a step."""

    weights: int
    """Frozen layers, the buffers they are unpacked in, the head."""
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    """What all layers keep from the forward to the backward pass."""
    passing: int
    """The largest of what comes and goes: a layer's own tensors, or a chunk of logits."""
    heap: int
    """Holes that the passing tensors leave and the next ones do not fit into, and FIRST_STEP_BYTES."""
    process: int
    """Python, torch and the libraries, as given."""

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    @property
    def largest_part(self) -> str:
        parts = asdict(self)
        return max(parts, key=lambda name: int(parts[name]))


@dataclass(frozen=True)
class LongestContext:
    num_tokens: int
    limit: str
    """The part that grows past the budget, or what else ends it."""


def plan_memory(
    file: ModelFile,
    spec: LoraSpec,
    options: ModelOptions,
    num_tokens: int,
    *,
    num_loss_rows: int | None = None,
    optimizer_slots: int = ADAMW_SLOTS,
    process_bytes: int = 0,
) -> MemoryPlan:
    """A micro-batch of `num_tokens` rows, `num_loss_rows` of which carry loss (None: all). Raises TrainingError."""
    check_trainable(file.config)
    wide = wide_dtype(options.dtype).itemsize
    factors = sum(rows * columns for _, (rows, columns) in factor_shapes(file.config, spec)) * wide
    loss_rows = num_tokens if num_loss_rows is None else num_loss_rows
    kept, passing = _layer_bytes(file.config, spec, options, num_tokens)
    if options.checkpointing:
        # Offloaded: the one that is copied out, or the one in use and the one that comes back.
        num_inputs = min(2, file.config.num_layers) if options.offload else file.config.num_layers
        activations = num_inputs * num_tokens * file.config.hidden_size * _residual(options)
        passing += kept
    else:
        activations = file.config.num_layers * kept
    passing = max(passing, _loss_bytes(file.config, options, loss_rows))
    return MemoryPlan(
        weights=weight_bytes(file, options),
        adapter=factors,
        gradients=factors,
        optimizer=optimizer_slots * factors,
        activations=activations,
        passing=passing,
        heap=passing + FIRST_STEP_BYTES,
        process=process_bytes,
    )


def longest_context(
    file: ModelFile,
    spec: LoraSpec,
    options: ModelOptions,
    budget_bytes: int,
    *,
    optimizer_slots: int = ADAMW_SLOTS,
    process_bytes: int = 0,
) -> LongestContext:
    """The longest single sequence that trains within `budget_bytes`, loss on every token; 0 where nothing fits."""

    def plan(num_tokens: int) -> MemoryPlan:
        return plan_memory(
            file, spec, options, num_tokens, optimizer_slots=optimizer_slots, process_bytes=process_bytes
        )

    low, high = 0, LONGEST
    if plan(high).total <= budget_bytes:
        return LongestContext(high, "512K, the longest that is planned for")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if plan(middle).total <= budget_bytes else (low, middle)
    return LongestContext(low, plan(high).largest_part)


def weight_bytes(file: ModelFile, options: ModelOptions) -> int:
    config, itemsize = file.config, options.dtype.itemsize
    matrices = [
        [file.tensors[f"blk.{index}.{kind}.weight"] for kind in kinds]
        for index in range(config.num_layers)
        for kinds in GROUPS.values()
    ]
    group_elements = [sum(tensor.shape[0] * tensor.shape[1] for tensor in group) for group in matrices]
    head = config.vocab_size * config.hidden_size * itemsize
    if options.cache_weights:
        return head + itemsize * sum(group_elements)
    packed = sum(packed_bytes(tensor.type, tensor.shape) for group in matrices for tensor in group)
    quantized = [t.shape[0] * t.shape[1] for group in matrices for t in group if BLOCK[t.type][0] > 1]
    return head + packed + itemsize * max(group_elements) + 5 * max(quantized, default=0)


def packed_bytes(type_: GGMLType, shape: tuple[int, ...]) -> int:
    """Of a frozen matrix in memory."""
    elements, size = BLOCK[type_]
    num_blocks = shape[0] * shape[1] // elements
    if type_ in _CODE_BITS:
        return num_blocks * (elements * _CODE_BITS[type_] // 8 + 2)
    extra = _SCALE_BYTES[type_] - (18 if type_ is GGMLType.Q6_K else 16) if type_ in _SCALE_BYTES else 0
    assert size * num_blocks == shape[0] * row_bytes(type_, shape[1])
    return num_blocks * (size + extra)


def _residual(options: ModelOptions) -> int:
    return (wide_dtype(options.dtype) if options.upcast else options.dtype).itemsize


def _layer_bytes(config: ModelConfig, spec: LoraSpec, options: ModelOptions, num_tokens: int) -> tuple[int, int]:
    """(kept from forward to backward, the most that comes and goes) of one layer."""
    narrow, wide, residual = options.dtype.itemsize, wide_dtype(options.dtype).itemsize, _residual(options)
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, ffn = config.hidden_size, config.intermediate_size
    ranks = sum(
        spec.rank_of(module_name(0, name))
        for names in GROUP_PROJECTIONS.values()
        for name in names
        if name in spec.targets
    )
    scores = wide if options.upcast else narrow
    # The residual stream twice; Q and K as scores are computed from them; V, attention's result, gate and up.
    kept = 2 * hidden * residual + (queries + keys) * scores + (queries + keys + 2 * ffn + ranks) * narrow
    if config.qk_norm:
        kept += (queries + keys) * (narrow + wide // config.head_dim)
    # Backward of the MLP: gradients of gate, up and the activation, and it once more, silu and a product besides.
    mlp = 6 * ffn * narrow + 3 * hidden * residual
    # Backward of attention: gradients of Q, K and V wide, and narrow once more; a tile's scores and three like them.
    attention = (2 * queries + 2 * keys) * wide + (4 * queries + 3 * keys) * narrow + 3 * hidden * residual
    longest_tile = max(MAX_SCORES, config.num_heads * num_tokens)
    tile = min(longest_tile, config.num_heads * num_tokens * min(MAX_QUERIES, num_tokens)) * 4 * scores
    return kept * num_tokens, max(mlp * num_tokens, attention * num_tokens + tile)


def _loss_bytes(config: ModelConfig, options: ModelOptions, num_rows: int) -> int:
    narrow, wide = options.dtype.itemsize, wide_dtype(options.dtype).itemsize
    logits = min(num_rows * config.vocab_size * narrow, CHUNK_BYTES)
    # The softmax's rows in the wide type, their probabilities, and one more while they are copied.
    softmax = 3 * min(num_rows * config.vocab_size * wide, SOFTMAX_BYTES)
    return logits + softmax + 2 * num_rows * config.hidden_size * narrow
