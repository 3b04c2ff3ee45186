"""Rotary position embedding, half-split: element i of a head turns with element i + rope_dim/2.

`rotate` works in place on a copy that the caller owns; the gradient's way back is the inverse rotation, so that nothing
but the angles is kept. Elements behind rope_dim pass. Attention (attention.py) turns Q and K itself; there is no
autograd function here. Shapes: x (..., T, ..., D), cos and sin broadcast against x[..., :rope_dim/2].
"""

import torch


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, inverse: bool = False) -> torch.Tensor:
    """x, turned in place by its positions' angles."""
    half = cos.shape[-1]
    a, b = x[..., :half], x[..., half : 2 * half]
    sign = 1 if inverse else -1
    turned = torch.mul(a, cos).addcmul_(b, sin, value=sign)
    b.mul_(cos).addcmul_(a, sin, value=-sign)
    a.copy_(turned)
    return x


def rope_angles(
    positions: torch.Tensor, *, theta: float, rope_dim: int, factors: tuple[float, ...] | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (T, rope_dim/2) of `positions` (T), computed in float64; `factors` divide the frequencies."""
    exponents = torch.arange(0, rope_dim, 2, dtype=torch.float64, device=positions.device) / rope_dim
    frequencies = theta**-exponents
    if factors is not None:
        frequencies /= torch.tensor(factors, dtype=torch.float64, device=positions.device)
    angles = positions.double()[:, None] * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)
