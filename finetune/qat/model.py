"""The quantization-aware training model: a llama whose weights and activations are rounded as its file's will be.

    model = QatModel(Shape(vocab_size=512), dtype=torch.bfloat16)
    model.loss(packed, normalizer).total.backward()      # fills parameters()[name].grad

Everything is trained. The residual stream, norms, softmax sums and the loss are float32; products run in `dtype`
(bfloat16, float16: automatic mixed precision written out; float32; float64 for checks). The engine's int16
keys and values are exact enough to be left out. `is_quantized=False` is the same model in full precision. Equal inputs
give equal bits at one thread count. Not covered: the optimizer and the loop (finetune/train), data (data.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from finetune.model.terms import RowTerms, filled_up, sort_terms, with_filler
from finetune.ops.attention import Layout, attend
from finetune.ops.attention_tiles import SegmentLike, make_tiles
from finetune.ops.cross_entropy import HeadOptions, LossTerms, trained_cross_entropy
from finetune.ops.numeric import wide_dtype
from finetune.ops.rope import rope_angles
from finetune.packed import Packed, Segment
from finetune.qat.ops import Rounding, embed, linear, norm_rounded, rounded, swiglu_rounded
from finetune.qat.shape import STREAM_SHAPE, Shape, stream_name
from finetune.qat.streams import Streams
from finetune.qat.weights import Values, Weights, initial_parameters
from quant.tensor_rules import EMBEDDING, OUTPUT_NORM

_MEASURED_ROWS = 256
"""Whose logits exist at a time while a model is measured."""
_LOSS_ROWS = 128
"""Rows that carry loss are filled up to a multiple: their number is another one in each micro-batch, and oneDNN keeps a
megabyte for each number and product (finetune/model/terms.py)."""


class Teacher(Protocol):
    """What a student learns from: hidden states and the head that makes logits of them."""

    def hidden(self, packed: Packed, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """(len(rows), C) and (V, C), in one type, without gradient."""


@dataclass(frozen=True)
class Objective:
    """What is minimized beside cross-entropy. `distillation`: the share of KL(teacher || model) in the loss."""

    entropy_weight: float = 0.0
    """Times the mean entropy, subtracted: answers stay less certain."""
    distillation: float = 0.0


@dataclass(frozen=True, eq=False)
class Loss:
    """Of one micro-batch. `total`: what is minimized, / normalizer; sums are over the terms, weighted, not divided."""

    total: Tensor
    value: float
    """`total` as a number, times the normalizer."""
    ce_sum: float
    entropy_sum: float
    num_right: float = 0.0
    """Weighted terms whose target is the most likely token, by `measure`."""


class QatModel:
    def __init__(
        self,
        shape: Shape,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        seed: int = 0,
        is_quantized: bool = True,
    ) -> None:
        self.shape, self.dtype, self.device = shape, dtype, torch.device(device)
        self._wide = wide_dtype(dtype)
        parameters = initial_parameters(shape, seed=seed, dtype=self._wide, device=self.device)
        self.weights = Weights(shape, parameters, dtype, is_quantized=is_quantized)

    @property
    def is_quantized(self) -> bool:
        return self.weights.is_quantized

    def parameters(self) -> dict[str, Tensor]:
        """Shadows by their GGUF names: float32 leaves (float64 in a float64 model)."""
        return self.weights.parameters

    def loss(
        self, packed: Packed, normalizer: float, objective: Objective | None = None, teacher: Teacher | None = None
    ) -> Loss:
        """`normalizer`: the weights of the whole optimizer step, summed."""
        if not normalizer > 0:
            raise ValueError(f"the normalizer is {normalizer}; it must be above 0")
        objective = objective or Objective()
        found = sort_terms(packed)
        if not len(found.rows):
            return Loss(torch.zeros((), device=self.device), 0.0, 0.0, 0.0)
        hidden = self._hidden(packed.token_ids, packed.positions, packed.segments, found.rows)
        terms = plain = self._terms(packed, found)
        if teacher is not None and objective.distillation:
            terms = _with_teacher(plain, teacher.hidden(packed, found.rows), objective.distillation)
        options = HeadOptions(self.weights.values().head, objective.entropy_weight, has_entropy=True)
        total, losses, entropy = trained_cross_entropy(hidden, self.weights.head, terms, options)
        ce_sum = losses[~terms.is_kl].dot(plain.weights).item()
        return Loss(total / normalizer, total.item(), ce_sum, entropy.item())

    @torch.no_grad()
    def measure(self, packed: Packed) -> Loss:
        """Cross-entropy, entropy and how many targets are the most likely token, of a micro-batch with loss terms."""
        found = sort_terms(packed)
        hidden = self._hidden(packed.token_ids, packed.positions, packed.segments, found.rows)
        terms, head = self._terms(packed, found), self.weights.values().head
        total, _, entropy = trained_cross_entropy(hidden, head, terms, HeadOptions(has_entropy=True))
        top = torch.cat([torch.mm(part, head.t()).argmax(1) for part in hidden.split(_MEASURED_ROWS)])
        right = (top[terms.rows] == terms.targets).to(self._wide).dot(terms.weights).item()
        return Loss(total, total.item(), total.item(), entropy.item(), right)

    @torch.no_grad()
    def logits(self, token_ids: Sequence[int] | np.ndarray, rows: Sequence[int] | np.ndarray | None = None) -> Tensor:
        """(len(rows), vocabulary) of one plain sequence, all its rows by default."""
        ids = np.asarray(token_ids, np.int64)
        wanted = np.arange(len(ids)) if rows is None else np.asarray(rows, np.int64)
        hidden = self._hidden(ids, np.arange(len(ids)), (Segment(0, len(ids), -1),), wanted)
        return torch.mm(hidden[: len(wanted)], self.weights.values().head.t()).to(self._wide)

    @torch.no_grad()
    def hidden(self, packed: Packed, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """As a teacher."""
        found = self._hidden(packed.token_ids, packed.positions, packed.segments, rows)
        return found[: len(rows)], self.weights.values().head

    def _hidden(
        self, token_ids: np.ndarray, positions: np.ndarray, segments: Sequence[SegmentLike], rows: np.ndarray
    ) -> Tensor:
        """What the head multiplies, of `rows` and more up to a multiple of _LOSS_ROWS, in the products' type."""
        wanted = None
        if len(rows) < len(token_ids):
            wanted = self._tensor(filled_up(rows, _LOSS_ROWS))
        token_ids, positions, segments = with_filler(token_ids, positions, segments)
        values, layout = self.weights.values(), self._layout(positions, segments)
        x = embed(self.parameters()[EMBEDDING], values.embedding, self._tensor(token_ids.astype(np.int64)))
        streams = Streams(x, self.shape.residual_streams)
        last = self.shape.num_layers - 1
        for index in range(self.shape.num_layers):
            kept = wanted if index == last else None
            streams.add(self._mix(index, 0), partial(self._attention, index, layout, values, kept), kept)
            streams.add(self._mix(index, 1), partial(self._ffn, index, values))
        norm = self.parameters()[OUTPUT_NORM]
        return norm_rounded(streams.mean(), norm, self.shape.rms_norm_eps, self._rounding())

    def _attention(self, index: int, layout: Layout, values: Values, rows: Tensor | None, x: Tensor) -> Tensor:
        shape, own = self.shape, values.layers[index]
        norm = self.parameters()[f"blk.{index}.attn_norm.weight"]
        h = norm_rounded(x, norm, shape.rms_norm_eps, self._rounding())
        widths = [shape.num_heads * shape.head_dim] + [shape.num_kv_heads * shape.head_dim] * 2
        qkv = linear(h, own["qkv"], *self.weights.shadows(index, "qkv"))
        q, k, v = (part.unflatten(1, (-1, shape.head_dim)) for part in qkv.split(widths, dim=1))
        attended = attend(q, k, v, layout).flatten(1)
        attended = rounded(attended if rows is None else attended[rows], self._rounding())
        return linear(attended, own["o"], *self.weights.shadows(index, "o"))

    def _ffn(self, index: int, values: Values, x: Tensor) -> Tensor:
        own, is_last = values.layers[index], index == self.shape.num_layers - 1
        norm = self.parameters()[f"blk.{index}.ffn_norm.weight"]
        h = norm_rounded(x, norm, self.shape.rms_norm_eps, self._rounding(2 if is_last else 1))
        gate_up = linear(h, own["gate_up"], *self.weights.shadows(index, "gate_up"))
        return linear(swiglu_rounded(gate_up, self._rounding()), own["down"], *self.weights.shadows(index, "down"))

    def _rounding(self, passes: int = 1) -> Rounding:
        return Rounding(self.dtype, passes if self.is_quantized else 0)

    def _layout(self, positions: np.ndarray, segments: Sequence[SegmentLike]) -> Layout:
        cos, sin = rope_angles(
            self._tensor(np.asarray(positions, np.int64)),
            theta=self.shape.rope_theta,
            rope_dim=self.shape.head_dim,
            factors=None,
            dtype=self._wide,
        )
        return Layout(make_tiles(segments, self.shape.num_heads), cos, sin, self.dtype)

    def _mix(self, layer: int, sublayer: int) -> Tensor | None:
        """(5,): alpha, pre0, pre1, post0, post1."""
        if self.shape.residual_streams == 1:
            return None
        return self.parameters()[stream_name(layer)].view(STREAM_SHAPE)[sublayer]

    def _terms(self, packed: Packed, found: RowTerms) -> LossTerms:
        rows = self._tensor(found.term_rows)
        targets = self._tensor(packed.loss_targets[found.order].astype(np.int64))
        weights = self._tensor(packed.loss_weights[found.order]).to(self._wide)
        return LossTerms(rows, targets, weights, torch.zeros_like(rows, dtype=torch.bool))

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)


def _with_teacher(plain: LossTerms, teacher: tuple[Tensor, Tensor], share: float) -> LossTerms:
    """Each term twice: (1 - share) of its weight on the target, `share` on the teacher's answer at that row."""
    base, head = teacher
    order = torch.cat([plain.rows, plain.rows]).argsort(stable=True)

    def both(ce: Tensor, kl: Tensor) -> Tensor:
        return torch.cat([ce, kl])[order]

    return LossTerms(
        rows=both(plain.rows, plain.rows),
        targets=both(plain.targets, plain.targets),
        weights=both(plain.weights * (1 - share), plain.weights * share),
        is_kl=both(plain.is_kl, ~plain.is_kl),
        base=base,
        base_rows=both(plain.rows, plain.rows),
        base_head=head,
    )
