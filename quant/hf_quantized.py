"""Checkpoints of Hugging Face that are quantized already: which tensors make up one weight, and what it is served as.

`quantization_config` in config.json says how: "bitsandbytes" (NF4, nf4.py) or "bitnet" (packed ternary, or floats that
are to be made ternary, bitnet_import.py). A weight keeps its name; its companions (`weight.absmax`, `weight_scale`)
go. NF4 is served as Q8_0, whose own error is a tenth of NF4's, or as what `--quantize` asks for; ternary as TQ2_0.
Nothing is guessed: another method, setting or table of codes is refused by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from quant import nf4
from quant.bitnet_import import pack_rows, served_type, uint8_rows
from quant.errors import ModelFileError
from quant.formats import BLOCK, GGMLType
from quant.quantize import quantize as quantize_rows
from quant.quantize import to_float32
from quant.safetensors_reader import ByteTensor, SafeTensor
from quant.ternary import absmean, absmean_scale

Raw = SafeTensor | ByteTensor
_NF4_STATE = ".quant_state.bitsandbytes__nf4"
_NF4_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", _NF4_STATE)
_SCALE = "_scale"


@dataclass(frozen=True)
class Packed:
    """A weight made of several tensors: what it becomes, and the bytes of that, made each time they are read."""

    type: GGMLType
    shape: tuple[int, ...]
    data: "NF4Data | TernaryData" = field(repr=False)


@dataclass(frozen=True)
class Scheme:
    """What config.json says of the weights."""

    path: Path
    method: str
    """"" for plain floats, "nf4", "ternary" (packed), "online" (floats made ternary)."""
    divides: bool = False
    """Ternary weights are divided by their `weight_scale`, as in transformers' BitLinear; AutoBitLinear multiplies."""


def read_scheme(path: Path, config: Any) -> Scheme:
    """From `quantization_config` (None: there is none). Raises ModelFileError for what is not implemented."""
    if config is None:
        return Scheme(path, "")
    if not isinstance(config, dict):
        raise ModelFileError(path, f"{config!r} is not an object", tensor="quantization_config")
    method = config.get("quant_method")
    if method == "bitsandbytes":
        _check(path, config, {"load_in_8bit": (False, None), "bnb_4bit_quant_type": ("nf4",)})
        _check(path, config, {"load_in_4bit": (True,), "bnb_4bit_quant_storage": ("uint8", None)})
        return Scheme(path, "nf4")
    if method == "bitnet":
        _check(path, config, {"use_rms_norm": (False, None), "quantization_mode": ("offline", "online", None)})
        _check(path, config, {"linear_class": ("bitlinear", "autobitlinear", None)})
        is_auto = config.get("linear_class") == "autobitlinear"
        if is_auto and config.get("quantization_mode") == "online":
            return Scheme(path, "online")
        return Scheme(path, "ternary", divides=not is_auto)
    reason = f"{method!r} is not supported (accepted: bitsandbytes with NF4, bitnet)"
    raise ModelFileError(path, reason, tensor="quantization_config.quant_method")


def _check(path: Path, config: Mapping[str, Any], accepted: Mapping[str, tuple[Any, ...]]) -> None:
    for key, values in accepted.items():
        if config.get(key) not in values:
            shown = " or ".join(repr(value) for value in values if value is not None)
            reason = f"{config.get(key)!r} is not implemented (accepted: {shown})"
            raise ModelFileError(path, reason, tensor=f"quantization_config.{key}")


def gather(
    scheme: Scheme, tensors: Mapping[str, Raw], target: GGMLType | None
) -> tuple[dict[str, SafeTensor | Packed], tuple[str, ...]]:
    """Whole weights by their Hugging Face names, and notes. `target` is what `--quantize` wants NF4 to become."""
    rest = dict(tensors)
    found: dict[str, SafeTensor | Packed] = {}
    for name, tensor in tensors.items():
        if scheme.method == "nf4" and name + _NF4_STATE in tensors:
            found[name] = _nf4(name, rest, target)
        elif scheme.method == "ternary" and name + _SCALE in tensors:
            found[name] = _ternary(name, rest, scheme)
        elif scheme.method == "online" and isinstance(tensor, SafeTensor) and _is_linear(name):
            found[name] = _online(name, tensor)
            del rest[name]
    notes = _notes(scheme, found)
    for name, tensor in rest.items():
        if isinstance(tensor, ByteTensor):
            reason = "packed values, and neither quantization_config nor its companions say how"
            raise ModelFileError(tensor.data.file.path, reason, tensor=name)
        found[name] = tensor
    return found, notes


def _is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def _notes(scheme: Scheme, found: Mapping[str, SafeTensor | Packed]) -> tuple[str, ...]:
    if not found:
        return ()
    kind = {"nf4": "NF4", "ternary": "packed ternary", "online": "ternary by their mean magnitude"}[scheme.method]
    types = sorted({tensor.type.name for tensor in found.values()})
    return (f"{len(found)} weights are {kind} and served as {' and '.join(types)}",)


def _nf4(name: str, rest: dict[str, Raw], target: GGMLType | None) -> Packed:
    codes = rest.pop(name)
    parts = {part: rest.pop(name + part, None) for part in _NF4_PARTS}
    path = codes.data.file.path
    try:
        state_bytes, quant_map = parts[_NF4_STATE], _floats(parts[".quant_map"])
        assert state_bytes is not None, name
        state = nf4.read_state(state_bytes.data.read().tobytes())
        if quant_map is None or not np.array_equal(quant_map, nf4.CODE_BOOK):
            raise ValueError("its quant_map is not the code book of NF4")
        if not isinstance(codes, ByteTensor) or codes.data.size != -(-state.num_elements // 2):
            raise ValueError(f"{codes.data.size} bytes do not hold two codes each for the shape {list(state.shape)}")
        sizes = {".absmax": (state.num_blocks, state.nested_block is not None)}
        if state.nested_block is not None:
            sizes |= {".nested_absmax": (-(-state.num_blocks // state.nested_block), False)}
            sizes |= {".nested_quant_map": (256, False)}
        for part, (size, is_bytes) in sizes.items():
            tensor = parts[part]
            fits = isinstance(tensor, ByteTensor) if is_bytes else _floats(tensor) is not None
            if tensor is None or not fits or tensor.data.size != size * (1 if is_bytes else 4):
                kind = "bytes" if is_bytes else "float32 values"
                raise ValueError(f"its companion {part[1:]} is not {size} {kind}")
    except ValueError as error:
        raise ModelFileError(path, str(error), tensor=name) from error
    wanted = target or GGMLType.Q8_0
    type_ = wanted if len(state.shape) == 2 and state.shape[-1] % BLOCK[wanted][0] == 0 else state.dtype
    return Packed(type_, state.shape, NF4Data(name, type_, state, codes, parts))


def _floats(tensor: Raw | None) -> np.ndarray | None:
    if not isinstance(tensor, SafeTensor) or tensor.type is not GGMLType.F32:
        return None
    return tensor.data.read().view(np.float32)


def _ternary(name: str, rest: dict[str, Raw], scheme: Scheme) -> Packed:
    packed, scale = rest.pop(name), rest.pop(name + _SCALE)
    path = packed.data.file.path
    try:
        if not isinstance(packed, ByteTensor) or len(packed.shape) != 2:
            raise ValueError("it has a weight_scale but is no matrix of packed values (dtype U8)")
        if not isinstance(scale, SafeTensor) or int(np.prod(scale.shape)) != 1:
            raise ValueError("its weight_scale is not one float")
        type_ = served_type(packed.shape[1])
    except ValueError as error:
        raise ModelFileError(path, str(error), tensor=name) from error
    shape = (4 * packed.shape[0], packed.shape[1])
    return Packed(type_, shape, TernaryData(name, packed, scale, scheme.divides))


def _online(name: str, tensor: SafeTensor) -> Packed:
    try:
        return Packed(served_type(tensor.shape[-1]), tensor.shape, TernaryData(name, tensor, None, False))
    except ValueError as error:
        raise ModelFileError(tensor.data.file.path, str(error), tensor=name) from error


@dataclass(frozen=True, eq=False)
class NF4Data:
    """A weight of NF4 codes, as rows of `type`."""

    name: str
    type: GGMLType
    state: nf4.NF4State
    codes: ByteTensor
    parts: Mapping[str, Raw | None]

    def read(self) -> np.ndarray:
        absmax = self.parts[".absmax"]
        assert absmax is not None, self.name
        nested = [_floats(self.parts[part]) for part in (".nested_absmax", ".nested_quant_map")]
        data = absmax.data.read()
        empty = np.empty(0, np.float32)
        try:
            scales = nf4.scales(
                self.state,
                data if self.state.nested_block is not None else data.view(np.float32),
                empty if nested[0] is None else nested[0],
                empty if nested[1] is None else nested[1],
            )
            values = nf4.dequantize(self.state, self.codes.data.read(), scales)
            rounded = quantize_rows(values.view(np.uint8), GGMLType.F32, self.state.dtype)
            return quantize_rows(rounded, self.state.dtype, self.type)
        except ValueError as error:
            raise ModelFileError(self.codes.data.file.path, str(error), tensor=self.name) from error

    def release(self) -> None:
        self.codes.data.release()


@dataclass(frozen=True, eq=False)
class TernaryData:
    """A ternary weight, packed with its scale, or floats (`scale` None) that become ternary by their mean magnitude."""

    name: str
    weight: Raw
    scale: SafeTensor | None
    divides: bool

    def read(self) -> np.ndarray:
        data, shape = self.weight.data.read(), self.weight.shape
        try:
            if self.scale is not None:
                return uint8_rows(data.reshape(shape), self._factor(self.scale))
            assert isinstance(self.weight, SafeTensor), self.name
            values = to_float32(data, self.weight.type).reshape(shape)
            scale = absmean_scale(float(np.abs(values).sum(dtype=np.float64)), values.size)
            return pack_rows(absmean(values, scale), float(scale))
        except ValueError as error:
            raise ModelFileError(self.weight.data.file.path, str(error), tensor=self.name) from error

    def _factor(self, scale: SafeTensor) -> float:
        value = float(to_float32(scale.data.read(), scale.type)[0])
        if self.divides and value == 0:
            raise ValueError("its weight_scale, which divides, is 0")
        return 1 / value if self.divides else value

    def release(self) -> None:
        self.weight.data.release()
