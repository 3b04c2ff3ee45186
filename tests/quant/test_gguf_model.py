"""GGUF files as models: the configuration, row order, and the refusal of everything that is not implemented."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quant.errors import ModelFileError
from quant.formats import GGMLType
from quant.model_file import ModelConfig, ModelFile, open_model
from tests.tiny_models import dequantize, interleave_rows, tiny_weights, write_tiny_gguf
from tests.tiny_vocab import CHATML_TEMPLATE, byte_level_vocab
from tests.tiny_weights import TinyShape


def open_tiny(tmp_path: Path, **arguments: Any) -> ModelFile:
    return open_model(write_tiny_gguf(tmp_path / "m.gguf", **arguments))


def refused(tmp_path: Path, **arguments: Any) -> str:
    with pytest.raises(ModelFileError) as failure:
        open_tiny(tmp_path, **arguments)
    message = str(failure.value)
    assert message.startswith(str(tmp_path))
    assert message.isprintable()
    return message


def test_configuration_of_a_llama_file(tmp_path: Path) -> None:
    model = open_tiny(tmp_path, rope_theta=5000.0, context_length=512)
    assert model.config == ModelConfig(
        architecture="llama",
        name="tiny llama",
        num_layers=2,
        hidden_size=64,
        intermediate_size=128,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        vocab_size=384,
        context_length=512,
        rms_norm_eps=float(np.float32(1e-5)),
        rope_theta=5000.0,
        rope_dim=16,
        rope_freq_factors=None,
        qkv_bias=False,
        qk_norm=False,
        tie_embeddings=True,
    )
    assert model.notes == ()
    assert model.tokenizer.kind == "gguf"
    assert model.tokenizer.metadata["ggml.pre"] == "smollm"
    assert model.tokenizer.metadata["ggml.tokens"] == list(byte_level_vocab(384).tokens)
    assert model.tokenizer.metadata["chat_template"] == CHATML_TEMPLATE


def test_a_folder_with_one_file_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "README.md").touch()
    with pytest.raises(ModelFileError, match=r"neither a \.gguf file nor config\.json"):
        open_model(tmp_path)
    one = write_tiny_gguf(tmp_path / "one.gguf")
    assert open_model(tmp_path).path == one
    write_tiny_gguf(tmp_path / "two.gguf")
    with pytest.raises(ModelFileError, match=r"2 \.gguf files are in it, give the path of one: one\.gguf, two\.gguf"):
        open_model(tmp_path)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tie", [True, False])
def test_tensors_hold_the_weights_that_were_written(tmp_path: Path, architecture: str, tie: bool) -> None:
    model = open_tiny(tmp_path, architecture=architecture, tie=tie, head_dim=32)
    weights = tiny_weights(TinyShape(architecture, tie=tie, head_dim=32))
    assert set(model.tensors) == set(weights)
    assert model.config.head_dim == 32
    assert model.config.tie_embeddings is tie
    assert model.config.qkv_bias is (architecture == "qwen2")
    assert model.config.qk_norm is (architecture == "qwen3")
    for name, tensor in model.tensors.items():
        is_rotary = name.split(".")[-2] in ("attn_q", "attn_k")
        assert tensor.rope_interleaved is (is_rotary and architecture == "llama")
        expected = interleave_rows(weights[name], 32) if tensor.rope_interleaved else weights[name]
        assert tensor.shape == expected.shape
        assert np.array_equal(dequantize(tensor.read(), tensor.type, tensor.shape), expected)


def test_bias_of_a_llama_file_is_rotary_too(tmp_path: Path) -> None:
    model = open_tiny(tmp_path, qkv_bias=True)
    assert model.config.qkv_bias
    assert model.tensors["blk.1.attn_k.bias"].rope_interleaved
    assert not model.tensors["blk.1.attn_v.bias"].rope_interleaved


def test_rope_factors_of_llama_3_and_linear_scaling_are_folded_together(tmp_path: Path) -> None:
    factors = np.linspace(1, 8, 8, dtype=np.float32)
    assert open_tiny(tmp_path, rope_freqs=factors).config.rope_freq_factors == tuple(factors.tolist())
    scaling = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    assert open_tiny(tmp_path, metadata=scaling).config.rope_freq_factors == (4.0,) * 8
    both = open_tiny(tmp_path, rope_freqs=factors, metadata=scaling).config.rope_freq_factors
    assert both == tuple((4 * factors).tolist())
    # llama.cpp: no type means linear, "none" ignores the factor, a factor of 0 means none.
    assert open_tiny(tmp_path, metadata={"llama.rope.scaling.factor": 2.0}).config.rope_freq_factors == (2.0,) * 8
    none = {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}
    assert open_tiny(tmp_path, metadata=none).config.rope_freq_factors is None
    assert open_tiny(tmp_path, metadata={"llama.rope.scaling.factor": 0.0}).config.rope_freq_factors is None
    assert "rope_freqs.weight" not in open_tiny(tmp_path, rope_freqs=factors).tensors


def test_a_sliding_window_caps_the_context(tmp_path: Path) -> None:
    model = open_tiny(tmp_path, context_length=256, metadata={"llama.attention.sliding_window": 100})
    assert model.config.context_length == 100
    assert "sliding window" in model.notes[0]
    wide = open_tiny(tmp_path, context_length=256, metadata={"llama.attention.sliding_window": 256})
    assert (wide.config.context_length, wide.notes) == (256, ())


def test_harmless_and_neutral_keys_are_accepted(tmp_path: Path) -> None:
    metadata = {
        "general.sampling.temp": 0.7,
        "quantize.imatrix.file": "x",
        "llama.expert_count": 0,
        "llama.logit_scale": 1.0,
        "llama.attention.causal": True,
        "llama.attention.scale": 0.25,
        "llama.attention.head_count_kv": [2, 2],
        "llama.rope.scaling.finetuned": False,
    }
    assert open_tiny(tmp_path, metadata=metadata).config.num_kv_heads == 2


REFUSED_KEYS: dict[str, Any] = {
    "llama.rope.scaling.type": "yarn",
    "llama.expert_count": 8,
    "llama.attention.clamp_kqv": 8.0,
    "llama.attention.causal": False,
    "llama.attention.scale": 0.5,
    "llama.attention.value_length": 8,
    "llama.logit_scale": 0.5,
    "llama.embedding_scale": 12.0,
    "llama.residual_scale": 0.2,
    "llama.attn_logit_softcapping": 30.0,
    "llama.attention.temperature_scale": 0.1,
    "llama.something.new": 1,
    "llama.attention.head_count_kv": [2, 1],
    "llama.block_count": 0,
    "llama.context_length": "long",
    "llama.embedding_length": True,
    "llama.attention.layer_norm_rms_epsilon": float("nan"),
    "llama.rope.freq_base": 0.0,
    "general.type": "adapter",
    "general.architecture": "mamba",
    "split.count": 2,
    "tokenizer.ggml.tokens": ["x"] * 400,
}


@pytest.mark.parametrize("key", REFUSED_KEYS)
def test_a_key_that_is_not_implemented_is_refused_by_name(tmp_path: Path, key: str) -> None:
    if key in ("general.architecture", "tokenizer.ggml.tokens"):
        assert key in _refused_override(tmp_path, key)
    else:
        assert f"m.gguf: {key}: " in refused(tmp_path, metadata={key: REFUSED_KEYS[key]})


def _refused_override(tmp_path: Path, key: str) -> str:
    """Keys that the writer sets by itself: another architecture, another vocabulary size."""
    if key == "general.architecture":
        return refused(tmp_path, architecture=REFUSED_KEYS[key])
    return refused(tmp_path, replace={"token_embd.weight": np.zeros((300, 64), np.float32)})


@pytest.mark.parametrize(
    "key",
    [
        "llama.block_count",
        "llama.context_length",
        "llama.embedding_length",
        "llama.feed_forward_length",
        "llama.attention.head_count",
        "llama.attention.layer_norm_rms_epsilon",
    ],
)
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    assert f"{key}: the key is missing" in refused(tmp_path, metadata={key: None})


def test_sizes_that_contradict_each_other(tmp_path: Path) -> None:
    assert "do not share 3 key-value heads" in refused(tmp_path, kv_heads=3)
    assert "15 rotary dimensions" in refused(tmp_path, metadata={"llama.rope.dimension_count": 15})
    assert "does not divide into 5 heads" in refused(tmp_path, metadata={"llama.attention.head_count": 5})
    assert "4 rotary factors for 8" in refused(tmp_path, rope_freqs=np.ones(4))
    assert "rotary frequency factor" in refused(tmp_path, rope_freqs=np.zeros(8))


@pytest.mark.parametrize(
    ("replace", "message"),
    [
        ({"token_embd.weight": None}, "token_embd.weight: the tensor is missing"),
        ({"output_norm.weight": None}, "output_norm.weight: the tensor is missing"),
        ({"blk.1.ffn_up.weight": None}, "blk.1.ffn_up.weight: the tensor is missing"),
        ({"blk.2.ffn_up.weight": np.ones((2, 2))}, "blk.2.ffn_up.weight: a tensor that"),
        ({"blk.0.ffn_up.weight": np.ones((64, 128))}, "blk.0.ffn_up.weight: its shape is (64, 128), by the"),
        ({"blk.0.attn_output.bias": np.ones(64)}, "blk.0.attn_output.bias: a tensor that the llama"),
        ({"blk.0.attn_q_norm.weight": np.ones(16)}, "blk.0.attn_q_norm.weight: a tensor that the llama"),
        ({"blk.0.attn_q.bias": np.ones(64)}, "blk.0.attn_k.bias: the tensor is missing"),
        ({"blk.0.ffn_gate_inp.weight": np.ones((4, 64))}, "blk.0.ffn_gate_inp.weight: a tensor that"),
        ({"rope_factors_long.weight": np.ones(8)}, "rope_factors_long.weight: a tensor that"),
        ({"rope_freqs.weight": np.ones((2, 8))}, "rope_freqs.weight: F32 of shape (2, 8)"),
    ],
)
def test_tensors_are_checked_before_serving(tmp_path: Path, replace: dict[str, Any], message: str) -> None:
    arrays = {name: array if array is None else array.astype(np.float32) for name, array in replace.items()}
    assert message in refused(tmp_path, replace=arrays)


def test_rope_factors_of_another_architecture_are_refused(tmp_path: Path) -> None:
    assert "rope_freqs.weight: a tensor that the qwen2" in refused(
        tmp_path, architecture="qwen2", rope_freqs=np.ones(8)
    )


def test_old_copies_of_the_rotary_frequencies_are_skipped(tmp_path: Path) -> None:
    model = open_tiny(tmp_path, replace={"blk.0.attn_rot_embd.weight": np.ones(8, np.float32)})
    assert "blk.0.attn_rot_embd.weight" not in model.tensors


def test_quantizing_a_gguf_file_is_refused(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf")
    with pytest.raises(ModelFileError, match="this is a GGUF file"):
        open_model(path, quantize="q8_0")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "missing.gguf"])
def test_other_files_are_refused(tmp_path: Path, name: str) -> None:
    if name != "missing.gguf":
        (tmp_path / name).write_bytes(b"x" * 100)
    with pytest.raises(ModelFileError, match=r"pickle|config\.json|No such file"):
        open_model(tmp_path / name)


def resident_file_bytes(path: Path) -> int:
    """Resident bytes of this process's mappings of `path`."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's /proc/self/smaps")
def test_release_gives_pages_back_and_the_bytes_stay_readable(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf", hidden=256, ffn=1024, linear_type=GGMLType.F32)
    model = open_model(path)
    before = {name: tensor.read().copy() for name, tensor in model.tensors.items()}
    assert resident_file_bytes(path) > path.stat().st_size // 2
    for tensor in model.tensors.values():
        tensor.release()
    assert resident_file_bytes(path) < 200_000
    assert all(np.array_equal(before[name], tensor.read()) for name, tensor in model.tensors.items())
    model.close()


def test_close_unmaps_and_spares_views_in_use(tmp_path: Path) -> None:
    model = open_tiny(tmp_path)
    view = model.tensors["output_norm.weight"].read()
    first = int(view[0])
    model.close()
    assert int(view[0]) == first
    del view
    model.close()
    with pytest.raises(ValueError, match="closed"):
        model.tensors["output_norm.weight"].read()


@pytest.mark.real_model
def test_default_model(default_model: Path) -> None:
    model = open_model(default_model)
    config = model.config
    assert (config.architecture, config.num_layers, config.hidden_size, config.vocab_size) == ("llama", 30, 576, 49152)
    assert (config.head_dim, config.rope_theta, config.context_length) == (64, 100000.0, 8192)
    assert config.tie_embeddings
    assert model.tensors["token_embd.weight"].type is GGMLType.Q8_0
    assert len(model.tensors) == 272
    assert model.digest == "sha256:b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
