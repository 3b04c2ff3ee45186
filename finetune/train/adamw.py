"""AdamW by torch's functional form, fused.

`torch.optim.AdamW` computes the same, but the first call of any `torch.optim.Optimizer` imports torch._dynamo: 80 MB
and a second, for a compiler that nothing here uses. State has torch's names: checkpoints are read either way.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

EPSILON = 1e-8


class AdamW:
    """Of tensors with `grad`; those without one stay as they are. Decoupled weight decay (arXiv:1711.05101)."""

    def __init__(
        self, tensors: Sequence[Tensor], learning_rate: float, betas: tuple[float, float], *, weight_decay: float
    ) -> None:
        self.tensors = list(tensors)
        self.learning_rate = learning_rate
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        """`step`, `exp_avg` and `exp_avg_sq` of each that has been moved."""
        self._betas = betas
        self._weight_decay = weight_decay

    @torch.no_grad()
    def step(self) -> None:
        moved = [tensor for tensor in self.tensors if tensor.grad is not None]
        states = [self._state_of(tensor) for tensor in moved]
        adamw(
            moved,
            [tensor.grad.contiguous() for tensor in moved if tensor.grad is not None],  # it reads memory, not strides
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=self._betas[0],
            beta2=self._betas[1],
            lr=self.learning_rate,
            weight_decay=self._weight_decay,
            eps=EPSILON,
            maximize=False,
        )

    def _state_of(self, tensor: Tensor) -> dict[str, Tensor]:
        if tensor not in self.state:
            self.state[tensor] = {
                "step": torch.zeros((), device=tensor.device),
                "exp_avg": torch.zeros_like(tensor),
                "exp_avg_sq": torch.zeros_like(tensor),
            }
        return self.state[tensor]
