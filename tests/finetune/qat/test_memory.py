"""Predicted memory of a step from scratch: what is known exactly, and the whole within 15 % of a measured peak."""

import json
import subprocess
import sys

import pytest
import torch

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


_MEASURE = """
import json, sys
import numpy as np, torch
from finetune.model.allocator import keep_freed_memory
from finetune.qat.memory import plan_memory
from server.machine import peak_bytes
from finetune.qat.model import QatModel
from finetune.qat.shape import Shape
from finetune.train.optimizer import NamedOptimizer
from finetune.train.settings import TrainSettings
from tests.finetune.model.builders import plain
torch.set_num_threads(1)
keep_freed_memory()
torch.mm(torch.ones(64, 64).bfloat16(), torch.ones(64, 64).bfloat16())  # loads what every product needs
torch.optim.AdamW([torch.ones(1, requires_grad=True)])  # imports torch._dynamo: 70 MB
hidden, layers, length, name, dtype = *map(int, sys.argv[1:4]), sys.argv[4], getattr(torch, sys.argv[5])
shape = Shape(vocab_size=4096, hidden_size=hidden, intermediate_size=3 * hidden, num_layers=layers,
              num_heads=hidden // 64, num_kv_heads=hidden // 128)
plan = plan_memory(shape, dtype, length, is_muon=name == "muon", process_bytes=peak_bytes())
model = QatModel(shape, dtype=dtype)
settings = TrainSettings(num_steps=1, optimizer=name)
optimizer = NamedOptimizer(model.parameters(), settings, adamw_names=frozenset(["token_embd.weight"]))
for step in range(2):
    ids = np.random.default_rng(step).integers(0, 4096, (length // 256, 256))
    model.loss(plain(ids.reshape(-1).tolist()), float(length)).total.backward()
    optimizer.step(1e-3)
    optimizer.clear_gradients()
print(json.dumps([plan.total, peak_bytes()]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hidden", "layers", "length", "optimizer", "dtype"),
    [(256, 4, 1024, "muon", "bfloat16"), (512, 4, 2048, "muon", "bfloat16"), (512, 4, 1024, "adamw", "float32")],
)
def test_within_15_percent_of_the_peak(hidden: int, layers: int, length: int, optimizer: str, dtype: str) -> None:
    command = [sys.executable, "-c", _MEASURE, str(hidden), str(layers), str(length), optimizer, dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    planned, peak = json.loads(done.stdout)
    print(f"planned {planned / 2**20:.0f} MiB, measured {peak / 2**20:.0f} MiB")
    assert planned == pytest.approx(peak, rel=0.15)
