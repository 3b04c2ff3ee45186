"""What a projection does with its input first, so that its result need not be kept: nothing, RMSNorm, or SwiGLU.

A prologue is run again in the backward pass ("cheap recompute"): that costs about 1 % of a step and saves, per token
and layer, two normalized hidden states and one activation of the MLP.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from finetune.ops.rms_norm import rms_norm_backward, rms_norm_forward
from finetune.ops.swiglu import swiglu_backward, swiglu_forward


class Prologue(Protocol):
    """source -> x, the projection's input."""

    def forward(self, source: torch.Tensor) -> torch.Tensor: ...

    def recompute(self, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x once more, and what `backward` wants to know."""

    def backward(self, grad: torch.Tensor, source: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        """Gradient of the source from that of x."""


class Plain:
    """x is the source."""

    def forward(self, source: torch.Tensor) -> torch.Tensor:
        return source

    def recompute(self, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return source, source

    def backward(self, grad: torch.Tensor, source: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        return grad


@dataclass(frozen=True, eq=False)
class Norm:
    """x is the RMS-normalized residual stream, in `dtype`."""

    weight: torch.Tensor
    eps: float
    dtype: torch.dtype

    def forward(self, source: torch.Tensor) -> torch.Tensor:
        return rms_norm_forward(source, self.weight, self.eps, self.dtype)[0]

    def recompute(self, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return rms_norm_forward(source, self.weight, self.eps, self.dtype)

    def backward(self, grad: torch.Tensor, source: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        return rms_norm_backward(grad, source, self.weight, known)


class Swiglu:
    """x is silu(gate) * up of a source that holds both."""

    def forward(self, source: torch.Tensor) -> torch.Tensor:
        return swiglu_forward(source)

    def recompute(self, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = source.chunk(2, dim=-1)
        silu = F.silu(gate)
        return silu * up, silu

    def backward(self, grad: torch.Tensor, source: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        return swiglu_backward(grad, source, known)
