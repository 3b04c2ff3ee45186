"""Projections with LoRA over a frozen weight, several side by side: y_i = x W_i^T + b_i + s_i (x A_i^T) B_i^T.

Q, K and V (or gate and up) are one product with the concatenated weight and one with the concatenated A. The weight is
asked for in the forward and again in the backward pass and never kept: it may live in a buffer that the next layer
overwrites. Kept for the backward pass: the source (before the prologue) and x A^T. Factors are float32 (float64 for
float64) and are rounded to x's type for the products; their gradients come back in float32.
Shapes: x (T, in), weight (out, in), A_i (r_i, in), B_i (out_i, r_i).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from finetune.ops.prologues import Prologue


@dataclass(frozen=True)
class LoraPart:
    """One adapted projection among those side by side: output columns [start, end)."""

    start: int
    end: int
    scale: float


@dataclass(frozen=True, eq=False)
class Projection:
    """What is constant in a projection. `weight()` is valid until the next call of anyone's `weight`."""

    weight: Callable[[], torch.Tensor]
    bias: torch.Tensor | None
    prologue: Prologue
    parts: tuple[LoraPart, ...] = ()
    dropout: Callable[[torch.Tensor], torch.Tensor] | None = None
    """x -> what x is multiplied by before A: 0 or 1/(1-p), the same at every call (one mask for all parts)."""


class LoraProjection(torch.autograd.Function):
    """`factors` are A_0, B_0, A_1, B_1, ... of the projection's parts."""

    @staticmethod
    def forward(ctx: Any, source: torch.Tensor, projection: Projection, *factors: torch.Tensor) -> torch.Tensor:
        x = projection.prologue.forward(source)
        weight = projection.weight()
        y = torch.mm(x, weight.t()) if projection.bias is None else torch.addmm(projection.bias, x, weight.t())
        ctx.projection = projection
        if not projection.parts:
            ctx.save_for_backward(source)
            return y
        dropped = x if projection.dropout is None else x * projection.dropout(x)
        low = torch.mm(dropped, _joint_a(factors, x.dtype).t())
        for part, b, ranks in _with_ranks(projection.parts, factors):
            y[:, part.start : part.end].addmm_(low[:, ranks], _scaled_b(part, b, x.dtype).t())
        ctx.save_for_backward(source, low, *factors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        projection: Projection = ctx.projection
        source, *kept = ctx.saved_tensors
        x, known = projection.prologue.recompute(source)
        grads: list[torch.Tensor | None] = []
        dx = torch.mm(grad, projection.weight()) if ctx.needs_input_grad[0] else None
        if projection.parts:
            low, *factors = kept
            mask = None if projection.dropout is None else projection.dropout(x)
            grad_low, grads = _factor_gradients(projection.parts, factors, grad, x if mask is None else x * mask, low)
            if dx is not None:
                a = _joint_a(factors, x.dtype)
                dx = dx.addmm_(grad_low, a) if mask is None else dx.addcmul_(torch.mm(grad_low, a), mask)
        d_source = None if dx is None else projection.prologue.backward(dx, source, known)
        return d_source, None, *grads


def _factor_gradients(
    parts: Sequence[LoraPart], factors: Sequence[torch.Tensor], grad: torch.Tensor, x: torch.Tensor, low: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """Gradient of x A^T (T, r), and those of A_0, B_0, ..., in the factors' type."""
    grad_low = torch.empty_like(low)
    b_grads = []
    for part, b, ranks in _with_ranks(parts, factors):
        own = grad[:, part.start : part.end]
        torch.mm(own, _scaled_b(part, b, x.dtype), out=grad_low[:, ranks])
        b_grads.append(torch.mm(own.t(), low[:, ranks]).to(b.dtype).mul_(part.scale))
    a_grad = torch.mm(grad_low.t(), x).to(factors[0].dtype)
    a_grads = a_grad.split([a.shape[0] for a in factors[0::2]])
    return grad_low, [grad for pair in zip(a_grads, b_grads, strict=True) for grad in pair]


def _joint_a(factors: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    return torch.cat(list(factors[0::2])).to(dtype)


def _scaled_b(part: LoraPart, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (b * part.scale).to(dtype)


def _with_ranks(
    parts: Sequence[LoraPart], factors: Sequence[torch.Tensor]
) -> list[tuple[LoraPart, torch.Tensor, slice]]:
    """Each part with its B and its columns of x A^T."""
    result, at = [], 0
    for part, a, b in zip(parts, factors[0::2], factors[1::2], strict=True):
        result.append((part, b, slice(at, at + a.shape[0])))
        at += a.shape[0]
    return result


def project(source: torch.Tensor, projection: Projection, factors: Sequence[torch.Tensor]) -> torch.Tensor:
    result: torch.Tensor = LoraProjection.apply(source, projection, *factors)
    return result
