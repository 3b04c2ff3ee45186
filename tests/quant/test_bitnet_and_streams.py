"""BitNet and two residual streams in model files: what their keys mean, and the refusal of what does not fit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quant.errors import ModelFileError
from quant.export import export_gguf
from quant.export_types import choose_types
from quant.formats import GGMLType
from quant.gguf_metadata import config_metadata
from quant.model_file import ModelFile, open_model
from server.engine.weights import load_core
from tests.tiny_models import write_tiny_gguf, write_tiny_hf

SUB_NORMS = ("attn_sub_norm.weight", "ffn_sub_norm.weight")


def open_tiny(tmp_path: Path, **arguments: Any) -> ModelFile:
    return open_model(write_tiny_gguf(tmp_path / "m.gguf", **arguments))


def refused(tmp_path: Path, **arguments: Any) -> str:
    with pytest.raises(ModelFileError) as failure:
        open_tiny(tmp_path, **arguments)
    return str(failure.value)


def refused_hf(tmp_path: Path, **arguments: Any) -> str:
    with pytest.raises(ModelFileError) as failure:
        open_model(write_tiny_hf(tmp_path / "m", **arguments))
    return str(failure.value)


@pytest.mark.parametrize(
    ("name", "given", "activation"),
    [
        ("bitnet", None, "silu"),
        ("bitnet", "relu2", "relu2"),
        ("bitnet", "silu", "silu"),
        ("bitnet-b1.58", None, "relu2"),
        ("bitnet-b1.58", "silu", "silu"),
    ],
)
def test_both_names_of_bitnet(tmp_path: Path, name: str, given: str | None, activation: str) -> None:
    model = open_tiny(tmp_path, architecture=name, metadata={f"{name}.hidden_activation": given})
    config = model.config
    assert (config.architecture, config.activation, config.sub_norms) == ("bitnet", activation, True)
    assert config.row_scales
    assert model.tensors["blk.1.attn_sub_norm.weight"].shape == (64,)
    assert model.tensors["blk.1.ffn_sub_norm.weight"].shape == (128,)
    assert not model.tensors["blk.0.attn_q.weight"].rope_interleaved


def test_bitnet_from_hugging_face_and_its_defaults(tmp_path: Path) -> None:
    left_out = {"hidden_act": None, "rms_norm_eps": None, "rope_parameters": None, "auto_map": AUTO_MAP}
    model = open_model(write_tiny_hf(tmp_path / "m", architecture="bitnet", config=left_out))
    config = model.config
    assert (config.architecture, config.activation, config.sub_norms) == ("bitnet", "relu2", True)
    assert (config.rms_norm_eps, config.rope_theta) == (1e-5, 500000.0)
    assert model.tensors["blk.0.ffn_sub_norm.weight"].shape == (128,)


AUTO_MAP = {
    "AutoConfig": "configuration_bitnet.BitNetConfig",
    "AutoModelForCausalLM": "modeling_bitnet.BitNetForCausalLM",
}


def test_other_models_have_one_stream_no_sub_norms_and_silu(tmp_path: Path) -> None:
    config = open_tiny(tmp_path, metadata={"sterna.residual_streams": 1, "llama.hidden_activation": "silu"}).config
    assert (config.residual_streams, config.sub_norms, config.activation) == (1, False, "silu")
    assert not config.row_scales


@pytest.mark.parametrize("kind", SUB_NORMS)
def test_a_sub_norm_that_does_not_fit_is_named(tmp_path: Path, kind: str) -> None:
    name = f"blk.1.{kind}"
    bitnet = {"architecture": "bitnet-b1.58"}
    assert f"{name}: the tensor is missing" in refused(tmp_path, replace={name: None}, **bitnet)
    wrong = {name: np.ones(63, np.float32)}
    assert f"{name}: its shape is (63,)" in refused(tmp_path, replace=wrong, **bitnet)
    assert f"{name}: a tensor that the llama" in refused(tmp_path, replace={name: np.ones(64, np.float32)})
    assert "mlp.ffn_sub_norm.weight: the tensor is missing" in refused_hf(
        tmp_path, replace={"blk.1.ffn_sub_norm.weight": None}, architecture="bitnet"
    )


def test_activations_that_are_not_implemented(tmp_path: Path) -> None:
    key = "bitnet.hidden_activation"
    assert f"{key}: 'gelu' is not implemented for bitnet (accepted: silu, relu2)" in refused(
        tmp_path, architecture="bitnet", metadata={key: "gelu"}
    )
    assert "llama.hidden_activation: 'relu2'" in refused(tmp_path, metadata={"llama.hidden_activation": "relu2"})
    assert "hidden_act: 'relu2'" in refused_hf(tmp_path, config={"hidden_act": "relu2"})


def test_two_streams_are_read(tmp_path: Path) -> None:
    model = open_tiny(tmp_path, residual_streams=2, linear_type=GGMLType.Q8_0)
    assert model.config.residual_streams == 2
    assert model.tensors["blk.0.residual_streams"].type is GGMLType.F32


@pytest.mark.parametrize("value", [0, 3, "two"])
def test_other_numbers_of_streams_are_refused(tmp_path: Path, value: Any) -> None:
    message = refused(tmp_path, residual_streams=2, metadata={"sterna.residual_streams": value})
    assert "sterna.residual_streams: " in message
    assert "accepted: 1, 2" in message or "whole number" in message


def test_streams_that_do_not_fit_are_named(tmp_path: Path) -> None:
    name = "blk.1.residual_streams"
    two = {"residual_streams": 2}
    assert f"{name}: the tensor is missing" in refused(tmp_path, replace={name: None}, **two)
    wrong = {name: np.ones((2, 4), np.float32)}
    assert f"{name}: its shape is (2, 4), by the configuration (2, 5)" in refused(tmp_path, replace=wrong, **two)
    assert f"{name}: a tensor that the llama" in refused(tmp_path, replace={name: np.ones((2, 5), np.float32)})
    half = {name: np.ones((2, 5), np.float16)}
    assert f"{name}: it is of type F16 (accepted: F32)" in refused(tmp_path, replace=half, **two)
    model = open_tiny(tmp_path, replace={name: np.full((2, 5), np.inf, np.float32)}, **two)
    with pytest.raises(ModelFileError, match=rf"{name}: .*not finite"):
        load_core(model, isa="auto", num_threads=1, num_blocks=4, max_num_seqs=1, max_batch_tokens=16)


@pytest.mark.parametrize(
    "shape", [{"residual_streams": 2}, {"architecture": "bitnet"}, {"architecture": "bitnet-b1.58"}]
)
def test_what_is_written_anew_is_the_same_network(tmp_path: Path, shape: dict[str, Any]) -> None:
    file = open_tiny(tmp_path, **shape)
    found = {name: (tensor.type, tensor.shape) for name, tensor in file.tensors.items()}
    choices = choose_types(file.path, found, GGMLType.Q8_0)
    export_gguf(file, tmp_path / "new.gguf", choices, config_metadata(file.config, GGMLType.Q8_0))
    written = open_model(tmp_path / "new.gguf")
    assert written.config == file.config
    assert written.tensors["blk.1.attn_q.weight"].type is GGMLType.Q8_0
    for name in set(file.tensors) & {"blk.1.residual_streams", "blk.1.ffn_sub_norm.weight"}:
        assert written.tensors[name].type is GGMLType.F32
        assert np.array_equal(written.tensors[name].read(), file.tensors[name].read())
