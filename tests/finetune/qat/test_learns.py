"""It learns the alphabet in seconds, and the exported file says what the trained model says, on every instruction set.

The comparison of all 10,000 positions is marked slow; what it runs is what the fast one runs.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import _sterna
from finetune.errors import TrainingError
from finetune.qat.export import export_gguf
from finetune.qat.model import QatModel
from finetune.qat.quantizers import Ternary
from finetune.qat.trainer import Stepped
from quant.errors import ModelFileError
from quant.formats import GGMLType
from quant.model_file import open_model
from server.engine.weights import load_core
from tests.finetune.model.builders import plain
from tests.finetune.qat.learning import alphabet, copied, letters, run, tiny_shape, tokenizer_metadata
from tests.server.engine.reference import core_logits
from tests.tiny_weights import dequantize


def test_a_b_c_is_followed_by_b_c_d(tmp_path: Path) -> None:
    model = QatModel(tiny_shape())
    _, logs, _ = run(tmp_path, model, num_steps=40)
    assert logs[0].loss > 5.5  # of 384 tokens, knowing nothing: ln 384 = 5.95
    assert logs[-1].loss < 1.0
    answers = model.logits(letters("ABC")).argmax(1).tolist()
    assert bytes(answers).decode() == "BCD"


FILES: dict[str, dict[str, Any]] = {
    "plain": {},
    "untied, Q4_0, absmax of 256": {
        "tie_embeddings": False,
        "embedding_type": "q4_0",
        "ternary": Ternary("absmax", 256),
    },
    "two streams": {"residual_streams": 2},
    "groups of 64, one KV head": {"ternary": Ternary("absmean", 64), "num_kv_heads": 1},
}


def exported(path: Path, model: QatModel, **options: Any) -> Path:
    export_gguf(path, model.shape, model.parameters(), tokenizer_metadata(), **options)
    return path


def agreement(model: QatModel, path: Path, texts: list[list[int]], isa: str) -> tuple[float, float]:
    """Share of equal most likely tokens, and the largest difference of the logits by their spread."""
    file = open_model(path)
    core = load_core(file, isa=isa, num_threads=1, num_blocks=64, max_num_seqs=1, max_batch_tokens=64)
    same, worst = [], 0.0
    for ids in texts:
        expected = model.logits(ids).numpy()
        found = np.concatenate(list(core_logits(core, np.array(ids, np.int32))))
        same.append(found.argmax(1) == expected.argmax(1))
        worst = max(worst, float(np.abs(found - expected).max() / expected.std()))
    file.close()
    return float(np.concatenate(same).mean()), worst


def noisy(seed: int, length: int) -> list[int]:
    """The alphabet with letters that nobody could know: the model is sure of some answers and of others not."""
    rng = np.random.default_rng(seed)
    ids = np.array(alphabet(int(rng.integers(26)), length))
    wrong = rng.random(length) < 0.3
    ids[wrong] = rng.integers(65, 91, int(wrong.sum()))
    return ids.tolist()


@pytest.mark.parametrize("name", FILES)
def test_the_file_gives_the_trained_logits(name: str, tmp_path: Path) -> None:
    model = QatModel(tiny_shape(**FILES[name]), dtype=torch.bfloat16)
    run(tmp_path / "run", model, num_steps=15)
    path, wide = exported(tmp_path / "model.gguf", model), copied(model, dtype=torch.float32)
    texts = [noisy(seed, 120) for seed in range(20)]
    for isa in ("scalar", "auto"):
        share, worst = agreement(wide, path, texts, isa)
        assert share >= 0.995
        assert worst < 0.05  # measured 0.01: a value near a half that is rounded the other way


@pytest.mark.slow
def test_the_file_gives_the_trained_logits_at_10000_positions(tmp_path: Path) -> None:
    model = QatModel(tiny_shape(num_layers=3))

    def batches(step: int) -> Any:
        return [Stepped(plain(noisy(100 + 2 * step + i, 200))) for i in range(2)]

    run(tmp_path / "run", model, num_steps=40, batches=batches)
    path = exported(tmp_path / "model.gguf", model)
    texts = [noisy(seed, 512) for seed in range(20)]
    for isa in _sterna.available_isas():
        share, worst = agreement(model, path, texts, isa)
        print(f"{isa}: top-1 agreement {share:.4%} of {20 * 512} positions, largest difference {worst:.4f} spreads")
        assert share >= 0.995


@pytest.mark.parametrize("name", FILES)
def test_the_file_holds_the_trained_values(name: str, tmp_path: Path) -> None:
    model = QatModel(tiny_shape(**FILES[name]))
    file = open_model(exported(tmp_path / "model.gguf", model))
    for key, tensor in file.tensors.items():
        expected = model.weights.served(key).numpy()
        found = dequantize(tensor.read(), tensor.type, tensor.shape)
        if tensor.rope_interleaved:
            heads = len(found) // model.shape.head_dim
            pairs = found.reshape(heads, model.shape.head_dim // 2, 2, -1)
            found = pairs.swapaxes(1, 2).reshape(found.shape)
        assert np.array_equal(found.reshape(expected.shape), expected), key
    file.close()


def test_tq1_0_is_the_same_model(tmp_path: Path) -> None:
    model = QatModel(tiny_shape())
    small = exported(tmp_path / "tq1.gguf", model, matrix_type=GGMLType.TQ1_0)
    large = exported(tmp_path / "tq2.gguf", model)
    assert small.stat().st_size < large.stat().st_size
    assert agreement(model, small, [noisy(0, 40)], "auto") == agreement(model, large, [noisy(0, 40)], "auto")


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    model, path = QatModel(tiny_shape(ternary=Ternary("absmax", 64))), tmp_path / "model.gguf"
    with pytest.raises(TrainingError, match=r"TQ2_0 is not what holds groups of 64: that is Q4_0"):
        exported(path, model, matrix_type=GGMLType.TQ2_0)
    exported(path, model)
    with pytest.raises(ModelFileError, match="exists already"):
        exported(path, model)
    with torch.no_grad():
        model.parameters()["blk.1.ffn_up.weight"][3, 5] = float("nan")
    with pytest.raises(TrainingError, match=r"blk\.1\.ffn_up\.weight holds a value that is not finite"):
        exported(tmp_path / "other.gguf", model)
    assert not (tmp_path / "other.gguf").exists()
