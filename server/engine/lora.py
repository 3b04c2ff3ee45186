"""A PEFT adapter directory as weights for the core: safetensors only, every tensor accounted for.

A file that does not fit is refused with the tensor and the reason: an unexpected tensor, a missing half, a wrong shape
or type, a value that is not finite. Rows stay in Hugging Face order, which is the core's.

Not covered: which keys of the configuration mean what (lora_config.py), slots (adapters.py).
"""

import re
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from quant.errors import ModelFileError
from quant.mapping import MappedFile
from quant.quantize import to_float32
from quant.safetensors_reader import SafeTensor, read_tensors
from server.engine.core_api import FloatArray
from server.engine.lora_config import LoraTarget, read_lora_targets
from server.engine.lora_types import LoraProjection, LoraWeights
from server.errors import AdapterError

if TYPE_CHECKING:
    from quant.model_file import ModelConfig

CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 1 << 20
"""PEFT writes about one kilobyte; a rank_pattern naming every matrix of a large model takes some tens."""
_TENSOR_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<half>[AB])\.weight")


def load_adapter_files(path: str | Path, config: "ModelConfig") -> LoraWeights:
    """Read the adapter in directory `path` for the model `config`. Raises AdapterError."""
    if config.architecture == "bitnet":  # PEFT has no layer for BitNet's: nothing to be equal to
        raise AdapterError("a bitnet model cannot serve adapters (accepted: llama, qwen2, qwen3)")
    directory = Path(path)
    config_bytes = _read_config(directory / CONFIG_NAME)
    targets = read_lora_targets(config_bytes, config)
    file = _open_tensors(directory)
    try:
        halves = _assign(read_tensors(file), {target.module for target in targets})
        digest = sha256(len(config_bytes).to_bytes(8, "little") + config_bytes)
        digest.update(file.data)
        return LoraWeights(
            rank=max(target.rank for target in targets),
            projections=tuple(_projection(target, halves, config) for target in targets),
            digest=f"sha256:{digest.hexdigest()}",
        )
    except ModelFileError as error:
        raise AdapterError(str(error)) from error
    finally:
        file.close()


def _read_config(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise AdapterError(f"{path}: {error.strerror}") from None
    if len(data) > MAX_CONFIG_BYTES:
        raise AdapterError(f"{path}: larger than {MAX_CONFIG_BYTES} bytes")
    return data


def _open_tensors(directory: Path) -> MappedFile:
    if not (directory / TENSORS_NAME).is_file() and (directory / "adapter_model.bin").exists():
        raise AdapterError(f"{directory}: adapter_model.bin is a pickle and is never read; save as safetensors")
    try:
        return MappedFile(directory / TENSORS_NAME)
    except ModelFileError as error:
        raise AdapterError(str(error)) from error


def _assign(tensors: dict[str, SafeTensor], modules: set[str]) -> dict[tuple[str, str], SafeTensor]:
    """Tensors by (module, "A" or "B"); whatever belongs to no adapted module is refused."""
    halves = {}
    for name, tensor in tensors.items():
        match = _TENSOR_NAME.fullmatch(name)
        if match is None or match["module"] not in modules:
            raise AdapterError(f"tensor {name} is not expected: the configuration adapts no such module")
        halves[match["module"], match["half"]] = tensor
    return halves


def _projection(target: LoraTarget, halves: dict[tuple[str, str], SafeTensor], config: "ModelConfig") -> LoraProjection:
    rows, columns = config.projection_shape(target.projection)
    return LoraProjection(
        target.layer,
        target.projection,
        _matrix(target.module, "A", halves, (target.rank, columns)),
        _matrix(target.module, "B", halves, (rows, target.rank)),
        target.scale,
    )


def _matrix(module: str, half: str, halves: dict[tuple[str, str], SafeTensor], shape: tuple[int, int]) -> FloatArray:
    name = f"base_model.model.{module}.lora_{half}.weight"
    tensor = halves.get((module, half))
    if tensor is None:
        raise AdapterError(f"tensor {name} is missing")
    if tensor.shape != shape:
        raise AdapterError(f"tensor {name} has shape {list(tensor.shape)}; this model and rank need {list(shape)}")
    values = np.array(to_float32(tensor.data.read(), tensor.type)).reshape(shape)  # a copy: the file is closed after
    if not np.isfinite(values).all():
        raise AdapterError(f"tensor {name} holds a value that is not finite")
    return values
