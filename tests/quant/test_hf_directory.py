"""Hugging Face directories as models: the same model as the GGUF file of the same weights, or a refusal by name."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from quant.errors import ModelFileError
from quant.formats import GGMLType
from quant.hf_names import gguf_name, hf_name
from quant.model_file import ModelFile, open_model
from tests.tiny_models import dequantize, tiny_weights, write_tiny_gguf, write_tiny_hf
from tests.tiny_vocab import CHATML_TEMPLATE
from tests.tiny_weights import TinyShape


def open_tiny(tmp_path: Path, **arguments: Any) -> ModelFile:
    return open_model(write_tiny_hf(tmp_path / "model", **arguments))


def refused(tmp_path: Path, **arguments: Any) -> str:
    with pytest.raises(ModelFileError) as failure:
        open_tiny(tmp_path, **arguments)
    message = str(failure.value)
    assert message.startswith(str(tmp_path))
    assert message.isprintable()
    return message


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("legacy", [False, True])
def test_same_configuration_as_the_gguf_file(tmp_path: Path, architecture: str, legacy: bool) -> None:
    arguments: dict[str, Any] = {"architecture": architecture, "head_dim": 32, "rope_theta": 5000.0, "tie": False}
    ours = open_tiny(tmp_path, legacy=legacy, **arguments).config
    theirs = open_model(write_tiny_gguf(tmp_path / "m.gguf", **arguments)).config
    assert dataclasses.replace(ours, name="", rms_norm_eps=0) == dataclasses.replace(theirs, name="", rms_norm_eps=0)
    assert ours.name == "model"
    assert ours.rms_norm_eps == 1e-5


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("tie", [True, False])
def test_tensors_hold_the_weights_under_gguf_names(
    tmp_path: Path, architecture: str, num_shards: int, tie: bool
) -> None:
    model = open_tiny(tmp_path, architecture=architecture, num_shards=num_shards, tie=tie)
    weights = tiny_weights(TinyShape(architecture, tie=tie))
    assert set(model.tensors) == set(weights)
    for name, tensor in model.tensors.items():
        assert not tensor.rope_interleaved
        assert tensor.type is GGMLType.F32
        assert np.array_equal(dequantize(tensor.read(), tensor.type, tensor.shape), weights[name])
        tensor.release()
    model.close()


@pytest.mark.parametrize(("quantize", "type_"), [("q8_0", GGMLType.Q8_0), ("q4_0", GGMLType.Q4_0)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_quantizing_on_load(tmp_path: Path, quantize: Any, type_: GGMLType, dtype: str) -> None:
    path = write_tiny_hf(tmp_path / "model", architecture="qwen2", dtype=dtype)
    plain, quantized = open_model(path), open_model(path, quantize=quantize)
    assert quantized.notes == ()
    for name, tensor in quantized.tensors.items():
        source = plain.tensors[name]
        if len(tensor.shape) == 1:
            assert tensor.type is source.type
            assert np.array_equal(tensor.read(), source.read())
            continue
        assert tensor.type is type_
        values = dequantize(source.read(), source.type, source.shape)
        expected = gguf.quants.quantize(values, gguf.GGMLQuantizationType(int(type_)))
        assert np.array_equal(tensor.read(), expected.reshape(-1))
        tensor.release()


def test_rows_that_are_no_multiple_of_32_stay_and_are_noted(tmp_path: Path) -> None:
    path = write_tiny_hf(tmp_path / "model", dtype="bfloat16", ffn=100)
    model = open_model(path, quantize="q8_0")
    assert model.tensors["blk.0.ffn_down.weight"].type is GGMLType.BF16
    assert model.tensors["blk.0.ffn_up.weight"].type is GGMLType.Q8_0
    assert "2 tensors whose rows are no multiple of 32" in model.notes[0]
    assert "blk.1.ffn_down.weight" in model.notes[0]


def test_a_weight_that_cannot_be_quantized_names_the_tensor(tmp_path: Path) -> None:
    weight = np.full((128, 64), np.nan, np.float32)
    path = write_tiny_hf(tmp_path / "model", replace={"blk.0.ffn_up.weight": weight})
    model = open_model(path, quantize="q8_0")
    with pytest.raises(ModelFileError, match=r"model\.layers\.0\.mlp\.up_proj\.weight: .*not finite"):
        model.tensors["blk.0.ffn_up.weight"].read()


def test_tokenizer_source(tmp_path: Path) -> None:
    path = write_tiny_hf(tmp_path / "model")
    source = open_model(path).tokenizer
    assert source.kind == "hf"
    assert source.tokenizer_json == (path / "tokenizer.json").read_text()
    assert source.metadata["eos_token"] == "<|im_end|>"
    assert source.metadata["chat_template"] == CHATML_TEMPLATE
    assert source.metadata["generation_config"]["eos_token_id"] == [2, 0]
    (path / "chat_template.jinja").unlink()
    (path / "generation_config.json").unlink()
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "own"}))
    assert open_model(path).tokenizer.metadata == {"chat_template": "own"}


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.slow  # imports transformers
@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_llama_3_factors_equal_transformers(tmp_path: Path, key: str) -> None:
    legacy = key == "rope_scaling"
    scaling = LLAMA3 if legacy else {**LLAMA3, "rope_theta": 10000.0}
    path = write_tiny_hf(tmp_path / "model", legacy=legacy, config={key: scaling}, head_dim=32)
    config = open_model(path).config
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    hf_config = transformers.AutoConfig.from_pretrained(path)
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(hf_config)
    assert config.rope_freq_factors is not None
    frequencies = config.rope_theta ** (-np.arange(0, 32, 2) / 32) / np.array(config.rope_freq_factors)
    assert np.allclose(frequencies, rotary.inv_freq.numpy(), rtol=1e-6)


def test_linear_scaling(tmp_path: Path) -> None:
    config = {"rope_scaling": {"type": "linear", "factor": 2.0}}
    assert open_tiny(tmp_path, legacy=True, config=config).config.rope_freq_factors == (2.0,) * 8


def test_sliding_windows_cap_the_context_only_where_they_are_active(tmp_path: Path) -> None:
    def length(architecture: str, **config: Any) -> int:
        return open_tiny(tmp_path, architecture=architecture, config=config).config.context_length

    assert length("mistral", sliding_window=100) == 100
    assert length("mistral", sliding_window=None) == 256
    assert length("qwen2", sliding_window=100, use_sliding_window=False) == 256
    assert length("qwen2", sliding_window=100, use_sliding_window=True, max_window_layers=2) == 256
    assert length("qwen2", sliding_window=100, use_sliding_window=True, max_window_layers=1) == 100
    assert length("qwen3", sliding_window=100, layer_types=["full_attention", "full_attention"]) == 256
    assert length("qwen3", sliding_window=100, layer_types=["full_attention", "sliding_attention"]) == 100


def test_harmless_keys_and_null_are_accepted(tmp_path: Path) -> None:
    config = {"pretraining_tp": 1, "some_new_thing": None, "transformers_version": "9", "initializer_range": 0.02}
    assert open_tiny(tmp_path, config=config).config.num_layers == 2


REFUSED_KEYS: dict[str, Any] = {
    "architectures": ["MambaForCausalLM"],
    "attention_bias": True,
    "mlp_bias": True,
    "hidden_act": "gelu",
    "quantization_config": {"bits": 4},
    "num_local_experts": 8,
    "logits_scaling": 2.0,
    "layer_types": ["linear_attention"] * 2,
    "auto_map": {"AutoModel": "x.py"},
    "rms_norm_eps": -1,
    "hidden_size": "64",
    "num_hidden_layers": 2.5,
    "rope_parameters": {"rope_type": "yarn", "factor": 4.0},
    "tie_word_embeddings": "yes",
    "partial_rotary_factor": 0.5,
}


@pytest.mark.parametrize("key", REFUSED_KEYS)
def test_a_key_that_is_not_implemented_is_refused_by_name(tmp_path: Path, key: str) -> None:
    assert f"config.json: {key}" in refused(tmp_path, config={key: REFUSED_KEYS[key]})


@pytest.mark.parametrize(
    "rope", [{"mrope_section": [1]}, {"partial_rotary_factor": 0.5}, {"rope_type": 3}, {"factor": 2}]
)
def test_rope_parameters_that_are_not_implemented(tmp_path: Path, rope: dict[str, Any]) -> None:
    assert f"rope_parameters.{next(iter(rope))}" in refused(tmp_path, config={"rope_parameters": rope})


@pytest.mark.parametrize(
    ("replace", "message"),
    [
        ({"token_embd.weight": None}, "model.embed_tokens.weight: the tensor is missing"),
        ({"blk.1.attn_q.weight": None}, "model.layers.1.self_attn.q_proj.weight: the tensor is missing"),
        ({"blk.0.attn_q.bias": np.ones(64)}, "model.layers.0.self_attn.q_proj.bias: a tensor that the llama"),
        ({"blk.7.attn_q.weight": np.ones((64, 64))}, "model.layers.7.self_attn.q_proj.weight: a tensor that"),
        ({"blk.0.ffn_up.weight": np.ones((64, 128))}, "mlp.up_proj.weight: its shape is (64, 128), by the"),
        ({"output.weight": np.ones((384, 64))}, "lm_head.weight: differs from the embedding"),
    ],
)
def test_tensors_are_checked_before_serving(tmp_path: Path, replace: dict[str, Any], message: str) -> None:
    assert message in refused(tmp_path, replace=replace)


def test_a_tied_head_may_be_the_embedding_once_more(tmp_path: Path) -> None:
    embedding = tiny_weights(TinyShape())["token_embd.weight"]
    model = open_tiny(tmp_path, replace={"output.weight": embedding})
    assert model.config.tie_embeddings
    assert "output.weight" not in model.tensors


def test_foreign_tensor_is_refused(tmp_path: Path) -> None:
    path = write_tiny_hf(tmp_path / "model")
    (path / "model.safetensors").rename(path / "other.safetensors")
    assert open_model(path).config.num_layers == 2  # a single file by any name
    data = (path / "other.safetensors").read_bytes().replace(b"mlp.up_proj", b"mlp.xp_proj")
    (path / "model.safetensors").write_bytes(data)
    with pytest.raises(ModelFileError, match=r"mlp\.xp_proj\.weight: a tensor that these architectures do not have"):
        open_model(path)


def edit_index(path: Path, **entries: Any) -> None:
    file = path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"] |= entries
    file.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "/etc/passwd", "a\0.safetensors", "\ud800.safetensors", "x.bin", 3]
)
def test_an_index_cannot_point_outside_the_directory(tmp_path: Path, file: Any) -> None:
    path = write_tiny_hf(tmp_path / "model", num_shards=2)
    edit_index(path, **{"model.norm.weight": file})
    with pytest.raises(ModelFileError, match=r"model\.norm\.weight: .* is not the name of a safetensors file"):
        open_model(path)


def test_an_index_that_does_not_fit_the_files(tmp_path: Path) -> None:
    path = write_tiny_hf(tmp_path / "model", num_shards=2)
    edit_index(path, **{"model.layers.0.mlp.extra.weight": "model-00001-of-00002.safetensors"})
    with pytest.raises(ModelFileError, match=r"mlp\.extra\.weight: the tensor that .* places here is missing"):
        open_model(path)
    edit_index(path, **{"model.norm.weight": "missing.safetensors"})
    with pytest.raises(ModelFileError, match=r"model\.norm\.weight: .* does not place it in this file|No such file"):
        open_model(path)
    (path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ModelFileError, match="not a JSON object"):
        open_model(path)
    (path / "model.safetensors.index.json").unlink()
    with pytest.raises(ModelFileError, match="2 safetensors files, but no"):
        open_model(path)


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"neither a \.gguf file nor config\.json"):
        open_model(tmp_path)
    path = write_tiny_hf(tmp_path / "model")
    (path / "tokenizer.json").write_bytes(b"\xff")
    with pytest.raises(ModelFileError, match=r"tokenizer\.json: the text is not UTF-8"):
        open_model(path)
    (path / "tokenizer.json").unlink()
    with pytest.raises(ModelFileError, match=r"tokenizer\.json: No such file"):
        open_model(path)
    (path / "config.json").write_text("{")
    with pytest.raises(ModelFileError, match=r"config\.json: not valid JSON"):
        open_model(path)


def test_pickle_is_refused(tmp_path: Path) -> None:
    path = write_tiny_hf(tmp_path / "model")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(ModelFileError, match=r"pickle files .*save as safetensors"):
        open_model(path)
    (path / "pytorch_model.bin").unlink()
    with pytest.raises(ModelFileError, match=r"no \*\.safetensors file"):
        open_model(path)


def test_names_go_both_ways() -> None:
    for name in tiny_weights(TinyShape("qwen3", tie=False, qkv_bias=True)):
        assert gguf_name(hf_name(name)) == name
    assert gguf_name("model.layers.01.mlp.up_proj.weight") is None
    assert gguf_name("model.layers.1.mlp.up_proj.scale") is None
