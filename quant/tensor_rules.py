"""Which tensors a model of a given configuration has, and their shapes; everything else is refused by name.

Works on names, types and shapes alone (GGUF names), so it serves GGUF files and Hugging Face directories alike.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from quant.errors import ModelFileError
from quant.formats import GGMLType
from quant.model_types import ModelConfig

EMBEDDING, HEAD, OUTPUT_NORM = "token_embd.weight", "output.weight", "output_norm.weight"
STREAMS = "residual_streams"
"""blk.N.residual_streams, F32: rows attention and FFN; columns alpha, pre 0, pre 1, post 0, post 1."""
_FLOAT_TYPES = (GGMLType.F32, GGMLType.F16, GGMLType.BF16)
_PROJECTION = re.compile(r"blk\.\d{1,6}\.(attn_(q|k|v|output)|ffn_(gate|up|down))\.weight")
_LAYER_NAME = re.compile(r"blk\.\d{1,6}\.(.+)")


def layer_kind(name: str) -> str | None:
    """`attn_q.weight` of `blk.3.attn_q.weight`; None for a tensor outside the layers."""
    match = _LAYER_NAME.fullmatch(name)
    return match[1] if match else None


def is_query_or_key(name: str) -> bool:
    """Whether the tensor's rows are rotary pairs: Q's and K's weights and biases."""
    return layer_kind(name) in ("attn_q.weight", "attn_k.weight", "attn_q.bias", "attn_k.bias")


def has_float_projection(types: Mapping[str, GGMLType]) -> bool:
    """Whether a layer's matrix (by tensor name) is not quantized."""
    return any(type_ in _FLOAT_TYPES and _PROJECTION.fullmatch(name) for name, type_ in types.items())


def expected_tensors(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor's name and shape, in the order of the forward pass."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (hidden,),
        "attn_q.weight": (q_rows, hidden),
        "attn_k.weight": (kv_rows, hidden),
        "attn_v.weight": (kv_rows, hidden),
        "attn_output.weight": (hidden, q_rows),
        "ffn_norm.weight": (hidden,),
        "ffn_gate.weight": (ffn, hidden),
        "ffn_up.weight": (ffn, hidden),
        "ffn_down.weight": (hidden, ffn),
    }
    if config.qkv_bias:
        layer |= {"attn_q.bias": (q_rows,), "attn_k.bias": (kv_rows,), "attn_v.bias": (kv_rows,)}
    if config.qk_norm:
        layer |= {"attn_q_norm.weight": (config.head_dim,), "attn_k_norm.weight": (config.head_dim,)}
    if config.sub_norms:
        layer |= {"attn_sub_norm.weight": (q_rows,), "ffn_sub_norm.weight": (ffn,)}
    if config.residual_streams == 2:
        layer |= {STREAMS: (2, 5)}
    yield EMBEDDING, (config.vocab_size, hidden)
    for index in range(config.num_layers):
        for kind, shape in layer.items():
            yield f"blk.{index}.{kind}", shape
    yield OUTPUT_NORM, (hidden,)
    if not config.tie_embeddings:
        yield HEAD, (config.vocab_size, hidden)


def check_tensors(
    path: Path,
    config: ModelConfig,
    found: Mapping[str, tuple[GGMLType, tuple[int, ...]]],
    *,
    display: Callable[[str], str] = str,
) -> None:
    """Refuse a missing, unknown or misshapen tensor. `display` turns a GGUF name into the file's own."""
    unknown = set(found)
    for name, shape in expected_tensors(config):
        where = display(name)
        if name not in found:
            raise ModelFileError(path, "the tensor is missing", tensor=where)
        type_, actual = found[name]
        if actual != shape:
            raise ModelFileError(path, f"its shape is {actual}, by the configuration {shape}", tensor=where)
        if len(shape) == 1 and type_ not in _FLOAT_TYPES:
            raise ModelFileError(path, f"a vector of type {type_.name} (accepted: F32, F16, BF16)", tensor=where)
        if layer_kind(name) == STREAMS and type_ is not GGMLType.F32:
            raise ModelFileError(path, f"it is of type {type_.name} (accepted: F32)", tensor=where)
        unknown.discard(name)
    if unknown:
        name = min(unknown)
        reason = f"a tensor that the {config.architecture} architecture does not have here; it would be ignored"
        raise ModelFileError(path, reason, tensor=display(name))
