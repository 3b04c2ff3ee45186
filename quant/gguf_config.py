"""A ModelConfig from GGUF metadata. No key of the architecture is ever ignored: it is used, harmless, or refused.

Covers llama (SmolLM2, Llama 2 and 3.x, Mistral), qwen2, qwen3, and BitNet as llama.cpp (`bitnet`) and bitnet.cpp
(`bitnet-b1.58`) name it. Meanings are llama.cpp's (llama-model.cpp); `sterna.residual_streams` is ours.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from quant.config_rules import ConfigValues, cap_to_window, check_config, default_head_dim, scaled_factors
from quant.errors import ModelFileError
from quant.model_types import Activation, Architecture, ModelConfig

_B158 = "bitnet-b1.58"
ARCHITECTURES: dict[str, Architecture] = {name: name for name in get_args(Architecture)} | {_B158: "bitnet"}
"""By the file's name for it, which is also the prefix of its keys."""
RESIDUAL_STREAMS = "sterna.residual_streams"

_USED = {
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.scale",
    "attention.sliding_window",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "hidden_activation",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.factor",
    "rope.scaling.type",
}
_HARMLESS = {
    "rope.scaling.finetuned",  # a remark on the training
    "rope.scaling.original_context_length",  # only yarn computes with it, and yarn is refused
    "vocab_size",  # the embedding's rows decide
}
_NEUTRAL: dict[str, tuple[Any, ...]] = {  # keys that other models of these architectures use, at values that do nothing
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "pooling_type": (0,),
    "residual_scale": (0, 1),
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.yarn_log_multiplier": (0,),
    "tensor_data_layout": ("Meta AI original pth",),  # the interleaved order of Q and K that is assumed anyway
    "use_parallel_residual": (False,),
}


def read_architecture(path: Path, metadata: Mapping[str, Any]) -> Architecture:
    """The architecture, or ModelFileError for one that cannot be served (or a file that is no whole model)."""
    values = ConfigValues(path, metadata)
    kind = values.text("general.type", "model")
    if kind != "model":
        raise values.error("general.type", f"this file holds a {kind!r}, not a model")
    if metadata.get("split.count", 1) not in (0, 1):
        raise values.error("split.count", "one part of a split model; join the parts first (llama-gguf-split --merge)")
    name = values.text("general.architecture")
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    accepted = ", ".join(ARCHITECTURES)
    raise values.error("general.architecture", f"architecture {name!r} is not supported (accepted: {accepted})")


def _check_keys(values: ConfigValues, path: Path, metadata: Mapping[str, Any], prefix: str) -> None:
    for full_key, value in metadata.items():
        key = full_key.removeprefix(prefix)
        if key == full_key or key in _USED or key in _HARMLESS:
            continue
        if key not in _NEUTRAL:
            raise ModelFileError(path, "this metadata key is not implemented; it would be ignored", tensor=full_key)
        if value not in _NEUTRAL[key]:
            accepted = " or ".join(repr(neutral) for neutral in _NEUTRAL[key])
            raise values.error(key, f"{value!r} is not implemented (accepted: {accepted})")


def _head_dim(values: ConfigValues, path: Path, hidden_size: int, num_heads: int) -> int:
    if "attention.key_length" not in values and "attention.value_length" not in values:
        return default_head_dim(path, hidden_size, num_heads)
    default = hidden_size // num_heads or None
    key_length = values.size("attention.key_length", default)
    value_length = values.size("attention.value_length", default)
    if key_length != value_length:
        raise values.error("attention.value_length", f"{value_length} differs from the key length {key_length}")
    return key_length


def _linear_scale(values: ConfigValues) -> float:
    """What positions are divided by. As in llama.cpp: no type means linear, a factor of 0 means 1."""
    scaling = values.text("rope.scaling.type", "linear")
    if scaling not in ("none", "linear"):
        raise values.error("rope.scaling.type", f"{scaling!r} is not implemented (accepted: none, linear)")
    key = "rope.scaling.factor" if "rope.scaling.factor" in values else "rope.scale_linear"
    if scaling == "none" or key not in values or values.raw(key) == 0:
        return 1.0
    return values.number(key)


def _sliding_window(values: ConfigValues) -> int | None:
    if values.raw("attention.sliding_window") in (None, 0):
        return None
    return values.size("attention.sliding_window")


def _activation(values: ConfigValues, name: str) -> Activation:
    """llama.cpp's default for `bitnet` is SiLU, as its first models had; bitnet.cpp's graph always squares a ReLU."""
    accepted: tuple[Activation, ...] = ("silu", "relu2") if ARCHITECTURES[name] == "bitnet" else ("silu",)
    given = values.text("hidden_activation", "relu2" if name == _B158 else "silu")
    for activation in accepted:
        if given == activation:
            return activation
    reason = f"{given!r} is not implemented for {name} (accepted: {', '.join(accepted)})"
    raise values.error("hidden_activation", reason)


def _residual_streams(values: ConfigValues) -> int:
    streams = values.size(RESIDUAL_STREAMS, 1)
    if streams > 2:
        raise values.error(RESIDUAL_STREAMS, f"{streams} residual streams are not implemented (accepted: 1, 2)")
    return streams


def read_config(
    path: Path,
    metadata: Mapping[str, Any],
    *,
    vocab_size: int,
    rope_factors: tuple[float, ...] | None,
    qkv_bias: bool,
    qk_norm: bool,
    tie_embeddings: bool,
) -> tuple[ModelConfig, tuple[str, ...]]:
    """The configuration and notes for the log. The arguments are what the tensors tell. Raises ModelFileError."""
    architecture = read_architecture(path, metadata)
    name = str(metadata["general.architecture"])
    values, general = ConfigValues(path, metadata, f"{name}."), ConfigValues(path, metadata)
    _check_keys(values, path, metadata, f"{name}.")
    notes: list[str] = []
    hidden_size, num_heads = values.size("embedding_length"), values.size("attention.head_count")
    head_dim = _head_dim(values, path, hidden_size, num_heads)
    rope_dim = values.size("rope.dimension_count", head_dim)
    scale = values.raw("attention.scale")
    if scale not in (None, 0) and not (isinstance(scale, float) and math.isclose(scale, head_dim**-0.5, rel_tol=1e-6)):
        raise values.error("attention.scale", f"{scale!r} is not implemented (accepted: 1/sqrt({head_dim}))")
    config = ModelConfig(
        architecture=architecture,
        name=general.text("general.name", path.stem),
        num_layers=values.size("block_count"),
        hidden_size=hidden_size,
        intermediate_size=values.size("feed_forward_length"),
        num_heads=num_heads,
        num_kv_heads=values.size("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        vocab_size=vocab_size,
        context_length=cap_to_window(values.size("context_length"), _sliding_window(values), notes),
        rms_norm_eps=values.number("attention.layer_norm_rms_epsilon"),
        rope_theta=values.number("rope.freq_base", 10000.0),
        rope_dim=rope_dim,
        rope_freq_factors=scaled_factors(rope_factors, _linear_scale(values), rope_dim),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        tie_embeddings=tie_embeddings,
        sub_norms=architecture == "bitnet",
        activation=_activation(values, name),
        residual_streams=_residual_streams(general),
    )
    check_config(path, config)
    return config, tuple(notes)
