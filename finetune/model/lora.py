"""LoRA factors of a training model: which projections have them, with which rank and scale, and their first values.

Names are those in PEFT's files. A starts Kaiming-uniform as PEFT's does, B at zero, so that a fresh adapter changes
nothing; each matrix draws from a generator of its own (seed, name), so that no value depends on which others exist.
Factors are float32 leaves that require gradients (float64 in a float64 model).
"""

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from quant.model_types import ModelConfig

_Value = TypeVar("_Value")

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GROUP_PROJECTIONS: dict[str, tuple[str, ...]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}


@dataclass(frozen=True)
class LoraSpec:
    """As PEFT's LoraConfig. Keys of the patterns are regular expressions for the end of a module's name."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    """With dropout, packed and plain runs draw different masks and no longer agree."""
    use_rslora: bool = False
    """Scale alpha / sqrt(rank) instead of alpha / rank."""
    targets: tuple[str, ...] = PROJECTIONS
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = set(self.targets) - set(PROJECTIONS)
        if unknown or not self.targets:
            raise ValueError(f"targets are {self.targets}; accepted: one or more of {', '.join(PROJECTIONS)}")
        ranks = (self.rank, *self.rank_pattern.values())
        if min(ranks) < 1:
            raise ValueError(f"a rank is {min(ranks)}; it must be 1 or more")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be at least 0 and below 1")

    def rank_of(self, module: str) -> int:
        return _lookup(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        alpha, rank = _lookup(self.alpha_pattern, module, self.alpha), self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def _lookup(pattern: Mapping[str, _Value], module: str, default: _Value) -> _Value:
    """PEFT's rule (`get_pattern_key`): the first key that matches the end of the name."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def module_name(layer: int, projection: str) -> str:
    """transformers' name of a projection."""
    block = "self_attn" if projection in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
    return f"model.layers.{layer}.{block}.{projection}"


def parameter_name(module: str, half: str) -> str:
    """PEFT's name of A or B in its file."""
    return f"base_model.model.{module}.lora_{half}.weight"


def factor_shapes(config: ModelConfig, spec: LoraSpec) -> Iterator[tuple[str, tuple[int, int]]]:
    """Every factor's name and shape: A (rank, in), then B (out, rank), in the order of the forward pass."""
    for layer in range(config.num_layers):
        for projection in PROJECTIONS:
            if projection in spec.targets:
                module = module_name(layer, projection)
                rows, columns = config.projection_shape(projection)
                yield parameter_name(module, "A"), (spec.rank_of(module), columns)
                yield parameter_name(module, "B"), (rows, spec.rank_of(module))


def make_factors(
    config: ModelConfig, spec: LoraSpec, *, seed: int, dtype: torch.dtype, device: torch.device
) -> dict[str, torch.Tensor]:
    factors = {}
    for name, shape in factor_shapes(config, spec):
        values = torch.zeros(shape)  # float32 whatever the type: models of different precision begin alike
        if ".lora_A." in name:
            bound = shape[1] ** -0.5  # kaiming_uniform_ with a = sqrt(5)
            values.uniform_(-bound, bound, generator=keyed_generator(seed, name))
        factors[name] = values.to(device, dtype).requires_grad_()
    return factors


def keyed_generator(*key: int | str) -> torch.Generator:
    """A generator for this key alone."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
