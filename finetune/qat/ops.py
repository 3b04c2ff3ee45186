"""Autograd functions of a model that trains quantized: straight through every rounding, exact everywhere else.

The values that products are computed with are given beside the parameters whose gradients they get, so that weights are
rounded once an optimizer step and not once a micro-batch. Gradients of parameters come in their own type. `Rounding`
says what becomes of activations; without passes nothing is rounded, and then every function here is differentiable in
the plain sense, which is how they are checked. Shapes: x (T, in), weights (out, in).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from finetune.ops.numeric import wide_dtype
from finetune.ops.rms_norm import rms_norm_backward, rms_norm_forward, rms_norm_weight_gradient
from finetune.ops.swiglu import swiglu_backward, swiglu_forward
from finetune.qat.quantizers import activations

CHUNK_ELEMENTS = 1 << 17
"""Worked on at a time, 0.5 MB of float32: what is between the steps of a rounding stays in the L2 cache."""


@dataclass(frozen=True)
class Rounding:
    """Activations before a product: `passes` of int8 (0: none), then the products' type."""

    dtype: torch.dtype
    passes: int = 1

    def __call__(self, x: Tensor) -> Tensor:
        if not self.passes:
            return x.to(self.dtype)
        return activations(x.to(wide_dtype(x.dtype)), self.passes).to(self.dtype)


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of the same rows of all (T, ...), some at a time."""
    step = max(1, CHUNK_ELEMENTS // max(1, tensors[0].shape[-1]))
    return zip(*(tensor.split(step) for tensor in tensors), strict=True)


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rounding: Rounding) -> Tensor:
        ctx.dtype = x.dtype
        found = torch.empty_like(x, dtype=rounding.dtype)
        for part, out in _chunks(x, found):
            out.copy_(rounding(part))
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None


class _NormRound(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, rounding: Rounding) -> Tensor:
        found, rstd = torch.empty_like(x, dtype=rounding.dtype), torch.empty_like(x[..., :1], dtype=wide_dtype(x.dtype))
        for part, out, own in _chunks(x, found, rstd):
            y, own[:] = rms_norm_forward(part, weight, eps, rstd.dtype)
            out.copy_(rounding(y))
        ctx.save_for_backward(x, weight, rstd)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, rstd = ctx.saved_tensors
        dx, dw = torch.empty_like(x), torch.zeros_like(weight)
        for own_grad, part, own, out in _chunks(grad, x, rstd, dx):
            out.copy_(rms_norm_backward(own_grad, part, weight, own))
            dw += rms_norm_weight_gradient(own_grad, part, own)
        return dx, dw, None, None


class _SwigluRound(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, rounding: Rounding) -> Tensor:
        ctx.save_for_backward(gate_up)
        found = torch.empty_like(gate_up[:, : gate_up.shape[1] // 2], dtype=rounding.dtype)
        for part, out in _chunks(gate_up, found):
            out.copy_(rounding(swiglu_forward(part)))
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        found = torch.empty_like(gate_up)
        for part, own_grad, out in _chunks(gate_up, grad, found):
            out.copy_(swiglu_backward(own_grad, part, F.silu(part.chunk(2, dim=-1)[0])))
        return found, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, *shadows: Tensor) -> Tensor:
        ctx.save_for_backward(x, values)
        ctx.shadows = [(len(shadow), shadow.dtype) for shadow in shadows]
        return torch.mm(x, values.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, values = ctx.saved_tensors
        d_values = torch.mm(grad.t(), x).split([rows for rows, _ in ctx.shadows])
        d_shadows = [part.to(dtype) for part, (_, dtype) in zip(d_values, ctx.shadows, strict=True)]
        return torch.mm(grad, values) if ctx.needs_input_grad[0] else None, None, *d_shadows


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shadow: Tensor, values: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.like = shadow.shape, shadow.dtype
        return values[ids]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (ids,) = ctx.saved_tensors
        shape, dtype = ctx.like
        return torch.zeros(shape, dtype=dtype, device=grad.device).index_add_(0, ids, grad.to(dtype)), None, None


def rounded(x: Tensor, rounding: Rounding) -> Tensor:
    result: Tensor = _Round.apply(x, rounding)
    return result


def norm_rounded(x: Tensor, weight: Tensor, eps: float, rounding: Rounding) -> Tensor:
    """RMSNorm with a trained weight, then the rounding."""
    result: Tensor = _NormRound.apply(x, weight, eps, rounding)
    return result


def swiglu_rounded(gate_up: Tensor, rounding: Rounding) -> Tensor:
    """(T, 2F) -> (T, F)."""
    result: Tensor = _SwigluRound.apply(gate_up, rounding)
    return result


def linear(x: Tensor, values: Tensor, *shadows: Tensor) -> Tensor:
    """x @ values^T; `values` are the shadows' values below each other, and the shadows get the gradients."""
    result: Tensor = _Linear.apply(x, values, *shadows)
    return result


def embed(shadow: Tensor, values: Tensor, ids: Tensor) -> Tensor:
    """Rows `ids` of `values`; the gradient goes to the shadow."""
    result: Tensor = _Embed.apply(shadow, values, ids)
    return result
