"""RMSNorm, y = w * x / sqrt(mean(x^2) + eps): forward, backward, and the autograd function.

Computed in float32 (float64 for float64) whatever the inputs' type. The weight gets a gradient where it requires one.
What is kept besides x is 1/sqrt, one number a row. Shapes: x (..., C), weight (C).
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from finetune.ops.numeric import wide_dtype


def rms_norm_forward(
    x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """y in `dtype`, and 1/sqrt(mean(x^2) + eps) as (..., 1)."""
    wide = x.to(wide_dtype(x.dtype))
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    rstd = torch.rsqrt(norm * norm / x.shape[-1] + eps)
    y = torch.mul(wide, rstd).mul_(weight)
    return y.to(dtype), rstd


def rms_norm_backward(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor) -> torch.Tensor:
    """Gradient of x, in x's type: rstd * (w dy - x * rstd^2 * mean(w dy x))."""
    wide = x.to(rstd.dtype)
    scaled = grad * weight
    mean = torch.linalg.vecdot(scaled, wide).unsqueeze(-1) / x.shape[-1]
    result = scaled.addcmul_(wide, mean * rstd * rstd, value=-1).mul_(rstd)
    return result.to(x.dtype)


def rms_norm_weight_gradient(grad: torch.Tensor, x: torch.Tensor, rstd: torch.Tensor) -> torch.Tensor:
    """(C,) in the wide type: the sum over the rows of dy * x * rstd."""
    return torch.mul(x.to(rstd.dtype), rstd).mul_(grad).flatten(0, -2).sum(0)


class RmsNorm(torch.autograd.Function):
    """The norm by itself: of the last hidden states, and of Q and K per head."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
        y, rstd = rms_norm_forward(x, weight, eps, dtype)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        d_weight = rms_norm_weight_gradient(grad, x, rstd) if ctx.needs_input_grad[1] else None
        return rms_norm_backward(grad, x, weight, rstd), d_weight, None, None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`dtype` of the result: x's unless given."""
    result: torch.Tensor = RmsNorm.apply(x, weight, eps, dtype or x.dtype)
    return result
