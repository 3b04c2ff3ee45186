"""Sizes and random weights of the tiny models in tests, and the slow, obvious twin of unpacking them."""

from dataclasses import dataclass

import gguf
import numpy as np

from quant.formats import BLOCK, GGMLType


@dataclass(frozen=True)
class TinyShape:
    """The sizes of a tiny model. None for `qkv_bias` and `qk_norm`: as the architecture has it."""

    architecture: str = "llama"
    hidden: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int | None = None
    ffn: int = 128
    vocab_size: int = 384
    context_length: int = 256
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    tie: bool = True
    qkv_bias: bool | None = None
    qk_norm: bool | None = None
    residual_streams: int = 1

    @property
    def width(self) -> int:
        """Elements of one head."""
        return self.head_dim or self.hidden // self.heads

    @property
    def has_bias(self) -> bool:
        """Whether Q, K and V have biases."""
        return self.architecture == "qwen2" if self.qkv_bias is None else self.qkv_bias

    @property
    def has_qk_norm(self) -> bool:
        """Whether Q and K are normalized per head."""
        return self.architecture == "qwen3" if self.qk_norm is None else self.qk_norm

    @property
    def has_sub_norms(self) -> bool:
        """Whether attention's output and the gated activations are normalized (bitnet, bitnet-b1.58)."""
        return self.architecture.startswith("bitnet")


def tiny_weights(shape: TinyShape, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 weights by GGUF name, Q and K rows in Hugging Face (half-split) order."""
    rng = np.random.default_rng(seed)
    q_rows, kv_rows = shape.heads * shape.width, shape.kv_heads * shape.width

    def linear(rows: int, columns: int) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)

    def vector(size: int, mean: float) -> np.ndarray:
        return (mean + 0.1 * rng.standard_normal(size)).astype(np.float32)

    weights = {
        "token_embd.weight": linear(shape.vocab_size, shape.hidden),
        "output_norm.weight": vector(shape.hidden, 1),
    }
    if not shape.tie:
        weights["output.weight"] = linear(shape.vocab_size, shape.hidden)
    for i in range(shape.layers):
        layer = {
            "attn_norm.weight": vector(shape.hidden, 1),
            "attn_q.weight": linear(q_rows, shape.hidden),
            "attn_k.weight": linear(kv_rows, shape.hidden),
            "attn_v.weight": linear(kv_rows, shape.hidden),
            "attn_output.weight": linear(shape.hidden, q_rows),
            "ffn_norm.weight": vector(shape.hidden, 1),
            "ffn_gate.weight": linear(shape.ffn, shape.hidden),
            "ffn_up.weight": linear(shape.ffn, shape.hidden),
            "ffn_down.weight": linear(shape.hidden, shape.ffn),
        }
        if shape.has_bias:
            layer |= {"attn_q.bias": vector(q_rows, 0), "attn_k.bias": vector(kv_rows, 0)}
            layer |= {"attn_v.bias": vector(kv_rows, 0)}
        if shape.has_qk_norm:
            layer |= {"attn_q_norm.weight": vector(shape.width, 1), "attn_k_norm.weight": vector(shape.width, 1)}
        if shape.has_sub_norms:
            layer |= {"attn_sub_norm.weight": vector(q_rows, 1), "ffn_sub_norm.weight": vector(shape.ffn, 1)}
        if shape.residual_streams == 2:  # alpha, pre 0, pre 1, post 0, post 1 for attention and for the FFN
            values = rng.standard_normal((2, 5)) * [2, 0.3, 0.3, 0.3, 0.3] + [0, 0.5, 0.5, 1, 1]
            layer |= {"residual_streams": values.astype(np.float32)}
        weights |= {f"blk.{i}.{name}": array for name, array in layer.items()}
    return weights


def interleave_rows(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Q or K rows (or bias) from half-split to interleaved order: row j + s*head_dim/2 goes to 2j + s, in each head."""
    split = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(rows.shape)


def random_blocks(type_: GGMLType, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Valid K-quant blocks (uint8, rows x row bytes) whose weights are near 1/sqrt(columns) in size."""
    elements, size = BLOCK[type_]
    blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // elements, size), dtype=np.uint8)
    typical = {GGMLType.Q4_K: 240.0, GGMLType.Q5_K: 480.0, GGMLType.Q6_K: 1200.0}[type_]  # mean |weight| at scale 1
    scale = np.float16(1 / (typical * np.sqrt(shape[-1])))
    if type_ is GGMLType.Q6_K:
        blocks[..., -2:] = np.frombuffer(scale.tobytes(), np.uint8)
    else:
        minimum = np.float16(scale * (7.5 if type_ is GGMLType.Q4_K else 15.5))
        blocks[..., :4] = np.frombuffer(scale.tobytes() + minimum.tobytes(), np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def dequantize(data: np.ndarray, type_: GGMLType, shape: tuple[int, ...]) -> np.ndarray:
    """float32 values of a tensor's bytes, by the `gguf` package: the slow, obvious twin."""
    if type_ in (GGMLType.F32, GGMLType.F16):
        return data.view(np.float32 if type_ is GGMLType.F32 else np.float16).astype(np.float32).reshape(shape)
    rows = data.reshape(*shape[:-1], -1)
    return gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(int(type_))).reshape(shape)
