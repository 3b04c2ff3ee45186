"""Tiny random models of every architecture: `transformers`' float32 logits against our NumPy reference and the core.

The same weights go in as a Hugging Face directory (read by both sides) and as a GGUF file (Q and K interleaved for
llama). The reference, in float64, must be within float32 rounding; the core within that and its 16-bit KV cache.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import _sterna
from quant.formats import GGMLType
from quant.model_file import ModelFile, open_model
from server.engine.weights import load_core
from tests.server.engine.reference import Reference, core_logits
from tests.tiny_models import write_tiny_gguf, write_tiny_hf

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # torch's and transformers' own

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}

CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama untied, wide heads": {"tie": False, "head_dim": 32},
    "llama one KV head": {"heads": 6, "kv_heads": 1, "hidden": 96},
    "llama 3 rope": {"head_dim": 32, "config": {"rope_parameters": LLAMA3}},
    "llama linear rope": {"config": {"rope_parameters": LINEAR}},
    "mistral": {"architecture": "mistral", "tie": False},
    "qwen2": {"architecture": "qwen2"},
    "qwen2 untied": {"architecture": "qwen2", "tie": False, "rope_theta": 1e6, "rms_norm_eps": 1e-6},
    "qwen3": {"architecture": "qwen3"},
    "bitnet": {"architecture": "bitnet", "tie": False},
    "bitnet tied, silu": {"architecture": "bitnet", "kv_heads": 4, "config": {"hidden_act": "silu"}},
    "qwen3 wide heads": {"architecture": "qwen3", "head_dim": 32, "tie": False, "rope_theta": 1e6},
}
IDS = np.random.default_rng(3).integers(0, 384, 200).astype(np.int32)
"""Longer than one span of 128 keys of the core's attention."""


def transformers_logits(directory: Path) -> np.ndarray:
    torch = pytest.importorskip("torch", reason="test extra")
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(torch.tensor(IDS[None].astype(np.int64))).logits[0].numpy()


def logits_of(file: ModelFile, isa: str = "auto") -> np.ndarray:
    core = load_core(file, isa=isa, num_threads=1, num_blocks=16, max_num_seqs=1, max_batch_tokens=64)
    return np.concatenate(list(core_logits(core, IDS)))


def assert_float32_equal(got: np.ndarray, expected: np.ndarray) -> None:
    """Sums of about a hundred products over two layers: some hundred times float32's 6e-8 relative to the spread."""
    assert np.abs(got - expected).max() < 3e-5 * expected.std()


def assert_core_close(got: np.ndarray, expected: np.ndarray) -> None:
    """The cache rounds keys and values, by less than f16's 2^-11 = 5e-4; random layers amplify that a few times."""
    error = np.abs(got - expected)
    assert np.sqrt((error**2).mean()) < 1e-3 * expected.std()
    assert error.max() < 1e-2 * expected.std()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_hugging_face_directory(name: str, dtype: str, tmp_path: Path) -> None:
    directory = write_tiny_hf(tmp_path / "model", dtype=dtype, **CASES[name])
    expected = transformers_logits(directory)
    file = open_model(directory)
    assert file.tensors["blk.0.ffn_up.weight"].type == (GGMLType.F32 if dtype == "float32" else GGMLType.BF16)
    assert_float32_equal(np.concatenate(list(Reference(file, np.float64).logits(IDS))), expected)
    for isa in _sterna.available_isas():
        assert_core_close(logits_of(file, isa), expected)


def gguf_arguments(case: dict[str, Any]) -> dict[str, Any]:
    """What llama.cpp's converter writes for the case: Mistral is llama, Llama 3's factors are a tensor."""
    case = dict(case)
    if case.get("architecture") == "mistral":
        case["architecture"] = "llama"
    config = case.pop("config", {})
    rope = config.get("rope_parameters", {})
    if case.get("architecture") == "bitnet":
        case["metadata"] = {"bitnet.hidden_activation": config.get("hidden_act", "relu2")}
    if rope.get("rope_type") == "linear":
        case["metadata"] = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": rope["factor"]}
    if rope.get("rope_type") == "llama3":
        wavelengths = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, case["head_dim"], 2) / case["head_dim"])
        low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
        high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
        smooth = np.clip((low / wavelengths - 1) / (low / high - 1), 0, 1)
        case["rope_freqs"] = 1 / ((1 - smooth) / rope["factor"] + smooth)
    return case


@pytest.mark.parametrize("name", CASES)
def test_gguf_export(name: str, tmp_path: Path) -> None:
    expected = transformers_logits(write_tiny_hf(tmp_path / "hf", **CASES[name]))
    arguments = gguf_arguments(CASES[name])
    file = open_model(write_tiny_gguf(tmp_path / "model.gguf", **arguments))
    is_llama = arguments.get("architecture", "llama") == "llama"
    assert file.tensors["blk.1.attn_k.weight"].rope_interleaved == is_llama
    assert_float32_equal(np.concatenate(list(Reference(file, np.float64).logits(IDS))), expected)
    assert_core_close(logits_of(file), expected)


def test_a_wrong_row_order_would_show(tmp_path: Path) -> None:
    """The tolerances are worth something: half-split rows taken for interleaved ones are far outside them."""
    expected = transformers_logits(write_tiny_hf(tmp_path / "hf"))
    file = open_model(write_tiny_gguf(tmp_path / "model.gguf"))
    reference = Reference(file, np.float64)
    reference._interleaved = False
    got = np.concatenate(list(reference.logits(IDS)))
    assert np.abs(got - expected).max() > 0.3 * expected.std()
