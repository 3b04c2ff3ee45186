"""The residual stream, or two that are mixed doubly stochastically (mHC-lite, after arXiv:2409.19606 and 2512.24880).

Two streams s0, s1 begin as the embedding. Around each sublayer, with five trained numbers of its own:

    x   = pre0 * s0 + pre1 * s1                      y = sublayer(x)      m = sigmoid(alpha)
    s0' = m * s0 + (1 - m) * s1 + post0 * y
    s1' = (1 - m) * s0 + m * s1 + post1 * y

and their mean goes into the output norm. Rows and columns of the mixing matrix sum to 1, so the mean of the streams is
kept by it whatever alpha is. Shapes: x, y, s (T, hidden), numbers (5,): alpha, pre0, pre1, post0, post1.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Mix(torch.autograd.Function):
    """(s0', s1') of s0, s1, y and the numbers."""

    @staticmethod
    def forward(ctx: Any, s0: Tensor, s1: Tensor, y: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        m, post = torch.sigmoid(numbers[0]), numbers[3:]
        ctx.save_for_backward(s0, s1, y, numbers)
        return torch.lerp(s1, s0, m).add_(y * post[0]), torch.lerp(s0, s1, m).add_(y * post[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g0: Tensor, g1: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        s0, s1, y, numbers = ctx.saved_tensors
        m, post = torch.sigmoid(numbers[0]), numbers[3:]
        # d s0' / d m = s0 - s1 = -d s1' / d m
        d_m = torch.dot((g0 - g1).flatten(), (s0 - s1).flatten())
        wide_y = y.to(g0.dtype).flatten()
        d_numbers = torch.zeros_like(numbers)
        d_numbers[0] = d_m * m * (1 - m)
        d_numbers[3] = torch.dot(g0.flatten(), wide_y)
        d_numbers[4] = torch.dot(g1.flatten(), wide_y)
        d_y = torch.mul(g0, post[0]).add_(g1 * post[1]).to(y.dtype)
        return torch.lerp(g1, g0, m), torch.lerp(g0, g1, m), d_y, d_numbers


class Streams:
    """Of one forward pass."""

    def __init__(self, x: Tensor, num_streams: int) -> None:
        self._streams = [x] * num_streams

    def add(self, numbers: Tensor | None, sublayer: Callable[[Tensor], Tensor], rows: Tensor | None = None) -> None:
        """`rows`: those that the sublayer gives, which are the only ones wanted from here on."""
        if numbers is None:
            (x,) = self._streams
            y = sublayer(x)
            self._streams = [(x if rows is None else x[rows]) + y]
            return
        s0, s1 = self._streams
        y = sublayer(numbers[1] * s0 + numbers[2] * s1)
        if rows is not None:
            s0, s1 = s0[rows], s1[rows]
        self._streams = list(_Mix.apply(s0, s1, y, numbers))

    def mean(self) -> Tensor:
        if len(self._streams) == 1:
            return self._streams[0]
        return (self._streams[0] + self._streams[1]) / 2
