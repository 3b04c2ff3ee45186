"""Tensor names of Hugging Face Llama, Mistral, Qwen2, Qwen3 and BitNet models, and GGUF's names for the same."""

import re

_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.attn_sub_norm": "attn_sub_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.ffn_sub_norm": "ffn_sub_norm",
    "mlp.down_proj": "ffn_down",
}
_TOP_BACK = {gguf: hf for hf, gguf in _TOP.items()}
_LAYER_BACK = {gguf: hf for hf, gguf in _LAYER.items()}
_HF_LAYER = re.compile(r"model\.layers\.(0|[1-9]\d{0,5})\.(.+)\.(weight|bias)")
_GGUF_LAYER = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)")

IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)
"""Buffers that old transformers saved; they follow from the configuration."""


def gguf_name(name: str) -> str | None:
    """The GGUF name, None for a tensor that these models do not have."""
    if name in _TOP:
        return _TOP[name]
    match = _HF_LAYER.fullmatch(name)
    if match is None or match[2] not in _LAYER:
        return None
    return f"blk.{match[1]}.{_LAYER[match[2]]}.{match[3]}"


def hf_name(name: str) -> str:
    """The Hugging Face name for a GGUF name (the name itself if there is none)."""
    if name in _TOP_BACK:
        return _TOP_BACK[name]
    match = _GGUF_LAYER.fullmatch(name)
    if match is None or match[2] not in _LAYER_BACK:
        return name
    return f"model.layers.{match[1]}.{_LAYER_BACK[match[2]]}.{match[3]}"
