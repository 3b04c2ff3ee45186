"""A PEFT `adapter_config.json`: which matrices it adapts, with which rank and scale, or why it cannot be served.

Matching follows PEFT 0.21 (`check_target_module_exists`, `get_pattern_key`, `LoraLayer.update_layer`): suffixes, or a
regular expression over the whole module name, or "all-linear". Whatever would change the result and is not
implemented is refused by its key, and so is every key that this module does not know unless its value says "off".
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from server.engine.lora_types import MAX_RANK, PROJECTIONS
from server.errors import AdapterError

if TYPE_CHECKING:
    from quant.model_file import ModelConfig

# They only shaped the training or name where the adapter comes from.
_IRRELEVANT = frozenset(
    (
        *("auto_mapping", "base_model_name_or_path", "eva_config", "inference_mode", "lora_dropout", "megatron_core"),
        *("peft_version", "qalora_group_size", "revision", "runtime_config"),
    )
)
_READ = frozenset(
    (
        *("alpha_pattern", "bias", "exclude_modules", "init_lora_weights", "layers_pattern", "layers_to_transform"),
        *("lora_alpha", "peft_type", "r", "rank_pattern", "target_modules", "task_type", "use_rslora"),
    )
)
# Initial values of A and B. The others (pissa, olora, loftq, corda, lora_ga) subtract them from the base weights, so
# the adapter does not fit the published base; PEFT can convert such an adapter on saving and then writes `true`.
_HARMLESS_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
_UNSERVED_MODULES = ("lm_head", "model.embed_tokens")
_OFF: tuple[object, ...] = (None, False, "", [], {})


@dataclass(frozen=True, slots=True)
class LoraTarget:
    """One adapted matrix: `module` is its name in transformers' model."""

    layer: int
    projection: str
    module: str
    rank: int
    scale: float


def read_lora_targets(config_json: bytes, model: "ModelConfig") -> list[LoraTarget]:
    """The adapted matrices in layer order. Raises AdapterError naming the key."""
    config = _parse(config_json)
    _refuse_unsupported(config)
    rank = _integer(config, "r", 1, MAX_RANK)
    alpha = _number(config.get("lora_alpha"), "lora_alpha")
    ranks = _pattern(config, "rank_pattern")
    alphas = _pattern(config, "alpha_pattern")
    use_rslora = config.get("use_rslora", False)
    if not isinstance(use_rslora, bool):
        raise AdapterError(f"use_rslora is {use_rslora!r}; it must be true or false")
    matcher = _TargetMatcher(config)
    for module in _UNSERVED_MODULES:
        if not matcher.is_all_linear and matcher.matches(module):
            raise AdapterError(f"target_modules includes {module}, which cannot be adapted (accepted: {_accepted()})")
    targets = []
    for layer, projection, module in _modules(model.num_layers):
        if not matcher.matches(module):
            continue
        own_rank = _lookup(ranks, module)
        own_rank = rank if own_rank is None else own_rank
        if type(own_rank) is not int or not 1 <= own_rank <= MAX_RANK:
            raise AdapterError(f"rank_pattern gives {module} rank {own_rank!r}; it must be 1 to {MAX_RANK}")
        own_alpha = _lookup(alphas, module)
        own_alpha = alpha if own_alpha is None else _number(own_alpha, "alpha_pattern")
        scale = own_alpha / (math.sqrt(own_rank) if use_rslora else own_rank)
        targets.append(LoraTarget(layer, projection, module, own_rank, scale))
    if not targets:
        raise AdapterError(
            f"target_modules {config['target_modules']!r} matches nothing in this model (accepted: {_accepted()})"
        )
    return targets


def _parse(config_json: bytes) -> dict[str, Any]:
    try:
        config = json.loads(config_json)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"adapter_config.json is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise AdapterError("adapter_config.json must hold an object")
    return config


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"peft_type is {config.get('peft_type')!r}; only LORA is supported")
    if config.get("bias", "none") != "none":
        raise AdapterError(f"bias is {config['bias']!r}; only 'none' is supported")
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise AdapterError(f"task_type is {config['task_type']!r}; only CAUSAL_LM is supported")
    init = config.get("init_lora_weights")
    if not any(init is one or (isinstance(init, str) and init == one) for one in _HARMLESS_INITS):
        raise AdapterError(
            f"init_lora_weights is {init!r}, which changes the base weights; save the adapter with PEFT's"
            " path_initial_model_for_weight_conversion to make it fit the original base"
        )
    for key in sorted(config.keys() - _READ - _IRRELEVANT):
        if config[key] not in _OFF:
            raise AdapterError(f"{key} is {str(config[key])[:100]!r}; this key is not supported")


class _TargetMatcher:
    """PEFT's rule of which modules an adapter applies to."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._targets = self._names(config, "target_modules")
        self._excluded = self._names(config, "exclude_modules") or []
        if not self._targets:
            raise AdapterError("target_modules is missing")
        self.is_all_linear = isinstance(self._targets, str) and self._targets.lower() == "all-linear"
        layers = config.get("layers_to_transform")
        layers = [layers] if isinstance(layers, int) else layers
        if layers and not (isinstance(layers, list) and all(type(layer) is int for layer in layers)):
            raise AdapterError(f"layers_to_transform is {layers!r}; it must be an integer or a list of integers")
        self._layers: list[int] = layers or []
        self._layer_patterns = self._layer_index_patterns(config)
        if isinstance(self._targets, str) and self._layers:
            raise AdapterError("layers_to_transform cannot go with a target_modules that is one string")

    def matches(self, module: str) -> bool:
        if self._is_named(self._excluded, module):
            return False
        if self.is_all_linear:
            return True
        if not self._is_named(self._targets, module):
            return False
        if isinstance(self._targets, str) or module in self._targets or not self._layers:
            return True  # a full name is taken whatever its layer
        for pattern in self._layer_patterns:
            found = pattern.match(module)
            if found:
                return int(found["index"]) in self._layers
        return False

    @staticmethod
    def _is_named(names: str | list[str], module: str) -> bool:
        if isinstance(names, str):
            return _compiled(names).fullmatch(module) is not None
        return any(module == name or module.endswith(f".{name}") for name in names)

    @staticmethod
    def _names(config: Mapping[str, Any], key: str) -> str | list[str]:
        value = config.get(key) or []
        if isinstance(value, str) or (isinstance(value, list) and all(isinstance(name, str) for name in value)):
            return value
        raise AdapterError(f"{key} is {str(value)[:100]!r}; it must be a string or a list of strings")

    def _layer_index_patterns(self, config: Mapping[str, Any]) -> list[re.Pattern[str]]:
        names = self._names(config, "layers_pattern")
        if names and not self._layers:
            raise AdapterError("layers_pattern needs layers_to_transform")
        if not names:
            return [re.compile(r".*?\.[^.]*\.(?P<index>\d+)\.")]
        names = [names] if isinstance(names, str) else names
        return [_compiled(rf"(?:^|.*?\.){name}\.(?P<index>\d+)\.") for name in names]


def _modules(num_layers: int) -> Iterator[tuple[int, str, str]]:
    for layer in range(num_layers):
        for projection in PROJECTIONS:
            block = "self_attn" if projection in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
            yield layer, projection, f"model.layers.{layer}.{block}.{projection}"


def _lookup(pattern: Mapping[str, Any], module: str) -> Any | None:
    """The first entry whose key, a regular expression, matches the end of the module's name."""
    for key, value in pattern.items():
        if _compiled(rf"(.*\.)?({key})$").match(module):
            return value
    return None


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise AdapterError(f"{pattern!r} is not a regular expression: {error}") from None


def _pattern(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise AdapterError(f"{key} must be an object of module patterns")
    return value


def _integer(config: Mapping[str, Any], key: str, lowest: int, highest: int) -> int:
    value = config.get(key)
    if type(value) is not int or not lowest <= value <= highest:
        raise AdapterError(f"{key} is {value!r}; it must be an integer from {lowest} to {highest}")
    return value


def _number(value: Any, key: str) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9:
        return float(value)
    raise AdapterError(f"{key} is {str(value)[:100]}; it must be a number below 1e9")


def _accepted() -> str:
    return ", ".join(PROJECTIONS)
