"""Tiny random models for tests, as a GGUF file or a Hugging Face directory, without torch or a download.

`write_tiny_gguf` and `write_tiny_hf` with the same arguments hold the same weights: those of
`tiny_weights`, with the rows of Q and K permuted for GGUF files of the llama architecture, as llama.cpp's converter
does. K-quants, which Python cannot quantize to, get random valid blocks instead.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from quant.formats import GGMLType
from tests.tiny_vocab import CHATML_TEMPLATE, SPECIAL_TOKENS, TinyVocab, byte_level_vocab, sentencepiece_vocab
from tests.tiny_weights import TinyShape, dequantize, interleave_rows, random_blocks, tiny_weights

__all__ = [
    "TinyShape",
    "bfloat16_bits",
    "dequantize",
    "hf_name",
    "interleave_rows",
    "random_blocks",
    "save_safetensors",
    "tiny_hf_config",
    "tiny_hf_tokenizer",
    "tiny_weights",
    "write_tiny_gguf",
    "write_tiny_hf",
]

K_QUANTS = (GGMLType.Q4_K, GGMLType.Q5_K, GGMLType.Q6_K)


def _add_tensor(
    writer: gguf.GGUFWriter, name: str, array: np.ndarray, type_: GGMLType, rng: np.random.Generator
) -> None:
    if array.ndim == 1 or type_ is GGMLType.F32 or name.endswith(".residual_streams"):
        writer.add_tensor(name, array)
    elif type_ is GGMLType.F16:
        writer.add_tensor(name, array.astype(np.float16))
    else:
        blocks = random_blocks(type_, array.shape, rng) if type_ in K_QUANTS else None
        number = gguf.GGMLQuantizationType(int(type_))
        writer.add_tensor(name, gguf.quants.quantize(array, number) if blocks is None else blocks, raw_dtype=number)


def _add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds.get(type(value), writer.add_array)(key, value)


def _add_tokenizer(writer: gguf.GGUFWriter, vocab: TinyVocab, pre: str | None, add_bos: bool) -> None:
    if vocab.merges:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre or "default")
        writer.add_token_merges(list(vocab.merges))
        ids = {"bos": 1, "eos": 2, "unk": 0, "pad": 2}
    else:
        writer.add_tokenizer_model("llama")
        writer.add_token_scores(list(vocab.scores))
        ids = {"bos": 1, "eos": 2, "unk": 0}
    writer.add_token_list(list(vocab.tokens))
    writer.add_token_types(list(vocab.token_types))
    for kind, token_id in ids.items():
        getattr(writer, f"add_{kind}_token_id")(token_id)
    writer.add_add_bos_token(add_bos)


def write_tiny_gguf(
    path: str | Path,
    *,
    linear_type: GGMLType = GGMLType.F32,
    embedding_type: GGMLType | None = None,
    tokenizer: str = "gpt2",
    pre: str = "smollm",
    add_bos: bool = False,
    chat_template: str | None = CHATML_TEMPLATE,
    rope_freqs: np.ndarray | None = None,
    seed: int = 0,
    metadata: Mapping[str, Any] | None = None,
    replace: Mapping[str, np.ndarray | None] | None = None,
    **shape_arguments: Any,
) -> Path:
    """Write a GGUF model; `shape_arguments` are TinyShape's fields, `tokenizer` is "gpt2" or "llama" (SentencePiece).

    `embedding_type` also holds for a separate output head (default: `linear_type`). For bad-input tests `metadata` adds
    or overrides keys (None drops one) and `replace` adds, replaces or drops (None) tensors, given as float32.
    """
    shape = TinyShape(**shape_arguments)
    arch = shape.architecture
    writer = gguf.GGUFWriter(str(path), arch)
    keys: dict[str, Any] = {
        "general.name": f"tiny {arch}",
        f"{arch}.block_count": shape.layers,
        f"{arch}.context_length": shape.context_length,
        f"{arch}.embedding_length": shape.hidden,
        f"{arch}.feed_forward_length": shape.ffn,
        f"{arch}.attention.head_count": shape.heads,
        f"{arch}.attention.head_count_kv": shape.kv_heads,
        f"{arch}.attention.layer_norm_rms_epsilon": shape.rms_norm_eps,
        f"{arch}.rope.freq_base": shape.rope_theta,
        f"{arch}.vocab_size": shape.vocab_size,
    }
    if shape.head_dim is not None:
        keys |= {f"{arch}.attention.key_length": shape.width, f"{arch}.attention.value_length": shape.width}
    if arch == "llama":
        keys[f"{arch}.rope.dimension_count"] = shape.width
    if shape.residual_streams != 1:
        keys["sterna.residual_streams"] = shape.residual_streams
    if chat_template is not None:
        keys["tokenizer.chat_template"] = chat_template
    for key, value in (keys | dict(metadata or {})).items():
        if value is not None:
            _add_value(writer, key, value)
    vocab = byte_level_vocab(shape.vocab_size) if tokenizer == "gpt2" else sentencepiece_vocab(shape.vocab_size)
    _add_tokenizer(writer, vocab, pre, add_bos)

    weights: dict[str, np.ndarray | None] = dict(tiny_weights(shape, seed))
    if arch == "llama":
        for name, array in weights.items():
            if array is not None and name.split(".")[-2] in ("attn_q", "attn_k"):
                weights[name] = interleave_rows(array, shape.width)
    if rope_freqs is not None:
        weights["rope_freqs.weight"] = np.asarray(rope_freqs, np.float32)
    rng = np.random.default_rng(seed + 1)
    for name, array in (weights | dict(replace or {})).items():
        if array is not None:
            is_vocab = name in ("token_embd.weight", "output.weight")
            kind = embedding_type if is_vocab and embedding_type is not None else linear_type
            _add_tensor(writer, name, array, kind, rng)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


_HF_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_sub_norm": "self_attn.attn_sub_norm",
    "ffn_sub_norm": "mlp.ffn_sub_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_HF_CLASSES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
_HF_CLASSES |= {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "bitnet": "BitNetForCausalLM"}


def hf_name(name: str) -> str:
    """The Hugging Face name of a tensor given by its GGUF name."""
    tops = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    tops["output.weight"] = "lm_head.weight"
    if name in tops:
        return tops[name]
    _, layer, kind, suffix = name.split(".")
    return f"model.layers.{layer}.{_HF_LAYER_NAMES[kind]}.{suffix}"


def bfloat16_bits(array: np.ndarray) -> np.ndarray:
    """float32 to bfloat16 (round to nearest even), as uint16."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def save_safetensors(path: Path, tensors: Mapping[str, np.ndarray], dtype: str) -> None:
    """Write tensors as "float32", "float16" or "bfloat16" (raw bytes: NumPy has no bfloat16)."""
    convert, code = {
        "float32": (lambda array: array.astype(np.float32), "F32"),
        "float16": (lambda array: array.astype(np.float16), "F16"),
        "bfloat16": (bfloat16_bits, "BF16"),
    }[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    body = b""
    for name, array in tensors.items():
        data = convert(array).tobytes()
        header[name] = {"dtype": code, "shape": list(array.shape), "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def tiny_hf_config(shape: TinyShape, dtype: str = "float32", *, legacy: bool = False) -> dict[str, Any]:
    """config.json as transformers 5 writes it, or 4 (`legacy`: rope_theta, torch_dtype)."""
    config: dict[str, Any] = {
        "architectures": [_HF_CLASSES[shape.architecture]],
        "model_type": shape.architecture,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.width,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.context_length,
        "rms_norm_eps": shape.rms_norm_eps,
        "hidden_act": "relu2" if shape.architecture == "bitnet" else "silu",
        "tie_word_embeddings": shape.tie,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "use_cache": True,
    }
    if shape.architecture in ("llama", "qwen3"):
        config["attention_bias"] = False
    if shape.architecture == "llama":
        config["mlp_bias"] = False
    if shape.architecture == "mistral":
        config["sliding_window"] = None
    if legacy:
        return config | {"rope_theta": shape.rope_theta, "rope_scaling": None, "torch_dtype": dtype}
    return config | {"rope_parameters": {"rope_theta": shape.rope_theta, "rope_type": "default"}, "dtype": dtype}


def tiny_hf_tokenizer(vocab_size: int = 384) -> Tokenizer:
    """The byte-level vocabulary as a `tokenizers` object with GPT-2's pre-tokenizer and single digits (smollm)."""
    vocab = byte_level_vocab(vocab_size)
    merges = [tuple(merge.split(" ")) for merge in vocab.merges]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocab.tokens)}, merges))
    digits = pre_tokenizers.Split(Regex(r"\p{N}"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def write_tiny_hf(
    path: str | Path,
    *,
    dtype: str = "float32",
    num_shards: int = 1,
    legacy: bool = False,
    chat_template: str | None = CHATML_TEMPLATE,
    seed: int = 0,
    config: Mapping[str, Any] | None = None,
    replace: Mapping[str, np.ndarray | None] | None = None,
    **shape_arguments: Any,
) -> Path:
    """Write a Hugging Face directory; `config` adds or overrides keys of config.json, `replace` as in GGUF."""
    shape = TinyShape(**shape_arguments)
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    weights: dict[str, np.ndarray | None] = dict(tiny_weights(shape, seed))
    tensors = {hf_name(n): array for n, array in (weights | dict(replace or {})).items() if array is not None}
    names = sorted(tensors)
    shards = [names[i::num_shards] for i in range(num_shards)]
    files = ["model.safetensors"]
    if num_shards > 1:
        files = [f"model-{i + 1:05}-of-{num_shards:05}.safetensors" for i in range(num_shards)]
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    for file, shard in zip(files, shards, strict=True):
        save_safetensors(directory / file, {name: tensors[name] for name in shard}, dtype)
    full_config = tiny_hf_config(shape, dtype, legacy=legacy) | dict(config or {})
    (directory / "config.json").write_text(json.dumps(full_config, indent=2))
    generation = {"bos_token_id": 1, "eos_token_id": [2, 0], "pad_token_id": 2}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    tiny_hf_tokenizer(shape.vocab_size).save(str(directory / "tokenizer.json"))
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>"}
    tokenizer_config |= {"eos_token": "<|im_end|>", "unk_token": "<|endoftext|>", "pad_token": "<|im_end|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    if chat_template is not None:
        (directory / "chat_template.jinja").write_text(chat_template)
    return directory
