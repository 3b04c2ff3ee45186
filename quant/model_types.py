"""What a model file gives its reader, whatever format it had: sizes, tensors by GGUF name, tokenizer, digest.

Plain data; `gguf_model.py` and `hf_directory.py` fill it in, `model_file.open_model` picks between them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from quant.formats import GGMLType
from quant.mapping import MappedFile

Architecture = Literal["llama", "qwen2", "qwen3", "bitnet"]
Activation = Literal["silu", "relu2"]
Quantize = Literal["q8_0", "q4_0"]


@dataclass(frozen=True)
class ModelConfig:
    """The sizes and constants of a model; everything that its forward pass depends on beside the tensors."""

    architecture: Architecture
    name: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    rms_norm_eps: float
    rope_theta: float
    rope_dim: int
    """Leading elements of each head that are rotated: head_dim, or fewer."""
    rope_freq_factors: tuple[float, ...] | None
    """rope_dim/2 numbers that divide the rotary frequencies (Llama 3's; linear scaling is folded in)."""
    qkv_bias: bool
    qk_norm: bool
    tie_embeddings: bool
    sub_norms: bool = False
    """An RMSNorm before o_proj and one before down_proj (BitNet)."""
    activation: Activation = "silu"
    """Of the gate; relu2 is max(x, 0) squared."""
    residual_streams: int = 1
    """1, or 2 that are mixed between the sublayers; `StreamMix` in quant/kernels/kernels.h says how."""

    @property
    def row_scales(self) -> bool:
        """Whether activations into a layer's matrices have one scale a row, as BitNet is trained, not one per 32."""
        return self.architecture == "bitnet"

    def projection_shape(self, projection: str) -> tuple[int, int]:
        """(rows out, columns in) of one of the seven matrices of a layer, by its name in transformers and PEFT."""
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "q_proj": (queries, self.hidden_size),
            "k_proj": (keys, self.hidden_size),
            "v_proj": (keys, self.hidden_size),
            "o_proj": (self.hidden_size, queries),
            "gate_proj": (self.intermediate_size, self.hidden_size),
            "up_proj": (self.intermediate_size, self.hidden_size),
            "down_proj": (self.hidden_size, self.intermediate_size),
        }[projection]


class TensorData(Protocol):
    """Where a tensor's bytes come from."""

    def read(self) -> np.ndarray: ...

    def release(self) -> None: ...


@dataclass(frozen=True, eq=False)
class Tensor:
    """One weight, named as in GGUF files. `shape` is in NumPy order: (rows, columns) or (n,)."""

    name: str
    type: GGMLType
    shape: tuple[int, ...]
    rope_interleaved: bool
    """Its rows (Q or K) are in the interleaved order of llama-architecture GGUF files; the engine un-permutes them."""
    data: TensorData = field(repr=False)

    def read(self) -> np.ndarray:
        """The bytes: uint8, 1-D, contiguous. A view of the mapped file, or quantized on the way."""
        return self.data.read()

    def release(self) -> None:
        """Give the mapped pages back, once the bytes have been copied or repacked."""
        self.data.release()


@dataclass(frozen=True)
class TokenizerSource:
    """What the model says of its tokenizer.

    gguf: `metadata` holds every `tokenizer.*` key without that prefix. hf: it is tokenizer_config.json with
    "chat_template" (from chat_template.jinja if there is one) and "generation_config" put in, and `tokenizer_json` is
    the text of tokenizer.json.
    """

    kind: Literal["gguf", "hf"]
    metadata: Mapping[str, Any]
    tokenizer_json: str | None = None


@dataclass(frozen=True)
class ModelFile:
    """An open model. `notes` are remarks for the log, such as a context that had to be capped."""

    path: Path
    config: ModelConfig
    tensors: dict[str, Tensor]
    tokenizer: TokenizerSource
    notes: tuple[str, ...]
    mappings: Sequence[MappedFile] = field(repr=False)
    compute_digest: Callable[[], str] = field(repr=False)

    @cached_property
    def digest(self) -> str:
        """`sha256:<hex>` of the contents; reads the whole file unless the digest cache knows it."""
        return self.compute_digest()

    def close(self) -> None:
        """Unmap the files; tensors cannot be read afterwards."""
        for mapping in self.mappings:
            mapping.close()
