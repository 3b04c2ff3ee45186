"""The frozen base of a training model, straight from the served file: per layer four matrices, its norms and biases.

Q, K and V are one matrix, and so are gate and up. A matrix is unpacked into ONE buffer (of each thread) whenever a pass
asks for it, or once for good where `cache` is chosen. Rows of Q and K come out in half-split order, as adapters have
them. The output head is kept in the compute type (57 MB for the default model in bf16): every micro-batch runs it over
several chunks.
Not covered: LoRA (lora.py), what one format's bits mean (blocks.py).
"""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from finetune.model.frozen import FrozenMatrix, Scratch, freeze, read_rows
from quant.model_types import ModelFile
from quant.model_types import Tensor as FileTensor
from quant.quantize import to_float32
from quant.rope_order import half_split_rows
from quant.tensor_rules import EMBEDDING, HEAD, OUTPUT_NORM

GROUPS: dict[str, tuple[str, ...]] = {
    "qkv": ("attn_q", "attn_k", "attn_v"),
    "o": ("attn_output",),
    "gate_up": ("ffn_gate", "ffn_up"),
    "down": ("ffn_down",),
}
"""Matrices that share their input, by GGUF name."""


@dataclass(frozen=True, eq=False)
class FrozenLayer:
    """`weights[group]()` is (out, in) in the compute type, valid until any matrix is asked for again."""

    weights: dict[str, Callable[[], torch.Tensor]]
    attention_norm: torch.Tensor
    mlp_norm: torch.Tensor
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None


class _Buffer(threading.local):
    """Where one group at a time is unpacked to: every thread that computes has its own."""

    def __init__(self, num_elements: int, dtype: torch.dtype, device: torch.device) -> None:
        self._values = torch.empty(num_elements, dtype=dtype, device=device)

    def view(self, shape: tuple[int, int]) -> torch.Tensor:
        return self._values[: shape[0] * shape[1]].view(shape)

    @property
    def num_bytes(self) -> int:
        return self._values.numel() * self._values.element_size()


class FrozenWeights:
    """Reads the file once; keeps the file's own bits of every layer, and embedding rows on demand."""

    def __init__(self, file: ModelFile, *, device: torch.device, dtype: torch.dtype, cache: bool) -> None:
        self.config = file.config
        self.dtype = dtype
        self._wide = torch.promote_types(dtype, torch.float32)
        self._device = device
        self._tensors = file.tensors
        self._scratch = Scratch(device)
        self._buffer = _Buffer(0 if cache else _largest_group(file), dtype, device)
        self._matrices: list[FrozenMatrix] = []
        self._cached: list[torch.Tensor] = []
        self.layers = [self._layer(index, cache) for index in range(file.config.num_layers)]
        self.output_norm = self._vector(OUTPUT_NORM)
        self.head = self._head()
        for tensor in file.tensors.values():  # once more: reading one maps pages of its neighbours, 31 MB in all
            tensor.release()
        if cache:
            self._scratch.clear()

    def embed(self, token_ids: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        """(T, hidden), from the file's own rows."""
        ids, places = np.unique(token_ids, return_inverse=True)
        rows = torch.from_numpy(read_rows(self._tensors[EMBEDDING], ids)).to(self._device)
        self._tensors[EMBEDDING].release()
        return rows.to(dtype)[torch.from_numpy(places).to(self._device)]

    @property
    def num_bytes(self) -> int:
        """Held in memory: packed or cached layers, buffers, head. Mapped pages of the file are not counted."""
        dense = sum(tensor.numel() * tensor.element_size() for tensor in (*self._cached, self.head))
        return (
            dense
            + self._buffer.num_bytes
            + self._scratch.num_bytes
            + sum(matrix.num_bytes for matrix in self._matrices)
        )

    def dense_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor by its GGUF name, Q and K in half-split order; each is valid until the next one is asked for."""
        yield EMBEDDING, torch.from_numpy(read_rows(self._tensors[EMBEDDING], np.arange(self.config.vocab_size)))
        yield OUTPUT_NORM, self.output_norm
        if not self.config.tie_embeddings:
            yield HEAD, self.head
        for name in self._tensors:
            if len(self._tensors[name].shape) == 1 and name != OUTPUT_NORM:
                yield name, self._vector(name)
        for index, layer in enumerate(self.layers):
            for group, kinds in GROUPS.items():
                names = [f"blk.{index}.{kind}.weight" for kind in kinds]
                parts = layer.weights[group]().split([self._tensors[name].shape[0] for name in names])
                yield from zip(names, parts, strict=True)

    def _layer(self, index: int, cache: bool) -> FrozenLayer:
        def vector(kind: str) -> torch.Tensor:
            return self._vector(f"blk.{index}.{kind}")

        config = self.config
        biases = [vector(f"{kind}.bias") for kind in GROUPS["qkv"]] if config.qkv_bias else None
        return FrozenLayer(
            weights={group: self._group(index, kinds, cache) for group, kinds in GROUPS.items()},
            attention_norm=vector("attn_norm.weight"),
            mlp_norm=vector("ffn_norm.weight"),
            qkv_bias=None if biases is None else torch.cat(biases).to(self.dtype),
            q_norm=vector("attn_q_norm.weight") if config.qk_norm else None,
            k_norm=vector("attn_k_norm.weight") if config.qk_norm else None,
        )

    def _group(self, index: int, kinds: Sequence[str], cache: bool) -> Callable[[], torch.Tensor]:
        tensors = [self._tensors[f"blk.{index}.{kind}.weight"] for kind in kinds]
        parts = [freeze(tensor, self._row_order(tensor), self._scratch, self._device) for tensor in tensors]
        shape = sum(part.shape[0] for part in parts), parts[0].shape[1]
        if cache:
            dense = unpack_rows(parts, torch.empty(shape, dtype=self.dtype, device=self._device))
            self._cached.append(dense)
            return lambda: dense
        self._matrices += parts
        return lambda: unpack_rows(parts, self._buffer.view(shape))

    def _row_order(self, tensor: FileTensor) -> np.ndarray | None:
        if not tensor.rope_interleaved:
            return None
        return half_split_rows(self.config, tensor.shape[0] // self.config.head_dim)

    def _vector(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name]
        values = np.array(to_float32(tensor.read(), tensor.type))  # a copy: vectors are small
        rows = self._row_order(tensor)
        return torch.from_numpy(values if rows is None else values[rows]).to(self._device, self._wide)

    def _head(self) -> torch.Tensor:
        tensor = self._tensors[EMBEDDING if self.config.tie_embeddings else HEAD]
        head = torch.empty(tensor.shape, dtype=self.dtype, device=self._device)
        step = max(1, (1 << 19) // tensor.shape[1])  # half a million weights at a time: the float32 rows stay small
        for start in range(0, tensor.shape[0], step):
            ids = np.arange(start, min(start + step, tensor.shape[0]))
            head[start : start + step] = torch.from_numpy(read_rows(tensor, ids)).to(self._device)
            tensor.release()  # the mapped pages, before they are all there
        return head


def _largest_group(file: ModelFile) -> int:
    """Elements."""
    return max(
        sum(math.prod(file.tensors[f"blk.{index}.{kind}.weight"].shape) for kind in kinds)
        for index in range(file.config.num_layers)
        for kinds in GROUPS.values()
    )


def unpack_rows(parts: Sequence[FrozenMatrix], out: torch.Tensor) -> torch.Tensor:
    """The parts below each other in `out`, which is returned."""
    at = 0
    for part in parts:
        part.unpack(out[at : at + part.shape[0]])
        at += part.shape[0]
    return out
