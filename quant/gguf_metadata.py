"""What a model's GGUF file says beside its tensors: a ModelConfig and a tokenizer as metadata that llama.cpp reads.

The opposite of `gguf_config.py` (and, for the tokenizer, of server/text/gguf_source.py): what is written here is read
there as the same configuration, which a test proves. Also: all values of an open GGUF file, to be written again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from quant.errors import ModelFileError
from quant.formats import GGMLType
from quant.gguf_config import RESIDUAL_STREAMS
from quant.gguf_reader import GGUFHeader
from quant.gguf_writer import RawValue, TensorSource
from quant.model_types import ModelConfig

_QUANTIZATION_VERSION = 2  # ggml's GGML_QNT_VERSION, which its block layouts have had since May 2023
_FILE_TYPES = {  # llama.cpp's llama_ftype: only a label
    GGMLType.F32: 0,
    GGMLType.F16: 1,
    GGMLType.Q4_0: 2,
    GGMLType.Q4_1: 3,
    GGMLType.Q8_0: 7,
    GGMLType.BF16: 32,
    GGMLType.TQ1_0: 36,
    GGMLType.TQ2_0: 37,
}
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class BPEVocabulary:
    """A byte-level BPE tokenizer, as `tokenizer.ggml.model = "gpt2"` describes it."""

    tokens: Sequence[str]
    """In the order of their ids, bytes in GPT-2's printable characters."""
    merges: Sequence[str]
    """"left right", in the order of their ranks."""
    token_types: Sequence[int]
    """1 normal, 3 control, 4 user-defined, 5 unused."""
    pre: str
    """How text is cut into words: a name in server/text/pretokenizers.py."""
    bos_id: int | None = None
    eos_id: int | None = None
    unknown_id: int | None = None
    padding_id: int | None = None
    add_bos: bool = False
    chat_template: str | None = None

    def metadata(self) -> dict[str, Any]:
        assert len(self.tokens) == len(self.token_types), (len(self.tokens), len(self.token_types))
        values: dict[str, Any] = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": self.pre,
            "tokenizer.ggml.tokens": self.tokens,
            "tokenizer.ggml.token_type": self.token_types,
            "tokenizer.ggml.merges": self.merges,
            "tokenizer.ggml.bos_token_id": self.bos_id,
            "tokenizer.ggml.eos_token_id": self.eos_id,
            "tokenizer.ggml.unknown_token_id": self.unknown_id,
            "tokenizer.ggml.padding_token_id": self.padding_id,
            "tokenizer.ggml.add_bos_token": self.add_bos,
            "tokenizer.chat_template": self.chat_template,
        }
        return {key: value for key, value in values.items() if value is not None}


def config_metadata(config: ModelConfig, main_type: GGMLType) -> dict[str, Any]:
    """Every key of the architecture; `main_type` is the type that most weights have, which labels the file.

    Rotary factors that differ are a tensor: `rope_factor_tensors`. Raises ModelFileError for a configuration that
    such a file cannot hold.
    """
    arch = config.architecture
    values: dict[str, Any] = {
        "general.architecture": arch,
        "general.type": "model",
        "general.name": config.name,
        "general.file_type": _FILE_TYPES[main_type],
        "general.quantization_version": _QUANTIZATION_VERSION,
        f"{arch}.block_count": config.num_layers,
        f"{arch}.context_length": config.context_length,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_heads,
        f"{arch}.attention.head_count_kv": config.num_kv_heads,
        f"{arch}.attention.key_length": config.head_dim,
        f"{arch}.attention.value_length": config.head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{arch}.rope.dimension_count": config.rope_dim,
        f"{arch}.rope.freq_base": config.rope_theta,
        f"{arch}.vocab_size": config.vocab_size,
    }
    if arch == "bitnet":
        values[f"{arch}.hidden_activation"] = config.activation
    if config.residual_streams != 1:
        values[RESIDUAL_STREAMS] = config.residual_streams
    factors = set(config.rope_freq_factors or ())
    if len(factors) == 1:
        values |= {f"{arch}.rope.scaling.type": "linear", f"{arch}.rope.scaling.factor": factors.pop()}
    elif factors and arch != "llama":
        raise ModelFileError(config.name, f"rotary factors that differ have no place in a GGUF file of {arch}")
    return values


def file_type_metadata(main_type: GGMLType) -> dict[str, Any]:
    """The labels to renew when the tensors of a file get other types."""
    return {
        "general.file_type": _FILE_TYPES[main_type],
        "general.quantization_version": _QUANTIZATION_VERSION,
    }


def rope_factor_tensors(config: ModelConfig) -> list[TensorSource]:
    """Llama 3's factors as the tensor that llama.cpp expects; empty for a model without (or with equal ones)."""
    if len(set(config.rope_freq_factors or ())) < 2:
        return []
    data = np.asarray(config.rope_freq_factors, np.float32)
    return [TensorSource(ROPE_FACTORS, GGMLType.F32, data.shape, lambda: (data.tobytes(),))]


def copied_metadata(header: GGUFHeader, data: Any) -> dict[str, Any]:
    """Every value of an open file as its bytes in `data`, the whole file."""
    return {key: RawValue(bytes(data[start:end])) for key, (start, end) in header.spans.items()}
