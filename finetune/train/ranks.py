"""Sums over the processes of one run. One process sums nothing; several use torch.distributed (gloo on CPUs).

Started by torchrun, which sets the variables that `joined` reads through torch. Gradients are added, not averaged: the
loss is normalized by the weights of all ranks already.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks(Protocol):
    """Which part of every step's micro-batches is ours, and sums over all."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def sum_number(self, value: float) -> float: ...

    def sum_gradients(self, gradients: Sequence[Tensor]) -> None:
        """In place."""

    def spread(self, tensors: Sequence[Tensor], source: int) -> None:
        """What rank `source` has in them, into all ranks' tensors."""


class Alone:
    """One process."""

    rank = 0
    world_size = 1

    def sum_number(self, value: float) -> float:
        return value

    def sum_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Nothing to add."""

    def spread(self, tensors: Sequence[Tensor], source: int) -> None:
        """Nobody to tell."""


class Distributed:
    """An initialized process group."""

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        return dist.get_world_size()

    def sum_number(self, value: float) -> float:
        total = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(total)
        return float(total)

    def sum_gradients(self, gradients: Sequence[Tensor]) -> None:
        flat = _flat(gradients)
        dist.all_reduce(flat)
        _into(gradients, flat)

    def spread(self, tensors: Sequence[Tensor], source: int) -> None:
        flat = _flat(tensors)
        dist.broadcast(flat, source)
        if source != self.rank:
            _into(tensors, flat)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """As one message: many small ones cost a round trip each."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


@torch.no_grad()
def _into(tensors: Sequence[Tensor], flat: Tensor) -> None:
    parts = flat.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


def local_processes() -> int:
    """That torchrun started on this machine, which they share; 1 without it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextmanager
def joined() -> Iterator[Ranks]:
    """The group that torchrun started this process in, or a process alone."""
    if not dist.is_torchelastic_launched():
        yield Alone()
        return
    dist.init_process_group("gloo")
    try:
        yield Distributed()
    finally:
        dist.destroy_process_group()
