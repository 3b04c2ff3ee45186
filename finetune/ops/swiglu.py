"""SwiGLU over gate and up side by side, silu(gate) * up: forward and backward.

Nothing of the inside is kept: the backward pass recomputes silu from gate. It has no autograd function of its own; the
down projection runs it before itself (prologues.py). Shapes: gate_up (T, 2F), result (T, F).
"""

import torch
import torch.nn.functional as F


def swiglu_forward(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def swiglu_backward(grad: torch.Tensor, gate_up: torch.Tensor, silu: torch.Tensor) -> torch.Tensor:
    """Gradient of gate_up, given silu(gate) (T, F)."""
    gate, up = gate_up.chunk(2, dim=-1)
    result = torch.empty_like(gate_up)
    d_gate, d_up = result.chunk(2, dim=-1)
    torch.mul(grad, silu, out=d_up)
    torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=d_gate)
    return result
