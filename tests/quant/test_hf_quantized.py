"""Directories that are quantized already: NF4 and BitNet's packed weights load, whatever does not fit is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quant import nf4
from quant.errors import ModelFileError
from quant.formats import GGMLType
from quant.hf_names import gguf_name
from quant.model_file import ModelFile, open_model
from quant.quantize import dequantize, quantize
from quant.ternary import absmean, absmean_scale
from tests.quant.packed_checkpoints import brain, nf4_tensors, pack_uint8, save_mixed
from tests.tiny_models import hf_name, tiny_weights, write_tiny_hf
from tests.tiny_weights import TinyShape

SHAPE: dict[str, Any] = {"hidden": 256, "ffn": 512, "heads": 4, "kv_heads": 2}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4",
       "bnb_4bit_quant_storage": "uint8", "bnb_4bit_use_double_quant": False}  # fmt: skip
AUTO = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"}
PROJECTION = "model.layers.1.mlp.down_proj.weight"
Edit = Callable[[dict[str, np.ndarray]], None]


def is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def write(path: Path, tensors: dict[str, np.ndarray], quantization: Any) -> Path:
    write_tiny_hf(path, config={"quantization_config": quantization}, **SHAPE)
    save_mixed(path / "model.safetensors", tensors)
    return path


def weights() -> dict[str, np.ndarray]:
    return {hf_name(name): array for name, array in tiny_weights(TinyShape(**SHAPE)).items()}


def write_nf4(path: Path, edit: Edit = lambda tensors: None, config: Any = NF4, **state: Any) -> Path:
    tensors: dict[str, np.ndarray] = {}
    for name, array in weights().items():
        tensors |= nf4_tensors(name, array, **state) if is_linear(name) else {name: array}
    edit(tensors)
    return write(path, tensors, config)


def write_bitnet(path: Path, edit: Edit = lambda tensors: None, config: Any = AUTO) -> Path:
    tensors: dict[str, np.ndarray] = {}
    for name, array in weights().items():
        if is_linear(name):
            tensors |= {name: pack_uint8(ternary(array)), f"{name}_scale": brain(0.25)}
        else:
            tensors[name] = array
    edit(tensors)
    return write(path, tensors, config)


def ternary(array: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(array / np.abs(array).mean()), -1, 1).astype(np.int8)


def values(file: ModelFile, name: str) -> np.ndarray:
    tensor = file.tensors[gguf_name(name) or name]
    return dequantize(tensor.read(), tensor.type).reshape(tensor.shape)


def read_all(path: Path) -> None:
    for tensor in open_model(path).tensors.values():
        tensor.read()


def refused(path: Path) -> str:
    with pytest.raises(ModelFileError) as failure:
        read_all(path)
    return str(failure.value).removeprefix(str(path))


@pytest.mark.parametrize(("target", "type_"), [(None, GGMLType.Q8_0), ("q4_0", GGMLType.Q4_0)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nf4_is_served_as_q8_0_or_what_is_asked_for(tmp_path: Path, target: Any, type_: GGMLType, dtype: str) -> None:
    file = open_model(write_nf4(tmp_path / "m", dtype=dtype), quantize=target)
    assert f"14 weights are NF4 and served as {type_.name}" in file.notes
    for name, array in weights().items():
        tensor = file.tensors[gguf_name(name) or ""]
        assert tensor.shape == array.shape
        if not is_linear(name):
            continue
        codes, absmax = nf4.quantize(array, 64)
        exact = nf4.dequantize(nf4.NF4State(GGMLType.F32, array.shape, 64, None, 0.0), codes, absmax)
        if dtype == "bfloat16":
            exact = dequantize(quantize(exact.view(np.uint8), GGMLType.F32, GGMLType.BF16), GGMLType.BF16)
        assert tensor.type is type_
        assert np.array_equal(tensor.read(), quantize(exact.view(np.uint8), GGMLType.F32, type_))
        tensor.release()


def test_the_error_of_serving_nf4_as_q8_0_is_a_tenth_of_nf4s_own(tmp_path: Path) -> None:
    name, array = PROJECTION, weights()[PROJECTION]
    served = values(open_model(write_nf4(tmp_path / "m")), name)
    codes, absmax = nf4.quantize(array, 64)
    exact = nf4.dequantize(nf4.NF4State(GGMLType.F32, array.shape, 64, None, 0.0), codes, absmax).reshape(array.shape)
    assert np.linalg.norm(served - exact) < 0.1 * np.linalg.norm(exact - array)


@pytest.mark.parametrize(
    ("config", "factor"),
    [(AUTO, 0.25), ({"quant_method": "bitnet"}, 4.0), (AUTO | {"linear_class": "bitlinear"}, 4.0)],
)
def test_packed_ternary_weights_are_served_as_tq2_0(tmp_path: Path, config: Any, factor: float) -> None:
    file = open_model(write_bitnet(tmp_path / "m", config=config))
    assert "14 weights are packed ternary and served as TQ2_0" in file.notes
    for name, array in weights().items():
        if is_linear(name):
            assert file.tensors[gguf_name(name) or ""].type is GGMLType.TQ2_0
            assert np.array_equal(values(file, name), ternary(array) * np.float32(factor))


def test_floats_that_are_ternary_by_their_mean(tmp_path: Path) -> None:
    path = write(tmp_path / "m", weights(), AUTO | {"quantization_mode": "online"})
    file = open_model(path)
    assert "14 weights are ternary by their mean magnitude and served as TQ2_0" in file.notes
    array = weights()[PROJECTION]
    scale = absmean_scale(float(np.abs(array).sum(dtype=np.float64)), array.size)
    assert np.array_equal(values(file, PROJECTION), absmean(array, scale) * np.float32(np.float16(scale)))


def drop(part: str) -> Edit:
    return lambda tensors: tensors.__delitem__(PROJECTION + part)


def put(part: str, array: np.ndarray) -> Edit:
    return lambda tensors: tensors.__setitem__(PROJECTION + part, array)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (put(".quant_map", np.linspace(-1, 1, 16, dtype=np.float32)), "its quant_map is not the code book of NF4"),
        (drop(".quant_map"), "its quant_map is not the code book of NF4"),
        (drop(".absmax"), "its companion absmax is not 2048 float32 values"),
        (put(".absmax", np.zeros(5, np.float32)), "its companion absmax is not 2048 float32 values"),
        (put(".absmax", np.full(2048, np.nan, np.float32)), "a scale is not finite"),
        (put("", np.zeros((5, 1), np.uint8)), "5 bytes do not hold two codes each for the shape [256, 512]"),
        (drop(".quant_state.bitsandbytes__nf4"), "packed values, and neither quantization_config nor"),
        (put(".quant_state.bitsandbytes__nf4", np.zeros(3, np.uint8)), "its quant_state is not valid JSON"),
    ],
)
def test_nf4_that_is_incomplete_is_refused(tmp_path: Path, edit: Edit, reason: str) -> None:
    message = refused(write_nf4(tmp_path / "m", edit))
    assert message.startswith(f"/model.safetensors: {PROJECTION}: ")
    assert reason in message


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (put("_scale", np.zeros(2, np.float32)), "its weight_scale is not one float"),
        (put("_scale", np.array([np.inf], np.float32)), "its scale inf is not a finite number"),
        (put("", np.zeros((64, 512), np.float32)), "it has a weight_scale but is no matrix of packed values"),
        (put("", np.full((64, 512), 255, np.uint8)), "it holds a code that is none of -1, 0 and 1"),
        (put("", np.zeros((64, 500), np.uint8)), "ternary rows of 500 values"),
        (drop("_scale"), "packed values, and neither quantization_config nor"),
    ],
)
def test_ternary_weights_that_are_incomplete_are_refused(tmp_path: Path, edit: Edit, reason: str) -> None:
    message = refused(write_bitnet(tmp_path / "m", edit))
    assert message.startswith(f"/model.safetensors: {PROJECTION}: ")
    assert reason in message


def test_a_shape_that_is_not_the_configurations(tmp_path: Path) -> None:
    message = refused(write_bitnet(tmp_path / "m", put("", np.zeros((60, 512), np.uint8))))
    assert message == f": {PROJECTION}: its shape is (240, 512), by the configuration (256, 512)"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([], "quantization_config: [] is not an object"),
        ({"quant_method": "gptq"}, "quantization_config.quant_method: 'gptq' is not supported"),
        (NF4 | {"load_in_8bit": True}, "quantization_config.load_in_8bit: True is not implemented"),
        (NF4 | {"bnb_4bit_quant_type": "fp4"}, "quantization_config.bnb_4bit_quant_type: 'fp4' is not implemented"),
        (NF4 | {"bnb_4bit_quant_storage": "bfloat16"}, "quantization_config.bnb_4bit_quant_storage: 'bfloat16'"),
        (AUTO | {"use_rms_norm": True}, "quantization_config.use_rms_norm: True is not implemented"),
        (AUTO | {"linear_class": "x"}, "quantization_config.linear_class: 'x' is not implemented"),
    ],
)
def test_other_methods_and_settings_are_refused(tmp_path: Path, config: Any, message: str) -> None:
    assert refused(write(tmp_path / "m", weights(), config)).startswith(f"/config.json: {message}")


def test_a_packed_weight_without_a_method_is_refused(tmp_path: Path) -> None:
    write_bitnet(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    assert "packed values, and neither" in refused(tmp_path / "m")
