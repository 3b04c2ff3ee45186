"""Activation checkpointing: of each layer only its input is kept, in one block; the layer runs again for gradients.

One block for all inputs, reused by every micro-batch: as tensors of their own among a layer's passing ones they leave
holes in the heap that nothing fits into (at 4,096 tokens on the default model more than 200 MB). On CUDA with `offload`
the block is pinned host memory: a side stream copies inputs out while the next layers compute, and back one layer
before they are needed. The CUDA path is type-checked and its order of calls is run on the CPU; it is UNTRIED on a GPU.
Exact: copies change no bit. Not here: what a layer is (layer.py).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

Run = Callable[[torch.Tensor], torch.Tensor]


class LayerInputs:
    """(layers, T, hidden), kept from one forward to its backward pass; `put` in order, `take` in reverse."""

    def __init__(self, num_layers: int, device: torch.device, *, offload: bool) -> None:
        self._num_layers, self._device = num_layers, device
        self._is_apart = offload and device.type == "cuda"
        self._offload = offload
        self._block = torch.empty(0)
        self._shape: tuple[int, ...] = ()
        self._stream = torch.cuda.Stream(device) if self._is_apart else None
        self._coming: dict[int, torch.Tensor] = {}
        self._pass = 0

    def begin(self, like: torch.Tensor) -> None:
        """Room for a micro-batch of inputs like this one; those of the one before are gone."""
        self._pass += 1
        size = self._num_layers * like.numel()
        if self._block.dtype != like.dtype or self._block.numel() < size:
            place = torch.device("cpu") if self._is_apart else self._device
            self._block = torch.empty(0)  # the old one goes before the new one comes
            self._block = torch.empty(size, dtype=like.dtype, device=place, pin_memory=self._is_apart)
        self._shape = tuple(like.shape)
        self._coming.clear()

    def put(self, index: int, x: torch.Tensor) -> int:
        """Returns what `take` wants to know."""
        if self._stream is None:
            self._slot(index).copy_(x)
            return self._pass
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._slot(index).copy_(x, non_blocking=True)
        x.record_stream(self._stream)  # its memory is not used again before it is copied
        return self._pass

    def take(self, index: int, number: int) -> torch.Tensor:
        """What `put` was given. The one before it begins to come back meanwhile."""
        assert number == self._pass, "another forward pass came before this one's backward pass"
        if not self._offload:
            return self._slot(index)
        if index not in self._coming:
            self._fetch(index)
        x = self._coming.pop(index)
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            x.record_stream(current)
        if index > 0:
            self._fetch(index - 1)
        return x

    def _fetch(self, index: int) -> None:
        if self._stream is None:
            self._coming[index] = self._slot(index).clone()
            return
        with torch.cuda.stream(self._stream):
            self._coming[index] = self._slot(index).to(self._device, non_blocking=True)

    def _slot(self, index: int) -> torch.Tensor:
        size = math.prod(self._shape)
        return self._block[index * size : (index + 1) * size].view(self._shape)


class Checkpointed(torch.autograd.Function):
    """One layer. `token` requires a gradient, so that the first layer's output does too; gradients of the layer's own
    parameters are added to them when it runs again."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, token: torch.Tensor, run: Run, inputs: LayerInputs, index: int
    ) -> torch.Tensor:
        ctx.number = inputs.put(index, x)
        ctx.run, ctx.inputs, ctx.index = run, inputs, index
        return run(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None, None]:
        x = ctx.inputs.take(ctx.index, ctx.number).detach().requires_grad_(ctx.needs_input_grad[0])
        with torch.enable_grad():
            y = ctx.run(x)
        torch.autograd.backward(y, grad)
        return x.grad, None, None, None, None


def run_checkpointed(run: Run, x: torch.Tensor, inputs: LayerInputs, index: int) -> torch.Tensor:
    """`run(x)`, with only x kept."""
    token = torch.empty(0, requires_grad=True)
    result: torch.Tensor = Checkpointed.apply(x, token, run, inputs, index)
    return result
