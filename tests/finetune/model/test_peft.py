"""Adapters go out in PEFT's layout and come back; `peft` over transformers has the same logits and gradients.

The server's own loader reads what is exported (its checks are the server's to test). The default model's adapter gives
the same answers here and in our engine, as near as int8 activations allow.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from finetune.model.lora import PROJECTIONS, LoraSpec
from finetune.model.model import TrainModel
from finetune.model.peft import CONFIG_NAME, TENSORS_NAME, export_peft, import_peft
from quant.errors import ModelFileError
from quant.model_file import open_model
from server.engine.adapters import pack
from server.engine.lora import load_adapter_files
from server.engine.weights import load_core
from tests.finetune.model.builders import plain
from tests.finetune.model.conftest import Opener, stir
from tests.server.engine.reference import core_logits, text_ids
from tests.tiny_models import write_tiny_gguf, write_tiny_hf

SPECS = {
    "all seven": LoraSpec(rank=4, alpha=8),
    "rslora": LoraSpec(rank=4, alpha=2, use_rslora=True),
    "patterns": LoraSpec(
        rank=4,
        targets=("q_proj", "v_proj", "down_proj"),
        rank_pattern={"v_proj": 2, r"layers\.1\..*down_proj": 6},
        alpha_pattern={"0.self_attn.q_proj": 3.0},
    ),
}


@pytest.mark.parametrize("name", SPECS)
def test_the_server_reads_what_is_exported(name: str, open_tiny: Opener, tmp_path: Path) -> None:
    model, spec = open_tiny(spec=SPECS[name], dtype=torch.float32), SPECS[name]
    export_peft(model, tmp_path)
    served = load_adapter_files(tmp_path, model.config)
    parameters = model.parameters()
    assert len(served.projections) == 2 * len(spec.targets) == len(parameters) / 2
    for part in served.projections:
        block = "self_attn" if part.projection in PROJECTIONS[:4] else "mlp"
        module = f"model.layers.{part.layer}.{block}.{part.projection}"
        for half, values in (("A", part.a), ("B", part.b)):
            factor = parameters[f"base_model.model.{module}.lora_{half}.weight"].detach()
            np.testing.assert_array_equal(values, factor.numpy())
        assert part.scale == pytest.approx(spec.scale_of(module))


def test_comes_back_bit_for_bit(open_tiny: Opener, tmp_path: Path) -> None:
    model = open_tiny(dtype=torch.float32)
    export_peft(model, tmp_path / "one")
    other = open_tiny(dtype=torch.float32, seed=3)
    import_peft(other, tmp_path / "one")
    export_peft(other, tmp_path / "two")
    for name in (CONFIG_NAME, TENSORS_NAME):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_another_adapter_is_refused(open_tiny: Opener, tmp_path: Path) -> None:
    export_peft(open_tiny(), tmp_path)
    with pytest.raises(ValueError, match=r"r is 4, this model trains with 8"):
        import_peft(open_tiny(spec=LoraSpec(rank=8, alpha=8)), tmp_path)
    with pytest.raises(ModelFileError, match=r"down_proj.*does not train"):
        import_peft(open_tiny(spec=LoraSpec(rank=4, alpha=8, targets=("o_proj",))), tmp_path)
    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config | {"r": 8}))
    with pytest.raises(ModelFileError, match="shape"):
        import_peft(open_tiny(spec=LoraSpec(rank=8, alpha=8)), tmp_path)


SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "untied": {"tie": False},
    "qwen2": {"architecture": "qwen2"},
    "qwen3": {"architecture": "qwen3", "head_dim": 32},
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's, transformers' and PEFT's own
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spec", ["all seven", "patterns"])
def test_equals_peft(shape: str, spec: str, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="test extra")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = np.random.default_rng(3).integers(0, 384, 60).tolist()
    path = write_tiny_gguf(tmp_path / "model.gguf", **SHAPES[shape])  # Q and K interleaved, in llama's
    model = stir(TrainModel.open(path, SPECS[spec], dtype=torch.float64))
    export_peft(model, tmp_path / "adapter")
    import_peft(model, tmp_path / "adapter")  # rounded to float32 on both sides
    base = AutoModelForCausalLM.from_pretrained(
        write_tiny_hf(tmp_path / "hf", **SHAPES[shape]), dtype=torch.float64, attn_implementation="eager"
    )
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True, autocast_adapter_dtype=False)
    tokens = torch.tensor([ids])
    out = theirs.double()(input_ids=tokens, labels=tokens)
    out.loss.backward()
    loss = model.loss(plain(ids), 59.0)
    loss.backward()
    # transformers computes its rotary angles, norms and softmax in float32 even in a float64 model
    torch.testing.assert_close(model.logits(ids, range(60)), out.logits[0].detach().double(), rtol=1e-4, atol=1e-4)
    assert loss.total.item() == pytest.approx(out.loss.item(), rel=1e-5)
    their_parameters = dict(theirs.named_parameters())
    for name, factor in model.parameters().items():
        expected = their_parameters[name.replace(".weight", ".default.weight")].grad
        assert factor.grad is not None
        assert expected is not None
        assert (factor.grad - expected).norm() < 1e-4 * expected.norm(), name


def relative_rms(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sqrt(np.mean((got - expected) ** 2)) / expected.std())


@pytest.mark.slow
@pytest.mark.real_model
def test_the_engine_answers_as_the_trainer_does(default_model: Path, tmp_path: Path) -> None:
    model = TrainModel.open(default_model, LoraSpec(rank=8), dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    file = open_model(default_model)
    ids = text_ids(file, "prose")[:128]
    without = model.logits(ids, range(128)).numpy()
    with torch.no_grad():
        for name, factor in model.parameters().items():
            if ".lora_B." in name:
                factor.copy_(0.02 * torch.randn(factor.shape, generator=generator))
    expected = model.logits(ids, range(128)).numpy()
    export_peft(model, tmp_path)
    core = load_core(file, isa="auto", num_threads=1, num_blocks=8, max_num_seqs=1, max_batch_tokens=64)
    base_error = relative_rms(np.concatenate(list(core_logits(core, ids))), without)
    core.set_lora(2, pack(core, load_adapter_files(tmp_path, file.config)))
    served = np.concatenate(list(core_logits(core, ids, lora_slot=2)))
    effect, error = relative_rms(without, expected), relative_rms(served, expected)
    assert effect > 0.1  # the adapter does something
    assert base_error < 0.05  # what int8 activations cost without it
    assert error < min(2 * base_error, effect / 2)
    agreement = np.mean(served.argmax(1) == expected.argmax(1))
    assert agreement > 0.9
