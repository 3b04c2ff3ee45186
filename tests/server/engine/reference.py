"""A served model's forward pass once more, in NumPy on the dequantized weights: the float twin of the C++ core.

Reads what `open_model` gives (GGUF or Hugging Face, every architecture) and shares nothing else with the server:
blocks are dequantized by the `gguf` package, and interleaved Q and K are left as they are and rotated in adjacent
pairs, where the core un-permutes them. Weights, activations and KV stay float, so that what is left between the two
is the core's rounding: int8 activations and a 16-bit KV cache.

Not covered: adapters (`peft` is their reference), sampling, caching.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

import _sterna
from quant.formats import GGMLType
from quant.model_file import ModelFile, Tensor
from server.text.tokenizer import build_tokenizer
from tests.server.engine.core_twin import Streams, run

_QUERY_ROWS = 256
"""Query rows of one attention tile: scores of 9 heads against 2,000 keys take 18 MB."""
_LOGIT_ROWS = 128


def dequantize(tensor: Tensor) -> np.ndarray:
    """The tensor's values as float32, in its own row order."""
    data = tensor.read()
    if tensor.type == GGMLType.F32:
        return data.view(np.float32).reshape(tensor.shape).copy()
    if tensor.type == GGMLType.F16:
        return data.view(np.float16).astype(np.float32).reshape(tensor.shape)
    rows = data.reshape(*tensor.shape[:-1], -1)
    return gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(int(tensor.type))).reshape(tensor.shape)


class Reference:
    """`dtype` float32 for real models; float64 shows the float32 rounding of everything else."""

    def __init__(self, file: ModelFile, dtype: type[np.floating] = np.float32) -> None:
        self._config = file.config
        self._dtype = dtype
        self._weights = {name: dequantize(tensor).astype(dtype, copy=False) for name, tensor in file.tensors.items()}
        self._interleaved = file.tensors["blk.0.attn_q.weight"].rope_interleaved
        half = np.arange(file.config.rope_dim // 2)
        frequencies = file.config.rope_theta ** (-2.0 * half / file.config.rope_dim)
        if file.config.rope_freq_factors is not None:
            frequencies /= np.array(file.config.rope_freq_factors)
        self._frequencies = frequencies

    def logits(self, ids: np.ndarray) -> Iterator[np.ndarray]:
        """Logits of every position of one sequence that starts at position 0, 128 rows at a time."""
        hidden = self._hidden(ids)
        head = "output" if "output.weight" in self._weights else "token_embd"
        for begin in range(0, len(ids), _LOGIT_ROWS):
            yield self._linear(hidden[begin : begin + _LOGIT_ROWS], head)

    def _hidden(self, ids: np.ndarray) -> np.ndarray:
        w, c = self._weights, self._config
        mixes = [w[f"blk.{i}.residual_streams"] for i in range(c.num_layers)] if c.residual_streams == 2 else None
        streams = Streams(w["token_embd.weight"][ids], mixes)
        angles = np.arange(len(ids))[:, None, None] * self._frequencies
        turn = np.cos(angles).astype(self._dtype), np.sin(angles).astype(self._dtype)
        for i in range(c.num_layers):
            layer = f"blk.{i}."
            h = self._norm(streams.read(2 * i), w[layer + "attn_norm.weight"])
            q = self._heads(h, layer + "attn_q", turn)
            k = self._heads(h, layer + "attn_k", turn)
            v = self._linear(h, layer + "attn_v").reshape(len(ids), c.num_kv_heads, c.head_dim)
            mixed = self._sub_norm(self._attend(q, k, v), layer + "attn_sub_norm.weight")
            streams.write(2 * i, self._linear(mixed, layer + "attn_output"))
            h = self._norm(streams.read(2 * i + 1), w[layer + "ffn_norm.weight"])
            gate = self._linear(h, layer + "ffn_gate")
            gate = np.maximum(gate, 0) ** 2 if c.activation == "relu2" else gate / (1 + np.exp(-gate))
            act = self._sub_norm(gate * self._linear(h, layer + "ffn_up"), layer + "ffn_sub_norm.weight")
            streams.write(2 * i + 1, self._linear(act, layer + "ffn_down"))
        return self._norm(streams.end(), w["output_norm.weight"])

    def _sub_norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return self._norm(x, self._weights[name]) if self._config.sub_norms else x

    def _norm(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        mean = np.square(x).mean(-1, keepdims=True)
        return (x / np.sqrt(mean + self._dtype(self._config.rms_norm_eps)) * weight).astype(self._dtype, copy=False)

    def _linear(self, h: np.ndarray, name: str) -> np.ndarray:
        y = h @ self._weights[name + ".weight"].T
        bias = self._weights.get(name + ".bias")
        return y if bias is None else y + bias

    def _heads(self, h: np.ndarray, name: str, turn: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """Q or K: (T, heads, head_dim), normalized where the model does that, rotated."""
        y = self._linear(h, name).reshape(len(h), -1, self._config.head_dim)
        norm = self._weights.get(name + "_norm.weight")
        if norm is not None:
            y = self._norm(y, norm)
        rotary, rest = np.split(y, [self._config.rope_dim], -1)
        half = self._config.rope_dim // 2
        pairs = (..., half, 2) if self._interleaved else (..., 2, half)
        axis = -1 if self._interleaved else -2
        split = rotary.reshape(*y.shape[:-1], *pairs[1:])
        a, b = np.take(split, 0, axis), np.take(split, 1, axis)
        turned = np.stack([a * turn[0] - b * turn[1], b * turn[0] + a * turn[1]], axis).reshape(rotary.shape)
        return np.concatenate([turned, rest], -1)

    def _attend(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Causal attention: (T, heads * head_dim)."""
        kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
        q = q.reshape(len(q), kv_heads, group, -1).transpose(1, 2, 0, 3) / self._dtype(np.sqrt(q.shape[-1]))
        keys, values = k.transpose(1, 2, 0)[:, None], v.transpose(1, 0, 2)[:, None]
        out = np.empty_like(q)
        for begin in range(0, q.shape[2], _QUERY_ROWS):
            end = min(begin + _QUERY_ROWS, q.shape[2])
            p = q[:, :, begin:end] @ keys[..., :end]
            p[..., begin:] += np.triu(np.full((end - begin, end - begin), -np.inf, self._dtype), 1)
            p -= p.max(-1, keepdims=True)
            np.exp(p, out=p)
            out[:, :, begin:end] = p @ values[..., :end, :] / p.sum(-1, keepdims=True)
        return out.transpose(2, 0, 1, 3).reshape(q.shape[2], -1)


@dataclass(frozen=True)
class Scores:
    """How a model sees a text: the most likely token at every position, and the log-probability of what came."""

    top1: np.ndarray
    """int (T,)"""
    logprobs: np.ndarray
    """float64 (T - 1,): entry i is of token i + 1."""

    @property
    def perplexity(self) -> float:
        return float(np.exp(-self.logprobs.mean()))

    def agreement(self, other: "Scores") -> float:
        """The share of positions with the same most likely token."""
        return float(np.mean(self.top1 == other.top1))


def score(ids: np.ndarray, logits: Iterable[np.ndarray]) -> Scores:
    """`logits` come in chunks of rows; together they have one row for each of `ids`."""
    top1, logprobs, at = [], [], 0
    for chunk in logits:
        highest = chunk.max(1)
        sums = np.exp(chunk - highest[:, None]).sum(1, dtype=np.float64)
        targets = ids[at + 1 : at + 1 + len(chunk)]
        rows = np.arange(len(targets))
        logprobs.append((chunk[rows, targets] - highest[rows]).astype(np.float64) - np.log(sums[rows]))
        top1.append(chunk.argmax(1))
        at += len(chunk)
    assert at == len(ids)
    return Scores(np.concatenate(top1), np.concatenate(logprobs))


def core_logits(core: "_sterna.Core", ids: np.ndarray, *, lora_slot: int = -1) -> Iterator[np.ndarray]:
    """The same from the core: `ids` as one sequence at position 0, as many rows a step as the core takes."""
    rows = min(core.max_batch_tokens, core.max_logit_rows, _LOGIT_ROWS)
    blocks = -(-len(ids) // core.block_size)
    for begin in range(0, len(ids), rows):
        part = ids[begin : begin + rows]
        yield run(core, [(part, begin, range(blocks), lora_slot)], width=blocks)[0]


TEXTS = Path(__file__).parents[2] / "data" / "texts"
TEXT_NAMES = ("prose", "code", "german")


def text_ids(file: ModelFile, name: str) -> np.ndarray:
    """One of tests/data/texts as the model's tokens, with BOS where the model wants one."""
    tokenizer = build_tokenizer(file.tokenizer, file.config.vocab_size)
    text = (TEXTS / f"{name}.txt").read_text("utf-8")
    return np.array(tokenizer.encode(text, add_special=True, parse_special=False), np.int32)


EXPECTED = TEXTS / "default_model_scores.json"
"""The reference's scores of the default model, which take a minute: `python -m benchmarks.accuracy --write`."""


@dataclass(frozen=True)
class ExpectedScores:
    """What a text must come near to: the float reference, and llama.cpp's top-1 agreement with it."""

    reference: Scores
    llamacpp_agreement: float


def read_expected(file: ModelFile) -> dict[str, ExpectedScores]:
    """By text name. The scores must be of this very model."""
    content = json.loads(EXPECTED.read_text("utf-8"))
    assert content["model"] == file.digest, f"{EXPECTED.name} holds scores of another model: write it again"
    return {
        name: ExpectedScores(Scores(np.array(t["top1"]), np.array(t["logprobs"])), t["llamacpp_agreement"])
        for name, t in content["texts"].items()
    }


def write_expected(file: ModelFile, expected: dict[str, ExpectedScores]) -> None:
    texts = {
        name: {
            "llamacpp_agreement": round(e.llamacpp_agreement, 5),
            "top1": e.reference.top1.tolist(),
            "logprobs": [round(value, 4) for value in e.reference.logprobs.tolist()],
        }
        for name, e in expected.items()
    }
    EXPECTED.write_text(json.dumps({"model": file.digest, "texts": texts}) + "\n", "utf-8")
