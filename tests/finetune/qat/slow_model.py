"""The quantization-aware model a second time, slowly: plain autograd, whole masks, `x + (Q(x) - x).detach()`."""

import math

import torch
from torch import Tensor

from finetune.packed import Packed
from finetune.qat.quantizers import activations, q4_0, q8_0, ternary
from finetune.qat.shape import Shape, is_ternary


def through(x: Tensor, value: Tensor) -> Tensor:
    return x + (value - x).detach()


class SlowModel:
    """`parameters` are leaves; each call computes everything anew."""

    def __init__(self, shape: Shape, parameters: dict[str, Tensor], *, is_quantized: bool) -> None:
        self.shape, self.is_quantized = shape, is_quantized
        self.w = parameters if not is_quantized else {k: self._value(k, v) for k, v in parameters.items()}

    def _value(self, name: str, tensor: Tensor) -> Tensor:
        if tensor.ndim == 1:
            return tensor
        plain = tensor.detach()
        if is_ternary(name):
            return through(tensor, ternary(plain, self.shape.ternary))
        return through(tensor, q8_0(plain) if self.shape.embedding_type == "q8_0" else q4_0(plain))

    def _act(self, x: Tensor, passes: int = 1) -> Tensor:
        return through(x, activations(x.detach(), passes)) if self.is_quantized else x

    def logits(self, packed: Packed) -> Tensor:
        """Of every row."""
        shape, w = self.shape, self.w
        seen = _seen(packed)
        positions = torch.from_numpy(packed.positions).double()
        streams = [w["token_embd.weight"][torch.from_numpy(packed.token_ids).long()]] * shape.residual_streams

        def sublayer(index: int, kind: int, x: Tensor) -> Tensor:
            return self._attention(index, x, seen, positions) if kind == 0 else self._ffn(index, x)

        for index in range(shape.num_layers):
            for kind in range(2):
                if shape.residual_streams == 1:
                    streams = [streams[0] + sublayer(index, kind, streams[0])]
                    continue
                alpha, pre0, pre1, post0, post1 = w[f"blk.{index}.residual_streams"].view(2, 5)[kind]
                s0, s1 = streams
                y, m = sublayer(index, kind, pre0 * s0 + pre1 * s1), torch.sigmoid(alpha)
                streams = [m * s0 + (1 - m) * s1 + post0 * y, (1 - m) * s0 + m * s1 + post1 * y]
        h = self._act(self._norm(sum(streams[1:], streams[0]) / len(streams), "output_norm.weight"))
        return h @ w["token_embd.weight" if shape.tie_embeddings else "output.weight"].t()

    def loss(self, packed: Packed) -> Tensor:
        log_p = torch.log_softmax(self.logits(packed), -1)
        losses = -log_p[torch.from_numpy(packed.loss_rows).long(), torch.from_numpy(packed.loss_targets).long()]
        return (losses * torch.from_numpy(packed.loss_weights).to(losses)).sum()

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return self.w[name] * x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + self.shape.rms_norm_eps)

    def _attention(self, index: int, x: Tensor, seen: Tensor, positions: Tensor) -> Tensor:
        shape, w, at = self.shape, self.w, f"blk.{index}."
        h = self._act(self._norm(x, at + "attn_norm.weight"))
        q, k, v = ((h @ w[f"{at}attn_{kind}.weight"].t()).unflatten(1, (-1, shape.head_dim)) for kind in "qkv")
        half = shape.head_dim // 2
        angles = positions[:, None] * shape.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]

        def turn(y: Tensor) -> Tensor:
            a, b = y[..., :half], y[..., half:]
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

        group = shape.num_heads // shape.num_kv_heads
        k, v = turn(k).repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", turn(q), k) / math.sqrt(shape.head_dim)
        p = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1)
        return self._act(torch.einsum("hqk,khd->qhd", p, v).flatten(1)) @ w[at + "attn_output.weight"].t()

    def _ffn(self, index: int, x: Tensor) -> Tensor:
        w, at = self.w, f"blk.{index}."
        h = self._act(self._norm(x, at + "ffn_norm.weight"), 2 if index == self.shape.num_layers - 1 else 1)
        gate, up = h @ w[at + "ffn_gate.weight"].t(), h @ w[at + "ffn_up.weight"].t()
        return self._act(torch.nn.functional.silu(gate) * up) @ w[at + "ffn_down.weight"].t()


def _seen(packed: Packed) -> Tensor:
    """(T, T): which rows a row attends to."""
    seen = torch.zeros(len(packed.token_ids), len(packed.token_ids), dtype=torch.bool)
    for segment in packed.segments:
        rows = slice(segment.start, segment.end)
        seen[rows, rows] = torch.ones(segment.end - segment.start, segment.end - segment.start).tril().bool()
        parent = segment.parent
        while parent >= 0:
            seen[rows, packed.segments[parent].start : packed.segments[parent].end] = True
            parent = packed.segments[parent].parent
    return seen
