"""Adapters as PEFT saves them, made without training: zip files for a model's shape, each with a content of its own.

Measures nothing itself. Values are random; `strength` is about their size beside the base's own weights, so that 0.5
changes most greedy answers and leaves text.
"""

import io
import json
import zipfile

import numpy as np

from quant.model_types import ModelConfig
from server.engine.lora import CONFIG_NAME, TENSORS_NAME
from server.engine.lora_types import PROJECTIONS


def peft_zips(config: ModelConfig, *, count: int, rank: int, strength: float, seed: int = 0) -> list[bytes]:
    """`count` adapters on all seven projections: equal but for their last layer's B, which is drawn for each."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for layer in range(config.num_layers):
        for name in PROJECTIONS:
            part = "self_attn" if name[0] in "qkvo" else "mlp"
            prefix = f"base_model.model.model.layers.{layer}.{part}.{name}"
            rows, columns = config.projection_shape(name)
            tensors[f"{prefix}.lora_A.weight"] = _normal(rng, rank, columns, columns**-0.5)
            tensors[f"{prefix}.lora_B.weight"] = _normal(rng, rows, rank, strength * rank**-0.5 / 8)
    last = [name for name in tensors if f".{config.num_layers - 1}." in name and "lora_B" in name]
    files = []
    for _ in range(count):
        for name in last:
            tensors[name] = _normal(rng, *tensors[name].shape, strength * rank**-0.5 / 2)
        files.append(_zip(rank, tensors))
    return files


def _normal(rng: np.random.Generator, rows: int, columns: int, size: float) -> np.ndarray:
    return rng.standard_normal((rows, columns), np.float32) * np.float32(size)


def _zip(rank: int, tensors: dict[str, np.ndarray]) -> bytes:
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "peft_version": "0.21.0", "base_model_name_or_path": "base",
        "r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none", "inference_mode": True,
        "fan_in_fan_out": False, "use_rslora": False, "use_dora": False, "target_modules": list(PROJECTIONS),
    }  # fmt: skip
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, values in tensors.items():
        end = position + values.nbytes
        header[name] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(CONFIG_NAME, json.dumps(config, indent=2))
        with archive.open(TENSORS_NAME, "w") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for values in tensors.values():
                file.write(values.tobytes())
    return out.getvalue()
