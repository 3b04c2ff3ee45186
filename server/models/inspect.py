"""What is in a model: architecture, sizes, tensor types, tokenizer and template, as one plain dictionary.

Opens the model as the server would, so a model that cannot be served is refused here with the same words. Reads no
weights.
"""

from collections import Counter
from pathlib import Path
from typing import Any

from quant.formats import BLOCK
from quant.model_file import ModelFile, open_model
from server.kv_budget import kv_bytes_per_token


def fingerprint(digest: str) -> str:
    """A model's `system_fingerprint` in answers, by its digest ("sha256:..."; empty: not known)."""
    return "fp_" + digest.removeprefix("sha256:")[:16]


def inspect_model(path: Path) -> dict[str, Any]:
    """JSON-ready. Raises ModelFileError."""
    model = open_model(path)
    try:
        return _describe(model)
    finally:
        model.close()


def _describe(model: ModelFile) -> dict[str, Any]:
    config = model.config
    num_tensors: Counter[str] = Counter()
    num_elements: Counter[str] = Counter()
    num_bytes: Counter[str] = Counter()
    for tensor in model.tensors.values():
        elements = 1
        for size in tensor.shape:
            elements *= size
        block_elements, block_bytes = BLOCK[tensor.type]
        num_tensors[tensor.type.name] += 1
        num_elements[tensor.type.name] += elements
        num_bytes[tensor.type.name] += elements // block_elements * block_bytes
    metadata = model.tokenizer.metadata
    return {
        "path": str(model.path),
        "name": config.name,
        "architecture": config.architecture,
        "digest": model.digest,
        "system_fingerprint": fingerprint(model.digest),
        "num_parameters": sum(num_elements.values()),
        "weight_bytes": sum(num_bytes.values()),
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "context_length": config.context_length,
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_freq_factors is not None,
        "qkv_bias": config.qkv_bias,
        "qk_norm": config.qk_norm,
        "sub_norms": config.sub_norms,
        "activation": config.activation,
        "residual_streams": config.residual_streams,
        "tie_embeddings": config.tie_embeddings,
        "kv_bytes_per_token": kv_bytes_per_token(config),
        "tensor_types": [
            {
                "type": name,
                "num_tensors": num_tensors[name],
                "num_parameters": num_elements[name],
                "bytes": num_bytes[name],
            }
            for name in sorted(num_bytes, key=num_bytes.__getitem__, reverse=True)
        ],
        "tokenizer": {
            "kind": model.tokenizer.kind,
            "model": metadata.get("ggml.model") or metadata.get("tokenizer_class"),
            "pre": metadata.get("ggml.pre"),
            "has_chat_template": bool(metadata.get("chat_template")),
        },
    }
