"""A ModelConfig from a Hugging Face config.json. No key is ever ignored: it is used, harmless, or refused by name.

Covers LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM and BitNetForCausalLM, as transformers 5
writes them (`rope_parameters`, `dtype`, `layer_types`) and as older versions did (`rope_theta`, `rope_scaling`,
`torch_dtype`).
Defaults are those of transformers' configuration classes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quant.config_rules import (
    ConfigValues,
    cap_to_window,
    check_config,
    default_head_dim,
    llama3_factors,
    scaled_factors,
)
from quant.errors import ModelFileError
from quant.model_types import Activation, Architecture, ModelConfig

_CLASSES: dict[str, Architecture] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "BitNetForCausalLM": "bitnet",
}
_USED = {
    "architectures",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "layer_types",
    "max_position_embeddings",
    "max_window_layers",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "tie_word_embeddings",
    "use_sliding_window",
    "vocab_size",
}
_HARMLESS = {  # training, text generation defaults, loading and reporting: nothing of it enters the forward pass
    "_attn_implementation_autoset",
    "_name_or_path",
    "attention_dropout",
    "attn_implementation",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "hidden_dropout",
    "id2label",
    "initializer_range",
    "is_llama_config",
    "label2id",
    "model_type",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "task_specific_params",
    "tokenizer_class",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "attention_bias": (False,),
    "auto_map": (  # Microsoft's checkpoints name the code that became transformers' own class
        {
            "AutoConfig": "configuration_bitnet.BitNetConfig",
            "AutoModelForCausalLM": "modeling_bitnet.BitNetForCausalLM",
        },
    ),
    "is_decoder": (False, True),
    "is_encoder_decoder": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1,),
    "pruned_heads": ({},),
    "rope_interleaved": (False,),
    "tie_encoder_decoder": (False,),
    "use_mrope": (False,),
}
_ROPE_KEYS = {
    "default": set[str](),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}


def _class_name(path: Path, config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in list(_CLASSES):
        reason = f"{names!r} is not supported (accepted: one of {', '.join(_CLASSES)})"
        raise ModelFileError(path, reason, tensor="architectures")
    return str(names[0])


def _check_keys(values: ConfigValues, config: Mapping[str, Any]) -> None:
    for key, value in config.items():
        if value is None or key in _USED or key in _HARMLESS:
            continue
        if key not in _NEUTRAL:
            raise values.error(key, "this configuration key is not implemented; it would be ignored")
        if value not in _NEUTRAL[key]:
            accepted = " or ".join(repr(neutral) for neutral in _NEUTRAL[key])
            raise values.error(key, f"{value!r} is not implemented (accepted: {accepted})")


def _rope(
    path: Path, values: ConfigValues, rope_dim: int, default_theta: float
) -> tuple[float, tuple[float, ...] | None]:
    """Base frequency and the frequencies' divisors."""
    key = "rope_parameters" if "rope_parameters" in values else "rope_scaling"
    if "rope_parameters" in values and "rope_scaling" in values:
        raise values.error("rope_scaling", "the configuration also has rope_parameters; give one of them")
    parameters = values.raw(key) or {}
    if not isinstance(parameters, dict):
        raise values.error(key, f"{parameters!r} is not an object")
    rope = ConfigValues(path, {f"{key}.{name}": value for name, value in parameters.items()}, f"{key}.")
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind not in _ROPE_KEYS:
        raise rope.error("rope_type", f"{kind!r} is not implemented (accepted: {', '.join(_ROPE_KEYS)})")
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *_ROPE_KEYS[kind]}
    for name, value in parameters.items():
        if value is not None and name not in known:
            raise rope.error(name, f"not implemented for the type {kind!r}; it would be ignored")
    if rope.raw("partial_rotary_factor") not in (None, 1):
        raise rope.error("partial_rotary_factor", f"{rope.raw('partial_rotary_factor')!r} is not implemented")
    theta = rope.number("rope_theta", values.number("rope_theta", default_theta))
    if kind == "linear":
        return theta, scaled_factors(None, rope.number("factor"), rope_dim)
    if kind == "default":
        return theta, None
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if low >= high:
        raise rope.error("low_freq_factor", f"{low} is not below the high factor {high}")
    original = rope.size("original_max_position_embeddings")
    factor = rope.number("factor")
    return theta, llama3_factors(
        rope_dim, theta, factor=factor, low_freq_factor=low, high_freq_factor=high, original_context=original
    )


def _sliding_window(values: ConfigValues, class_name: str) -> int | None:
    """The window if any layer has one. Mistral's default is 4096; Qwen's only counts with use_sliding_window."""
    layer_types = values.raw("layer_types")
    if layer_types is not None:
        known = ["full_attention", "sliding_attention"]
        if not isinstance(layer_types, list) or any(layer not in known for layer in layer_types):
            raise values.error("layer_types", "only full_attention and sliding_attention are implemented")
        if "sliding_attention" not in layer_types:
            return None
    elif class_name.startswith("Qwen"):  # layers from max_window_layers on have the window
        first, num_layers = values.raw("max_window_layers"), values.size("num_hidden_layers")
        if values.raw("use_sliding_window") is not True or (type(first) is int and first >= num_layers):
            return None
    return values.size("sliding_window") if "sliding_window" in values else None


def _activation(values: ConfigValues, architecture: Architecture) -> Activation:
    accepted: dict[str, Activation] = {"silu": "silu", "swish": "silu"}
    if architecture == "bitnet":
        accepted["relu2"] = "relu2"
    given = values.text("hidden_act", "relu2" if architecture == "bitnet" else "silu")
    if given not in accepted:
        raise values.error("hidden_act", f"{given!r} is not implemented here (accepted: {', '.join(accepted)})")
    return accepted[given]


def read_config(path: Path, config: Mapping[str, Any], name: str) -> tuple[ModelConfig, tuple[str, ...]]:
    """The configuration and notes for the log. Raises ModelFileError."""
    class_name = _class_name(path, config)
    architecture = _CLASSES[class_name]
    if class_name == "MistralForCausalLM" and "sliding_window" not in config:
        config = {**config, "sliding_window": 4096}
    values = ConfigValues(path, config)
    _check_keys(values, config)
    notes: list[str] = []
    hidden_size, num_heads = values.size("hidden_size"), values.size("num_attention_heads")
    if "head_dim" in values:
        head_dim = values.size("head_dim")
    else:
        head_dim = 128 if architecture == "qwen3" else default_head_dim(path, hidden_size, num_heads)
    is_bitnet = architecture == "bitnet"
    theta, factors = _rope(path, values, head_dim, 500000.0 if is_bitnet else 10000.0)
    tie = values.raw("tie_word_embeddings")
    if tie not in (None, True, False):
        raise values.error("tie_word_embeddings", f"{tie!r} is neither true nor false")
    result = ModelConfig(
        architecture=architecture,
        name=name,
        num_layers=values.size("num_hidden_layers"),
        hidden_size=hidden_size,
        intermediate_size=values.size("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=values.size("num_key_value_heads", num_heads if class_name == "LlamaForCausalLM" else None),
        head_dim=head_dim,
        vocab_size=values.size("vocab_size"),
        context_length=cap_to_window(
            values.size("max_position_embeddings"), _sliding_window(values, class_name), notes
        ),
        rms_norm_eps=values.number("rms_norm_eps", 1e-5 if is_bitnet else 1e-6),
        rope_theta=theta,
        rope_dim=head_dim,
        rope_freq_factors=factors,
        qkv_bias=architecture == "qwen2",
        qk_norm=architecture == "qwen3",
        tie_embeddings=bool(tie),
        sub_norms=is_bitnet,
        activation=_activation(values, architecture),
    )
    check_config(path, result)
    return result, tuple(notes)
