"""An adapter saved by `peft` and served here gives `peft`'s logits: tiny float models, and the default model in int8.

The GGUF files of the llama architecture hold Q and K interleaved while adapters have half-split rows: served with the
same adapter they must agree with the Hugging Face directory. Not covered: which configurations are refused
(test_lora_files.py), adapters mixed in a batch (test_core_lora.py).
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import _sterna
from quant.formats import GGMLType
from quant.model_file import ModelFile, open_model
from server.engine.adapters import pack
from server.engine.lora import load_adapter_files
from server.engine.lora_types import PROJECTIONS
from server.engine.weights import load_core
from tests.server.engine.reference import core_logits, dequantize, text_ids
from tests.tiny_models import hf_name, write_tiny_gguf, write_tiny_hf

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # torch's, transformers' and PEFT's own

IDS = np.random.default_rng(3).integers(0, 384, 150).astype(np.int32)
ALL = list(PROJECTIONS)
VARIANTS: dict[str, dict[str, Any]] = {name: {"target_modules": [name]} for name in PROJECTIONS}
VARIANTS |= {
    "all seven": {"target_modules": ALL},
    "rank 64": {"target_modules": ALL, "r": 64, "lora_alpha": 64},
    "rslora": {"target_modules": ALL, "use_rslora": True, "r": 16},
    "patterns": {
        "target_modules": ALL,
        "rank_pattern": {"q_proj": 5, r"layers\.1\..*up_proj": 33},
        "alpha_pattern": {"k_proj": 40, "0.mlp.down_proj": 2},
    },
}


def logits_under_peft(model: Any, ids: np.ndarray, folder: Path, dtype: str, options: dict[str, Any]) -> np.ndarray:
    """Put a random adapter on `model`, save it into `folder`, return the logits in float32, take it off again.

    Its values are rounded to `dtype` beforehand, so that the file holds what was computed with.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(7)
    options = {"r": 8, "lora_alpha": 16} | options
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options))
    kept = getattr(torch, dtype)
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(kept).float()
    logits = torch_logits(adapted, ids)
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(kept)
    adapted.save_pretrained(folder)
    adapted.unload()
    return logits


def torch_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(ids[None].astype(np.int64))).logits[0].numpy()


def read_float_model(directory: Path) -> Any:
    torch = pytest.importorskip("torch", reason="test extra")
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")


def make_core(file: ModelFile) -> "_sterna.Core":
    return load_core(file, isa="auto", num_threads=1, num_blocks=16, max_num_seqs=1, max_batch_tokens=64)


def logits_served(core: "_sterna.Core", file: ModelFile, folder: Path | None, ids: np.ndarray) -> np.ndarray:
    """Through our loader and the core; `folder` None is without adapter."""
    if folder is not None:
        core.set_lora(2, pack(core, load_adapter_files(folder, file.config)))
    return np.concatenate(list(core_logits(core, ids, lora_slot=-1 if folder is None else 2)))


def relative_rms(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sqrt(np.mean((got - expected) ** 2)) / expected.std())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_tiny_llama(variant: str, dtype: str, tmp_path: Path) -> None:
    hf = write_tiny_hf(tmp_path / "hf")
    files = [open_model(hf), open_model(write_tiny_gguf(tmp_path / "model.gguf"))]
    assert [file.tensors["blk.0.attn_q.weight"].rope_interleaved for file in files] == [False, True]
    check_adapter(hf, files, tmp_path / "adapter", dtype, VARIANTS[variant])


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_tiny_qwen(architecture: str, tmp_path: Path) -> None:
    shape: dict[str, Any] = {"architecture": architecture, "head_dim": 32 if architecture == "qwen3" else None}
    hf = write_tiny_hf(tmp_path / "hf", **shape)
    files = [open_model(hf), open_model(write_tiny_gguf(tmp_path / "model.gguf", **shape))]
    check_adapter(hf, files, tmp_path / "adapter", "bfloat16", VARIANTS["all seven"])


def check_adapter(hf: Path, files: list[ModelFile], adapter: Path, dtype: str, options: dict[str, Any]) -> None:
    model = read_float_model(hf)
    without = torch_logits(model, IDS)
    expected = logits_under_peft(model, IDS, adapter, dtype, options)
    assert relative_rms(without, expected) > 0.05  # the adapter does something
    for file in files:
        got = logits_served(make_core(file), file, adapter, IDS)
        # float32 but for the 16-bit cache, as without adapter (test_reference_transformers.py)
        assert relative_rms(got, expected) < 2e-3
        assert np.abs(got - expected).max() < 2e-2 * expected.std()


REAL_IDS = 64


class _Values:
    """A tensor's data, in memory."""

    def __init__(self, values: np.ndarray) -> None:
        self._bytes = np.ascontiguousarray(values).view(np.uint8).reshape(-1)

    def read(self) -> np.ndarray:
        return self._bytes

    def release(self) -> None:
        pass


class RealModel:
    """The default model on both sides: in the core, and dequantized to float32 in `transformers`."""

    def __init__(self, file: ModelFile) -> None:
        torch = pytest.importorskip("torch", reason="test extra")
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.set_num_threads(1)
        c = file.config
        config = LlamaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.hidden_size,
            intermediate_size=c.intermediate_size,
            num_hidden_layers=c.num_layers,
            num_attention_heads=c.num_heads,
            num_key_value_heads=c.num_kv_heads,
            rms_norm_eps=c.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
            tie_word_embeddings=True,
        )
        self.model = LlamaForCausalLM(config)
        state = {hf_name(name): torch.tensor(self._half_split(file, name)) for name in file.tensors}
        missing = self.model.load_state_dict(state, strict=False)
        assert (missing.missing_keys, missing.unexpected_keys) == (["lm_head.weight"], [])
        self.model.tie_weights()
        self.ids = text_ids(file, "prose")[:REAL_IDS]
        tensors = {n: replace(t, type=GGMLType.F32, data=_Values(dequantize(t))) for n, t in file.tensors.items()}
        self.file = file
        self.int8_core, self.float_core = make_core(file), make_core(replace(file, tensors=tensors))

    @staticmethod
    def _half_split(file: ModelFile, name: str) -> np.ndarray:
        tensor = file.tensors[name]
        values = dequantize(tensor)
        if not tensor.rope_interleaved:
            return values
        pairs = values.reshape(-1, file.config.head_dim // 2, 2, values.shape[-1])
        return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)

    def errors(self, expected: np.ndarray, adapter: Path | None) -> tuple[float, float]:
        """Of the core with the file's own weights (int8 activations), and with them dequantized (float)."""
        cores = self.int8_core, self.float_core
        int8, exact = (relative_rms(logits_served(core, self.file, adapter, self.ids), expected) for core in cores)
        return int8, exact


@pytest.fixture(scope="module")
def real(default_model: Path) -> Iterator[RealModel]:
    file = open_model(default_model)
    yield RealModel(file)
    file.close()


@pytest.mark.real_model
@pytest.mark.parametrize("variant", [*PROJECTIONS, "all seven"])
def test_default_model(variant: str, real: RealModel, tmp_path: Path) -> None:
    """Adapters that move the logits by 0.1 to 0.6 of their spread (stronger ones make the model itself chaotic).

    Through float weights the served adapter is exact but for the i16 cache: that proves ranks, scales and row order at
    the real sizes. Through int8 the error may only be what int8 costs without adapter (3.5 %), or twice that: other
    hidden states, other rounding.
    """
    without = torch_logits(real.model, real.ids)
    int8_without, _ = real.errors(without, None)
    options = VARIANTS[variant] | {"lora_alpha": 8 if variant == "all seven" else 16}
    expected = logits_under_peft(real.model, real.ids, tmp_path, "bfloat16", options)
    int8, exact = real.errors(expected, tmp_path)
    effect = relative_rms(without, expected)
    assert exact < min(3e-3, effect / 20)
    assert int8 < min(2 * int8_without, effect)
