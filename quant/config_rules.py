"""Rules about a model's configuration that hold in every file format: value checks, rotary factors, sliding windows."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quant.errors import ModelFileError
from quant.model_types import ModelConfig

# Far above any real model, and low enough that products of a few of these stay exact everywhere.
_MAX_SIZE = 2**31 - 1


class ConfigValues:
    """Reads typed values from untrusted key-value pairs; each getter raises ModelFileError naming the key."""

    def __init__(self, path: Path, values: Mapping[str, Any], prefix: str = "") -> None:
        self._path = path
        self._values = values
        self._prefix = prefix

    def __contains__(self, key: str) -> bool:
        return self._values.get(self._prefix + key) is not None

    def error(self, key: str, reason: str) -> ModelFileError:
        """The failure to raise about `key`."""
        return ModelFileError(self._path, reason, tensor=self._prefix + key)

    def raw(self, key: str) -> Any:
        """The value as it is, None when absent."""
        return self._values.get(self._prefix + key)

    def size(self, key: str, default: int | None = None) -> int:
        """A positive whole number; an array of equal ones (one per layer) counts as one."""
        value = self._required(key, default)
        if isinstance(value, list) and value:
            if any(item != value[0] for item in value):
                raise self.error(key, "values that differ by layer are not supported")
            value = value[0]
        if type(value) is not int or not 1 <= value <= _MAX_SIZE:
            raise self.error(key, f"{_shown(value)} is not a whole number of 1 to {_MAX_SIZE}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite positive number."""
        value = self._required(key, default)
        if type(value) not in (int, float) or not math.isfinite(value) or not 0 < value <= 1e30:
            raise self.error(key, f"{_shown(value)} is not a finite number above 0")
        return float(value)

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        value = self._required(key, default)
        if not isinstance(value, str):
            raise self.error(key, f"{_shown(value)} is not a string")
        return value

    def _required(self, key: str, default: Any) -> Any:
        value = self.raw(key)
        if value is None:
            value = default
        if value is None:
            raise self.error(key, "the key is missing")
        return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_config(path: Path, config: ModelConfig) -> None:
    """Refuse sizes that contradict each other."""

    def refuse(reason: str) -> ModelFileError:
        return ModelFileError(path, reason)

    if config.num_heads % config.num_kv_heads:
        raise refuse(f"{config.num_heads} attention heads do not share {config.num_kv_heads} key-value heads evenly")
    if config.rope_dim % 2 or config.rope_dim > config.head_dim:
        raise refuse(f"{config.rope_dim} rotary dimensions: even and at most the head's {config.head_dim} are accepted")
    if config.rms_norm_eps >= 1:
        raise refuse(f"a norm epsilon of {config.rms_norm_eps:g}; below 1 is accepted")
    if config.rope_freq_factors is not None:
        if len(config.rope_freq_factors) != config.rope_dim // 2:
            raise refuse(f"{len(config.rope_freq_factors)} rotary factors for {config.rope_dim // 2} frequencies")
        if not all(math.isfinite(factor) and factor > 0 for factor in config.rope_freq_factors):
            raise refuse("a rotary frequency factor is not a finite number above 0")


def default_head_dim(path: Path, hidden_size: int, num_heads: int) -> int:
    """hidden / heads, which must come out even."""
    if hidden_size % num_heads:
        raise ModelFileError(path, f"a hidden size of {hidden_size} does not divide into {num_heads} heads")
    return hidden_size // num_heads


def scaled_factors(factors: tuple[float, ...] | None, scale: float, rope_dim: int) -> tuple[float, ...] | None:
    """Fold linear RoPE scaling (positions divided by `scale`) into the factors that divide the frequencies."""
    if scale == 1.0:
        return factors
    return tuple(factor * scale for factor in factors or (1.0,) * (rope_dim // 2))


def llama3_factors(
    rope_dim: int,
    theta: float,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_context: int,
) -> tuple[float, ...]:
    """Llama 3.1's scaling as divisors of the frequencies; `_compute_llama3_parameters` in transformers.

    Wavelengths under original/high keep 1, those over original/low get `factor`, those between are blended.
    """
    factors = []
    for index in range(0, rope_dim, 2):
        wavelength = 2 * math.pi * theta ** (index / rope_dim)
        if wavelength < original_context / high_freq_factor:
            factors.append(1.0)
        elif wavelength > original_context / low_freq_factor:
            factors.append(factor)
        else:
            smooth = (original_context / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return tuple(factors)


def cap_to_window(context_length: int, window: int | None, notes: list[str]) -> int:
    """A context no longer than the sliding window, within which windowed and full attention are the same."""
    if window is None or window >= context_length:
        return context_length
    notes.append(
        f"the context of {context_length} tokens is capped at the sliding window's {window}: "
        "sliding-window attention is not implemented, and within the window it equals full attention"
    )
    return window
