"""Predicted memory: by part as the model allocates it, the whole within 15 % of a process's measured peak."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from finetune.model.lora import LoraSpec
from finetune.model.memory import LONGEST, LongestContext, longest_context, plan_memory, weight_bytes
from finetune.model.model import ModelOptions, TrainModel
from quant.formats import BLOCK, GGMLType
from quant.model_file import open_model
from tests.tiny_models import write_tiny_gguf


@pytest.mark.parametrize("cache_weights", [False, True])
@pytest.mark.parametrize("type_", [type_ for type_ in BLOCK if BLOCK[type_][0] > 1])
def test_weights_are_what_the_model_holds(type_: GGMLType, cache_weights: bool, tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "model.gguf", linear_type=type_, hidden=256, ffn=512, embedding_type=GGMLType.F32)
    options = ModelOptions(cache_weights=cache_weights)
    model = TrainModel.open(path, LoraSpec(rank=2), cache_weights=cache_weights)
    file = open_model(path)
    if not cache_weights:
        with torch.no_grad():
            model.logits([1, 2], [0])  # the unpacking buffers are made when first used
    assert model.frozen.num_bytes == pytest.approx(weight_bytes(file, options), rel=1e-3)
    file.close()


def test_parts_and_the_longest_context(tmp_path: Path) -> None:
    file = open_model(write_tiny_gguf(tmp_path / "model.gguf"))
    options, spec = ModelOptions(), LoraSpec(rank=4)
    plan = plan_memory(file, spec, options, 1000, process_bytes=7)
    assert plan.total == sum(getattr(plan, name) for name in plan.__dataclass_fields__)
    assert plan.process == 7
    parameters = sum(4 * (shape[0] + shape[1]) for shape in ((64, 64), (32, 64), (32, 64), (64, 64)))
    parameters += sum(4 * (shape[0] + shape[1]) for shape in ((128, 64), (128, 64), (64, 128)))
    assert plan.adapter == plan.gradients == plan.optimizer // 2 == 2 * parameters * 4
    twice = plan_memory(file, spec, options, 2000)
    assert twice.activations == 2 * plan.activations
    fits = longest_context(file, spec, options, twice.total)
    assert 2000 <= fits.num_tokens < 2010
    assert fits.limit == twice.largest_part
    assert longest_context(file, spec, options, 1 << 50).num_tokens == LONGEST
    assert longest_context(file, spec, options, 1000) == LongestContext(0, "heap"), "more than the tiny model itself"
    file.close()


def test_checkpointing_and_offload_fit_more(tmp_path: Path) -> None:
    file = open_model(write_tiny_gguf(tmp_path / "model.gguf", layers=24))
    options, spec = ModelOptions(), LoraSpec(rank=4)
    budget = plan_memory(file, spec, options, 2000).total
    thin = replace(options, checkpointing=True)
    lengths = [
        longest_context(file, spec, one, budget).num_tokens for one in (options, thin, replace(thin, offload=True))
    ]
    assert lengths[0] < lengths[1] < lengths[2]
    file.close()


_MEASURE = """
import json, sys
import numpy as np, torch
from finetune.model.allocator import keep_freed_memory
from finetune.model.lora import LoraSpec
from finetune.model.model import TrainModel
from finetune.packed import Packed, Segment
from finetune.train.adamw import AdamW
torch.set_num_threads(1)
keep_freed_memory()
torch.mm(torch.ones(64, 64).bfloat16(), torch.ones(64, 64).bfloat16())  # loads what every product needs
def peak():  # not ru_maxrss, which begins with the parent's
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024
path, length, checkpointing = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True"
before = peak()
model = TrainModel.open(path, LoraSpec(), checkpointing=checkpointing)
ids = np.random.default_rng(0).integers(0, 1000, length).astype(np.int32)
rows = np.arange(length - 1, dtype=np.int32)
ones = np.ones(length - 1, np.float32)
positions, segments = np.arange(length, dtype=np.int32), (Segment(0, length, -1),)
packed = Packed(ids, positions, segments, rows, ids[1:], ones, ones == 0, 1, length)
optimizer = AdamW(list(model.parameters().values()), 1e-3, (0.9, 0.99), weight_decay=0.0)
for _ in range(2):
    model.loss(packed, float(length)).backward()
    optimizer.step()
    for parameter in model.parameters().values():
        parameter.grad = None
print(json.dumps([before, peak()]))
"""


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.parametrize(
    ("length", "checkpointing"),
    [
        (512, False),
        (1024, False),
        (2048, False),
        (512, True),
        (1024, True),
        (2048, True),
    ],
)
def test_within_15_percent_of_the_peak(length: int, checkpointing: bool, default_model: Path) -> None:
    command = [sys.executable, "-c", _MEASURE, str(default_model), str(length), str(checkpointing)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    before, peak = json.loads(done.stdout)
    file = open_model(default_model)
    options = ModelOptions(checkpointing=checkpointing)
    plan = plan_memory(file, LoraSpec(), options, length, process_bytes=before)
    file.close()
    assert plan.total == pytest.approx(peak, rel=0.15), plan
