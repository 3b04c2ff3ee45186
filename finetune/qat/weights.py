"""The parameters of a model that trains quantized, and the values that its products are computed with.

Parameters (shadows) are float32 leaves. Their values (ternary matrices, embedding and head in blocks) are made when
somebody asks and a parameter has changed since: once an optimizer step, however many micro-batches it has. `share`
blends: share * quantized + (1 - share) * shadow, for a model that becomes ternary little by little.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.errors import TrainingError
from finetune.model.weights import GROUPS
from finetune.ops.numeric import wide_dtype
from finetune.qat.quantizers import q4_0, q8_0, ternary
from finetune.qat.shape import Shape, is_ternary
from quant.tensor_rules import EMBEDDING, HEAD

_STD = 0.02


@dataclass(frozen=True, eq=False)
class Values:
    """`layers[i][group]` has the matrices of the group below each other, in the products' type."""

    layers: list[dict[str, Tensor]]
    embedding: Tensor
    """In the wide type: rows are read, not multiplied."""
    head: Tensor


def initial_parameters(shape: Shape, *, seed: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Normal; matrices that add to the residual stream are smaller by the number of additions."""
    generator = torch.Generator().manual_seed(seed)
    small = _STD / math.sqrt(2 * shape.num_layers)
    found = {}
    for name, size in shape.parameter_shapes().items():
        if len(size) == 2:
            std = small if "attn_output" in name or "ffn_down" in name else _STD
            tensor = torch.empty(size, dtype=torch.float32).normal_(0, std, generator=generator)
        elif "_norm." in name:
            tensor = torch.ones(size)
        else:
            tensor = _plain_streams()
        found[name] = tensor.to(device, dtype).requires_grad_()
    return found


def _plain_streams() -> Tensor:
    """Two streams that begin as one: read as their mean, both written to, mixed a little (sigmoid(2) = 0.88)."""
    return torch.tensor([2.0, 0.5, 0.5, 1.0, 1.0]).repeat(2)


class Weights:
    """`is_quantized` False: the values are the shadows, in the products' type."""

    def __init__(
        self, shape: Shape, parameters: Mapping[str, Tensor], dtype: torch.dtype, *, is_quantized: bool = True
    ) -> None:
        self.shape, self.dtype = shape, dtype
        self.parameters = dict(parameters)
        self.is_quantized = is_quantized
        self.share = 1.0
        self._made: tuple[tuple[float, ...], Values] | None = None

    def values(self) -> Values:
        state = (self.share, *(tensor._version for tensor in self.parameters.values()))
        if self._made is None or self._made[0] != state:
            self._made = None  # the old ones go before the new ones come
            self._made = (state, self._make())
        return self._made[1]

    def shadows(self, layer: int, group: str) -> list[Tensor]:
        return [self.parameters[f"blk.{layer}.{kind}.weight"] for kind in GROUPS[group]]

    @property
    def head(self) -> Tensor:
        return self.parameters[EMBEDDING if self.shape.tie_embeddings else HEAD]

    @torch.no_grad()
    def served(self, name: str) -> Tensor:
        """One parameter's values as they are served."""
        tensor = self.parameters[name].detach()
        if not self.is_quantized or tensor.ndim == 1:
            return tensor
        if is_ternary(name):
            exact = ternary(tensor, self.shape.ternary)
            return exact if self.share == 1 else torch.lerp(tensor, exact, self.share)
        return q8_0(tensor) if self.shape.embedding_type == "q8_0" else q4_0(tensor)

    @torch.no_grad()
    def _make(self) -> Values:
        layers = []
        for layer in range(self.shape.num_layers):
            layers.append(
                {
                    group: torch.cat([self.served(f"blk.{layer}.{kind}.weight").to(self.dtype) for kind in kinds])
                    for group, kinds in GROUPS.items()
                }
            )
        embedding = self.served(EMBEDDING).to(wide_dtype(self.dtype))
        head = embedding if self.shape.tie_embeddings else self.served(HEAD)
        return Values(layers, embedding, head.to(self.dtype))


def check_finite(parameters: Mapping[str, Tensor], where: str) -> None:
    """Raises TrainingError naming the first tensor that holds a NaN or an infinity."""
    for name, tensor in parameters.items():
        if not bool(tensor.isfinite().all()):
            raise TrainingError(f"{where}: {name} holds a value that is not finite")
