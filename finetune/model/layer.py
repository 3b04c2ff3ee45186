"""One decoder layer of the training model: llama, qwen2 and qwen3, over a packed sequence.

Composes the hand-written ops; keeps per token the residual stream twice, Q, K, V, the attention's output, gate and up,
and the low-rank products. Norms and SwiGLU are computed again in the backward pass.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from finetune.errors import TrainingError
from finetune.model.lora import GROUP_PROJECTIONS, LoraSpec, module_name, parameter_name
from finetune.model.weights import FrozenLayer
from finetune.ops.attention import Layout, attend
from finetune.ops.lora_projection import LoraPart, Projection, project
from finetune.ops.prologues import Norm, Plain, Prologue, Swiglu
from finetune.ops.rms_norm import rms_norm
from quant.model_types import ModelConfig

Dropout = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Layer:
    """Four projections with their LoRA factors; `without_lora` is the same layer of the base model."""

    config: ModelConfig
    projections: dict[str, Projection]
    factors: dict[str, list[torch.Tensor]]
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None

    def without_lora(self) -> "Layer":
        bare = {group: replace(projection, parts=()) for group, projection in self.projections.items()}
        return replace(self, projections=bare, factors={group: [] for group in bare})

    def with_dropout(self, make: Callable[[str], Dropout]) -> "Layer":
        """`make(group)` gives that group's mask."""
        masked = {group: replace(projection, dropout=make(group)) for group, projection in self.projections.items()}
        return replace(self, projections=masked)

    def forward(self, x: torch.Tensor, layout: Layout, rows: torch.Tensor | None = None) -> torch.Tensor:
        """x (T, hidden) -> the same. `rows`: those whose result is wanted (in the last layer, those with loss)."""
        config = self.config
        widths = [config.num_heads * config.head_dim] + [config.num_kv_heads * config.head_dim] * 2
        q, k, v = (part.unflatten(1, (-1, config.head_dim)) for part in self._project("qkv", x).split(widths, dim=1))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = rms_norm(q, self.q_norm, config.rms_norm_eps), rms_norm(k, self.k_norm, config.rms_norm_eps)
        attended = attend(q, k, v, layout).flatten(1)
        if rows is not None:
            x, attended = x[rows], attended[rows]
        x = x + self._project("o", attended)
        return x + self._project("down", self._project("gate_up", x))

    def _project(self, group: str, source: torch.Tensor) -> torch.Tensor:
        return project(source, self.projections[group], self.factors[group])


def check_trainable(config: ModelConfig) -> None:
    """Raises TrainingError for a model whose layers are others than these."""
    if config.architecture == "bitnet":
        raise TrainingError("adapters of a bitnet model cannot be trained (accepted: llama, qwen2, qwen3)")
    if config.residual_streams != 1:
        reason = f"this {config.architecture} model has {config.residual_streams} residual streams"
        raise TrainingError(f"adapters of {config.name} cannot be trained: {reason}; one is accepted")


def make_layer(
    config: ModelConfig,
    index: int,
    frozen: FrozenLayer,
    spec: LoraSpec,
    parameters: dict[str, torch.Tensor],
    dtype: torch.dtype,
) -> Layer:
    """Layer `index`, computing in `dtype`. Raises TrainingError."""
    check_trainable(config)
    prologues: dict[str, Prologue] = {
        "qkv": Norm(frozen.attention_norm, config.rms_norm_eps, dtype),
        "o": Plain(),
        "gate_up": Norm(frozen.mlp_norm, config.rms_norm_eps, dtype),
        "down": Swiglu(),
    }
    projections, factors = {}, {}
    for group, names in GROUP_PROJECTIONS.items():
        parts: list[LoraPart] = []
        own: list[torch.Tensor] = []
        start = 0
        for name in names:
            module, end = module_name(index, name), start + config.projection_shape(name)[0]
            if name in spec.targets:
                parts.append(LoraPart(start, end, spec.scale_of(module)))
                own += [parameters[parameter_name(module, half)] for half in "AB"]
            start = end
        bias = frozen.qkv_bias if group == "qkv" else None
        projections[group] = Projection(frozen.weights[group], bias, prologues[group], tuple(parts))
        factors[group] = own
    return Layer(config, projections, factors, frozen.q_norm, frozen.k_norm)
