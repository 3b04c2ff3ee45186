"""The forward pass written a second time, slowly, in NumPy: the core's twin on tiny random models.

Weights are drawn once, given to the core as F32 (float kernels) or as quantized GGUF blocks, and dequantized here.
"""

from dataclasses import dataclass, field

import gguf
import numpy as np

import _sterna
from quant.formats import GGMLType

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Shape:
    layers: int = 2
    hidden: int = 64
    ffn: int = 96
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    vocab: int = 101
    rope_dim: int = 16
    qkv_bias: bool = False
    qk_norm: bool = False
    rope_factors: tuple[float, ...] = ()
    sub_norms: bool = False
    squared_relu: bool = False
    row_scales: bool = False
    two_streams: bool = False

    def size(self, projection: str) -> tuple[int, int]:
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (q, self.hidden),
            "k_proj": (kv, self.hidden),
            "v_proj": (kv, self.hidden),
            "o_proj": (self.hidden, q),
            "down_proj": (self.hidden, self.ffn),
        }.get(projection, (self.ffn, self.hidden))


@dataclass
class Twin:
    shape: Shape
    kind: GGMLType = GGMLType.F32
    seed: int = 0
    weights: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)
    blocks: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rng, s = np.random.default_rng(self.seed), self.shape
        self._matrix(rng, "embedding", -1, s.vocab, s.hidden, 1.0)
        for i in range(s.layers):
            for name in PROJECTIONS:
                rows, cols = s.size(name)
                self._matrix(rng, name, i, rows, cols, 1.5 / np.sqrt(cols))
            self._vector(rng, "attn_norm", i, s.hidden)
            self._vector(rng, "ffn_norm", i, s.hidden)
            if s.qk_norm:
                self._vector(rng, "q_norm", i, s.head_dim)
                self._vector(rng, "k_norm", i, s.head_dim)
            if s.qkv_bias:
                self._vector(rng, "q_bias", i, s.heads * s.head_dim)
                self._vector(rng, "k_bias", i, s.kv_heads * s.head_dim)
                self._vector(rng, "v_bias", i, s.kv_heads * s.head_dim)
            if s.sub_norms:
                self._vector(rng, "attn_sub_norm", i, s.heads * s.head_dim)
                self._vector(rng, "ffn_sub_norm", i, s.ffn)
            if s.two_streams:  # alpha, pre0, pre1, post0, post1 for attention, then for the FFN
                values = rng.standard_normal((2, 5)) * [2, 0.3, 0.3, 0.3, 0.3] + [0, 0.5, 0.5, 1, 1]
                self.weights["streams", i] = values.astype(np.float32).reshape(-1)
        self._vector(rng, "output_norm", -1, s.hidden)

    def _matrix(self, rng: np.random.Generator, name: str, layer: int, rows: int, cols: int, scale: float) -> None:
        values = (rng.standard_normal((rows, cols)) * scale).astype(np.float32)
        kind = gguf.GGMLQuantizationType(int(self.kind))
        data = gguf.quants.quantize(values, kind)
        self.blocks[name, layer] = np.ascontiguousarray(data).view(np.uint8).reshape(-1)
        self.weights[name, layer] = np.asarray(gguf.quants.dequantize(data, kind), np.float32).reshape(rows, cols)

    def _vector(self, rng: np.random.Generator, name: str, layer: int, n: int) -> None:
        self.weights[name, layer] = (1 + 0.3 * rng.standard_normal(n)).astype(np.float32)

    def core(self, *, isa: str = "auto", threads: int = 1, num_blocks: int = 64, **limits: int) -> "_sterna.Core":
        s = self.shape
        model = _sterna.Model(
            num_layers=s.layers,
            hidden=s.hidden,
            ffn=s.ffn,
            num_heads=s.heads,
            num_kv_heads=s.kv_heads,
            head_dim=s.head_dim,
            vocab=s.vocab,
            rope_dim=s.rope_dim,
            max_positions=1024,
            rms_norm_eps=1e-5,
            rope_theta=10000.0,
            rope_factors=list(s.rope_factors),
            squared_relu=s.squared_relu,
            row_scales=s.row_scales,
            two_streams=s.two_streams,
            isa=isa,
            num_threads=threads,
        )
        for (name, layer), values in self.weights.items():
            if values.ndim == 1:
                model.add_vector(name, layer, values)
            else:
                model.add_matrix(name, layer, int(self.kind), self.blocks[name, layer], *values.shape)
        model.finish()
        limits = {"max_num_seqs": 40, "max_batch_tokens": 256, "max_logit_rows": 256, "max_loras": 4} | limits
        return _sterna.Core(model, num_blocks=num_blocks, **limits)

    def logits(self, ids: np.ndarray, lora: "dict[tuple[int, str], tuple] | None" = None) -> np.ndarray:
        """float64 (len(ids), vocab). `lora` maps (layer, projection) to (a, b, scale)."""
        s, w = self.shape, {k: v.astype(np.float64) for k, v in self.weights.items()}
        mixes = [w["streams", i] for i in range(s.layers)] if s.two_streams else None
        streams = Streams(w["embedding", -1][ids], mixes)
        positions = np.arange(len(ids))

        def linear(name: str, layer: int, h: np.ndarray) -> np.ndarray:
            if s.row_scales and self.kind != GGMLType.F32:
                step = np.abs(h).max(-1, keepdims=True) / 127
                h = np.round(h / step) * step
            y = h @ w[name, layer].T
            if lora and (layer, name) in lora:
                a, b, scale = lora[layer, name]
                y = y + scale * (h @ a.T.astype(np.float64) @ b.T.astype(np.float64))
            return y

        for i in range(s.layers):
            h = _rms(streams.read(2 * i), w["attn_norm", i])
            heads = {}
            for name, bias, count in (("q_proj", "q_bias", s.heads), ("k_proj", "k_bias", s.kv_heads)):
                y = linear(name, i, h) + (w[bias, i] if s.qkv_bias else 0)
                y = y.reshape(len(ids), count, s.head_dim)
                if s.qk_norm:
                    y = _rms(y, w[name[0] + "_norm", i])
                heads[name] = self._rope(y, positions)
            v = (linear("v_proj", i, h) + (w["v_bias", i] if s.qkv_bias else 0)).reshape(len(ids), -1, s.head_dim)
            group = s.heads // s.kv_heads
            k, v = np.repeat(heads["k_proj"], group, 1), np.repeat(v, group, 1)
            scores = np.einsum("qhd,khd->hqk", heads["q_proj"], k) / np.sqrt(s.head_dim)
            scores = np.where(positions[None, :, None] >= positions[None, None], scores, -np.inf)
            p = np.exp(scores - scores.max(-1, keepdims=True))
            mixed = np.einsum("hqk,khd->qhd", p / p.sum(-1, keepdims=True), v).reshape(len(ids), -1)
            if s.sub_norms:
                mixed = _rms(mixed, w["attn_sub_norm", i])
            streams.write(2 * i, linear("o_proj", i, mixed))
            h = _rms(streams.read(2 * i + 1), w["ffn_norm", i])
            gate = linear("gate_proj", i, h)
            gate = np.maximum(gate, 0) ** 2 if s.squared_relu else gate / (1 + np.exp(-gate))
            inner = gate * linear("up_proj", i, h)
            if s.sub_norms:
                inner = _rms(inner, w["ffn_sub_norm", i])
            streams.write(2 * i + 1, linear("down_proj", i, inner))
        return _rms(streams.end(), w["output_norm", -1]) @ w["embedding", -1].T

    def _rope(self, y: np.ndarray, positions: np.ndarray) -> np.ndarray:
        d = self.shape.rope_dim
        frequency = 10000.0 ** (-np.arange(d // 2) * 2 / d)
        if self.shape.rope_factors:
            frequency = frequency / np.array(self.shape.rope_factors)
        angle = positions[:, None, None] * frequency
        a, b, rest = y[..., : d // 2], y[..., d // 2 : d], y[..., d:]
        cos, sin = np.cos(angle), np.sin(angle)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)


class Streams:
    """The residual: one stream that sublayers add to, or two that `weights` (ten numbers a layer) mix."""

    def __init__(self, x: np.ndarray, weights: "list[np.ndarray] | None") -> None:
        self._s = [x, x] if weights else [x]
        self._weights = np.concatenate(weights).reshape(-1, 5) if weights else None

    def read(self, sublayer: int) -> np.ndarray:
        if self._weights is None:
            return self._s[0]
        _, pre0, pre1, _, _ = self._weights[sublayer]
        return pre0 * self._s[0] + pre1 * self._s[1]

    def write(self, sublayer: int, y: np.ndarray) -> None:
        if self._weights is None:
            self._s = [self._s[0] + y]
            return
        alpha, _, _, post0, post1 = self._weights[sublayer]
        m, (a, b) = 1 / (1 + np.exp(-alpha)), self._s
        self._s = [m * a + (1 - m) * b + post0 * y, (1 - m) * a + m * b + post1 * y]

    def end(self) -> np.ndarray:
        return sum(self._s) / len(self._s)


def _rms(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight


def i32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def assert_close(got: np.ndarray, expected: np.ndarray) -> None:
    """float32 sums and an f16 KV cache (2^-11 relative a key or value), amplified by two random layers."""
    error = np.abs(got - expected)
    assert np.sqrt((error**2).mean()) < 2e-3 * expected.std()
    assert error.max() < 0.03 * expected.std()


def run(core: "_sterna.Core", sequences: "list[tuple]", *, width: int = 16) -> list[np.ndarray]:
    """Logits of every row of one step. A sequence is (ids, first position, block ids, lora slot)."""
    ids = np.concatenate([np.asarray(s[0], np.int32) for s in sequences])
    starts = np.concatenate([[0], np.cumsum([len(s[0]) for s in sequences])]).astype(np.int32)
    tables = np.zeros((len(sequences), width), np.int32)
    for row, s in zip(tables, sequences, strict=True):
        row[: len(s[2])] = s[2]
    core.forward(
        ids,
        starts,
        i32(*(s[1] for s in sequences)),
        tables,
        i32(*(s[3] for s in sequences)),
        np.arange(len(ids), dtype=np.int32),
    )
    return np.split(core.logits(len(ids)), starts[1:-1])
