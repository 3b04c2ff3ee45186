"""From a model file to the C++ core: which tensor goes where, row order of Q and K, and the core's buffers.

The core keeps all rows in Hugging Face (half-split rotary) order; Q and K of llama-architecture GGUF files are stored
interleaved and are un-permuted here, so that PEFT adapters fit without a permutation of their own.
"""

from collections.abc import Callable

import numpy as np

import _sterna
from quant.errors import ModelFileError
from quant.formats import GGMLType
from quant.model_file import ModelConfig, ModelFile, Tensor
from quant.rope_order import half_split_rows
from quant.tensor_rules import STREAMS

_PROJECTIONS = {
    "attn_q": "q_proj",
    "attn_k": "k_proj",
    "attn_v": "v_proj",
    "attn_output": "o_proj",
    "ffn_gate": "gate_proj",
    "ffn_up": "up_proj",
    "ffn_down": "down_proj",
}
_VECTORS = {
    "attn_norm.weight": "attn_norm",
    "ffn_norm.weight": "ffn_norm",
    "attn_q_norm.weight": "q_norm",
    "attn_k_norm.weight": "k_norm",
    "attn_sub_norm.weight": "attn_sub_norm",
    "ffn_sub_norm.weight": "ffn_sub_norm",
    STREAMS: "streams",
    "attn_q.bias": "q_bias",
    "attn_k.bias": "k_bias",
    "attn_v.bias": "v_bias",
}
_MATRICES = {"token_embd.weight": "embedding", "output.weight": "head"}


def load_model(
    file: ModelFile,
    *,
    isa: str,
    num_threads: int,
    max_positions: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> "_sterna.Model":
    """Pack every tensor of `file` for `isa`. `progress(done, total)` counts tensors. Raises ModelFileError."""
    config = file.config
    model = _sterna.Model(
        num_layers=config.num_layers,
        hidden=config.hidden_size,
        ffn=config.intermediate_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocab=config.vocab_size,
        rope_dim=config.rope_dim,
        max_positions=min(max_positions or config.context_length, config.context_length),
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=config.rope_theta,
        rope_factors=list(config.rope_freq_factors or ()),
        squared_relu=config.activation == "relu2",
        row_scales=config.row_scales,
        two_streams=config.residual_streams == 2,
        isa=isa,
        num_threads=num_threads,
    )
    for done, tensor in enumerate(file.tensors.values()):
        try:
            _add(model, config, tensor)
        except ModelFileError:
            raise
        except ValueError as error:
            raise ModelFileError(file.path, str(error), tensor=tensor.name) from error
        tensor.release()
        if progress:
            progress(done + 1, len(file.tensors))
    model.finish()
    return model


def _add(model: "_sterna.Model", config: ModelConfig, tensor: Tensor) -> None:
    if tensor.name == "rope_freqs.weight":
        return  # part of the configuration: rope_freq_factors
    prefix, layer, name = _split(tensor.name)
    if len(tensor.shape) == 1 or name == STREAMS:
        vector = _as_float(tensor)
        kind = "output_norm" if tensor.name == "output_norm.weight" else _VECTORS[name]
        if tensor.rope_interleaved:
            vector = vector[half_split_rows(config, config.num_heads if prefix == "attn_q" else config.num_kv_heads)]
        if not np.isfinite(vector).all():
            raise ValueError("it holds a value that is not finite")
        model.add_vector(kind, layer, np.ascontiguousarray(vector))
        return
    rows, cols = tensor.shape
    row_map = None
    if tensor.rope_interleaved:
        row_map = half_split_rows(config, config.num_heads if prefix == "attn_q" else config.num_kv_heads)
    kind = _MATRICES.get(tensor.name) or _PROJECTIONS[prefix]
    model.add_matrix(kind, layer, int(tensor.type), tensor.read(), rows, cols, row_map)


def _split(name: str) -> tuple[str, int, str]:
    """'blk.3.attn_q.weight' -> ('attn_q', 3, 'attn_q.weight'); other names get layer -1."""
    if not name.startswith("blk."):
        return name, -1, name
    _, layer, rest = name.split(".", 2)
    return rest.split(".", 1)[0], int(layer), rest


def _as_float(tensor: Tensor) -> np.ndarray:
    data = tensor.read()
    if tensor.type == GGMLType.F32:
        return data.view(np.float32)
    if tensor.type == GGMLType.F16:
        return data.view(np.float16).astype(np.float32)
    if tensor.type == GGMLType.BF16:
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    raise ValueError(f"a vector of type {tensor.type.name} is not supported (accepted: F32, F16, BF16)")


def load_core(
    file: ModelFile,
    *,
    isa: str,
    num_threads: int,
    num_blocks: int,
    max_num_seqs: int,
    max_batch_tokens: int,
    max_model_len: int | None = None,
    max_loras: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> "_sterna.Core":
    """The core ready to step: weights packed, KV cache of `num_blocks` blocks of 16 tokens reserved."""
    model = load_model(file, isa=isa, num_threads=num_threads, max_positions=max_model_len, progress=progress)
    return _sterna.Core(
        model,
        num_blocks=num_blocks,
        max_num_seqs=max_num_seqs,
        max_batch_tokens=max_batch_tokens,
        # At least 64, so that prompt log-probabilities are not computed a few rows at a time.
        max_logit_rows=max(max_num_seqs, 64),
        max_loras=max_loras,
    )
