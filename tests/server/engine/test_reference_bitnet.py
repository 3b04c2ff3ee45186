"""A packed BitNet checkpoint as transformers computes it, activations rounded per token, against the core.

transformers' `AutoBitLinear` computes in float32 with weights of -1, 0, 1 and one scale a matrix; the core computes
with TQ2_0 blocks and int8. The same weights in a GGUF file must give the core's very bits. Not covered: BitNet in
floats (test_reference_transformers.py), other ways of packing (tests/quant).
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import _sterna
from quant.formats import GGMLType
from quant.model_file import ModelFile, open_model
from server.engine.weights import load_core
from tests.quant.packed_checkpoints import pack_uint8, save_mixed
from tests.server.engine.reference import core_logits
from tests.tiny_models import hf_name, write_tiny_gguf, write_tiny_hf
from tests.tiny_weights import TinyShape, tiny_weights

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # torch's and transformers' own

SHAPE: dict[str, Any] = {"hidden": 256, "ffn": 512, "heads": 4, "kv_heads": 2, "layers": 3}
PACKED = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"}
IDS = np.random.default_rng(3).integers(0, 384, 200).astype(np.int32)
WEIGHTS = tiny_weights(TinyShape("bitnet", **SHAPE))


def ternary() -> dict[str, tuple[np.ndarray, np.float32]]:
    """BitNet b1.58's absmean rounding of every matrix of a layer: (-1, 0 or 1; the scale, which f16 holds exactly)."""
    found = {}
    for name, array in WEIGHTS.items():
        if name.startswith("blk.") and array.ndim == 2:
            scale = np.float32(np.float16(np.abs(array).mean()))
            found[name] = np.clip(np.rint(array / scale), -1, 1).astype(np.int8), scale
    return found


def write_packed(path: Path) -> Path:
    write_tiny_hf(path, architecture="bitnet", config={"quantization_config": PACKED}, **SHAPE)
    tensors = {hf_name(name): array for name, array in WEIGHTS.items()}
    for name, (codes, scale) in ternary().items():
        tensors |= {hf_name(name): pack_uint8(codes), f"{hf_name(name)}_scale": np.array([scale])}
    save_mixed(path / "model.safetensors", tensors)
    return path


def transformers_logits(directory: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    torch = pytest.importorskip("torch", reason="test extra")
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr("torch._dynamo.config.disable", True)  # it unpacks in compiled code, a minute of compiling
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(torch.tensor(IDS[None].astype(np.int64))).logits[0].numpy()


def logits_of(file: ModelFile, isa: str) -> np.ndarray:
    core = load_core(file, isa=isa, num_threads=1, num_blocks=16, max_num_seqs=1, max_batch_tokens=64)
    return np.concatenate(list(core_logits(core, IDS)))


def test_equals_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_packed(tmp_path / "m")
    expected = transformers_logits(directory, monkeypatch)
    file = open_model(directory)
    assert file.tensors["blk.0.attn_q.weight"].type is GGMLType.TQ2_0
    same = write_tiny_gguf(
        tmp_path / "m.gguf",
        architecture="bitnet-b1.58",
        linear_type=GGMLType.TQ2_0,
        embedding_type=GGMLType.F32,
        replace={name: codes * scale for name, (codes, scale) in ternary().items()},
        **SHAPE,
    )
    for isa in _sterna.available_isas():
        got = logits_of(file, isa)
        # Measured 0.020: the cache puts some activations on the other side of a rounding boundary, a step of 1/127
        # of the row's largest each. Scales per 32 values, blind to the rounding that was trained, are 0.029 away.
        assert np.sqrt(np.square(got - expected).mean()) < 0.025 * expected.std()
        assert np.mean(got.argmax(1) == expected.argmax(1)) >= 0.95
        assert np.array_equal(logits_of(open_model(same), isa), got)
