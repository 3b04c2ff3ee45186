"""LoRA factors to and from PEFT's directory: adapter_config.json and adapter_model.safetensors (float32).

What is written here the server imports and `peft` loads; equal factors give equal bytes. Reading is for an explicit
warm start and checks that ranks, scales and names are those of the model that reads. Not covered: optimizer state.
"""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from finetune.model.lora import LoraSpec
from quant.errors import ModelFileError
from quant.mapping import MappedFile
from quant.quantize import to_float32
from quant.safetensors_reader import read_tensors

if TYPE_CHECKING:
    from finetune.model.model import TrainModel

CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"
_SCALING_KEYS = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")


def peft_config(spec: LoraSpec, base_name: str) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": spec.dropout,
        "use_rslora": spec.use_rslora,
        "target_modules": sorted(spec.targets),
        "rank_pattern": dict(spec.rank_pattern),
        "alpha_pattern": dict(spec.alpha_pattern),
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
    }


def export_peft(model: "TrainModel", directory: str | Path) -> None:
    """Write the two files, synced, into `directory` (made if need be)."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(peft_config(model.spec, model.config.name), indent=2, sort_keys=True) + "\n"
    _write(folder / CONFIG_NAME, [text.encode()])
    arrays = {name: factor.detach().float().cpu().numpy() for name, factor in sorted(model.parameters().items())}
    _write(folder / TENSORS_NAME, _safetensors(arrays))


def import_peft(model: "TrainModel", directory: str | Path) -> None:
    """Put a version's factors into the model's. Raises ValueError or ModelFileError where the two do not fit."""
    folder = Path(directory)
    config, expected = json.loads((folder / CONFIG_NAME).read_bytes()), peft_config(model.spec, "")
    for key in _SCALING_KEYS:
        if config.get(key, expected[key]) != expected[key]:
            raise ValueError(f"{folder}: {key} is {config[key]!r}, this model trains with {expected[key]!r}")
    file = MappedFile(folder / TENSORS_NAME)
    try:
        tensors = read_tensors(file)
        factors = model.parameters()
        for name in sorted(factors.keys() ^ tensors.keys()):
            reason = "the tensor is missing" if name in factors else "a tensor that this model does not train"
            raise ModelFileError(file.path, reason, tensor=name)
        for name, factor in factors.items():
            tensor = tensors[name]
            if tensor.shape != tuple(factor.shape):
                raise ModelFileError(file.path, f"shape {tensor.shape}, expected {tuple(factor.shape)}", tensor=name)
            values = np.array(to_float32(tensor.data.read(), tensor.type)).reshape(tensor.shape)
            with torch.no_grad():
                factor.copy_(torch.from_numpy(values))
    finally:
        file.close()


def _safetensors(arrays: dict[str, np.ndarray]) -> list[bytes]:
    """Our own writer as there is our own reader: 8 bytes of header length, JSON, data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, array in arrays.items():
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data is aligned, as the format asks for
    return [len(text).to_bytes(8, "little"), text, *(array.tobytes() for array in arrays.values())]


def _write(path: Path, parts: list[bytes]) -> None:
    with path.open("wb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())
