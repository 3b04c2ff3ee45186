"""Open a GGUF file as a model: the header read and checked, the tensors left in the mapped file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from quant.bitnet_import import I2STensor
from quant.digest import mapped_digest
from quant.errors import ModelFileError
from quant.formats import GGMLType
from quant.gguf_config import read_architecture, read_config
from quant.gguf_metadata import ROPE_FACTORS
from quant.gguf_reader import GGUFTensorInfo, read_header
from quant.mapping import MappedBytes, MappedFile
from quant.model_types import ModelFile, Tensor, TensorData, TokenizerSource
from quant.tensor_rules import EMBEDDING, HEAD, check_tensors, is_query_or_key, layer_kind

_TOKENIZER_PREFIX = "tokenizer."
_MAXROPE_FACTORS = 65536  # far above any head; bounds what is read before the configuration is known


def open_gguf(path: Path, *, digest_cache: Path | None = None) -> ModelFile:
    """Map and check a GGUF file; reads no weights but Llama 3's rotary factors. Raises ModelFileError."""
    mapping = MappedFile(path)
    try:
        return _open(mapping, path, digest_cache)
    except ModelFileError:
        mapping.close()
        raise


def _open(mapping: MappedFile, path: Path, digest_cache: Path | None) -> ModelFile:
    header = read_header(mapping.data, path)
    metadata, infos = header.metadata, dict(header.tensors)
    architecture = read_architecture(path, metadata)
    if EMBEDDING not in infos:
        raise ModelFileError(path, "the tensor is missing", tensor=EMBEDDING)
    rope_factors = _pop_rope_factors(mapping, infos) if architecture == "llama" else None
    for name in [name for name in infos if (layer_kind(name) or "").startswith("attn_rot_embd")]:
        del infos[name]  # the rotary frequencies once more, in files of 2023; llama.cpp skips them too
    kinds = {layer_kind(name) for name in infos}
    config, notes = read_config(
        path,
        metadata,
        vocab_size=infos[EMBEDDING].shape[0],
        rope_factors=rope_factors,
        qkv_bias=architecture == "qwen2" or "attn_q.bias" in kinds,
        qk_norm=architecture == "qwen3",
        tie_embeddings=HEAD not in infos,
    )
    check_tensors(path, config, {name: (info.type, info.shape) for name, info in infos.items()})
    _check_vocabulary(path, metadata, config.vocab_size)
    interleaved = architecture == "llama"
    tensors = {
        name: Tensor(
            name,
            info.type,
            info.shape,
            rope_interleaved=interleaved and is_query_or_key(name),
            data=_data(mapping, info),
        )
        for name, info in infos.items()
    }
    tokenizer = {
        key.removeprefix(_TOKENIZER_PREFIX): value
        for key, value in metadata.items()
        if key.startswith(_TOKENIZER_PREFIX)
    }
    return ModelFile(
        path=path,
        config=config,
        tensors=tensors,
        tokenizer=TokenizerSource("gguf", tokenizer),
        notes=notes,
        mappings=(mapping,),
        compute_digest=lambda: f"sha256:{mapped_digest(mapping, digest_cache)}",
    )


def _data(mapping: MappedFile, info: GGUFTensorInfo) -> TensorData:
    data = MappedBytes(mapping, info.offset, info.num_bytes)
    return I2STensor(info.name, info.shape, data) if info.is_i2_s else data


def _pop_rope_factors(mapping: MappedFile, infos: dict[str, GGUFTensorInfo]) -> tuple[float, ...] | None:
    """Llama 3's `rope_freqs.weight`: it divides the rotary frequencies. `check_config` checks number and values."""
    info = infos.pop(ROPE_FACTORS, None)
    if info is None:
        return None
    if info.type is not GGMLType.F32 or len(info.shape) != 1 or info.shape[0] > _MAXROPE_FACTORS:
        reason = f"{info.type.name} of shape {info.shape}; a short F32 vector is accepted"
        raise ModelFileError(mapping.path, reason, tensor=ROPE_FACTORS)
    factors: list[float] = MappedBytes(mapping, info.offset, info.num_bytes).read().view(np.float32).tolist()
    return tuple(factors)


def _check_vocabulary(path: Path, metadata: Mapping[str, Any], vocab_size: int) -> None:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) > vocab_size:
        reason = f"{len(tokens)} tokens for an embedding of {vocab_size} rows"
        raise ModelFileError(path, reason, tensor="tokenizer.ggml.tokens")
