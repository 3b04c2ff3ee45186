"""Predicted memory of a run from scratch: what is known exactly, and the whole within 15 % of a measured peak."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from finetune.dataset.dialogues.generate import Options, generate
from finetune.qat.memory import plan_memory
from finetune.qat.model import QatModel
from tests.finetune.qat.learning import tiny_shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_muon", [False, True])
def test_parts(dtype: torch.dtype, is_muon: bool) -> None:
    shape = tiny_shape(tie_embeddings=False)
    plan, model = plan_memory(shape, dtype, 100, is_muon=is_muon, process_bytes=7), QatModel(shape, dtype=dtype)
    values = model.weights.values()
    held = [*model.parameters().values(), values.embedding, values.head]
    held += [tensor for layer in values.layers for tensor in layer.values()]
    assert plan.weights == sum(tensor.numel() * tensor.element_size() for tensor in held)
    vocabulary = 2 * shape.vocab_size * shape.hidden_size
    assert plan.gradients == 4 * (shape.num_parameters + vocabulary)
    vectors = sum(tensor.numel() for tensor in model.parameters().values() if tensor.ndim == 1)
    matrices = shape.num_parameters - vocabulary - vectors
    slots = (1 if is_muon else 2) * matrices + 2 * (vocabulary + vectors)
    assert plan.optimizer == 4 * slots
    assert plan.total == sum(getattr(plan, name) for name in plan.__dataclass_fields__)
    assert plan_memory(shape, dtype, 200, is_muon=is_muon).activations == 2 * plan.activations
    long = [plan_memory(shape, dtype, 100, is_muon=is_muon, num_steps=steps) for steps in (0, 250, 2500)]
    assert [one.heap - long[0].heap for one in long] == [0, plan.activations, plan.activations], "holes grow"


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory") / "dialogues"
    generate(folder, Options(templates=100))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hidden", "layers", "rows", "num_steps"),
    [(256, 2, 1024, 24), (256, 2, 1024, 160), (256, 4, 2048, 20), (512, 3, 4096, 14)],
)
def test_within_15_percent_of_a_runs_peak(
    hidden: int, layers: int, rows: int, num_steps: int, dialogues: Path, tmp_path: Path
) -> None:
    options = {
        "hidden-size": hidden, "intermediate-size": 2 * hidden, "layers": layers, "heads": hidden // 64,
        "vocab-size": 1024, "threads": 1, "micro-batch-tokens": rows, "tokens-per-step": 2 * rows, "epochs": 40,
        "max-steps": num_steps, "evaluate-every": num_steps // 2, "max-held-out": 60,
    }  # fmt: skip
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "server.cli", "train", str(dialogues), str(tmp_path), *flags, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    memory = json.loads(done.stdout)["memory"]
    print(f"planned {memory['total'] / 2**20:.0f} MiB, measured {memory['peak'] / 2**20:.0f} MiB")
    assert memory["total"] == pytest.approx(memory["peak"], rel=0.15)
