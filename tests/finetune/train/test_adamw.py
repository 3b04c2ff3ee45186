"""AdamW against torch's class, and what it is there for: torch's compiler is not imported."""

import subprocess
import sys

import pytest
import torch

from finetune.train.adamw import AdamW


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_torchs(dtype: torch.dtype) -> None:
    dice = torch.Generator().manual_seed(0)
    first = [torch.randn(shape, dtype=dtype, generator=dice) for shape in ((3, 5), (7,), (2, 2))]
    ours, theirs = ([one.clone().requires_grad_() for one in first] for _ in range(2))
    mine = AdamW(ours, 1e-2, (0.9, 0.99), weight_decay=0.1)
    torchs = torch.optim.AdamW(theirs, 1e-2, (0.9, 0.99), weight_decay=0.1)
    for step in range(5):
        gradients = [torch.randn(one.shape[::-1], dtype=dtype, generator=dice).t() for one in first]  # not contiguous
        for tensors in (ours, theirs):
            for number, (tensor, gradient) in enumerate(zip(tensors, gradients, strict=True)):
                tensor.grad = None if number == 2 and step < 2 else gradient  # one that no loss reaches at first
        mine.step()
        torchs.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
        assert mine.state[one].keys() == torchs.state[other].keys()
        for name, value in mine.state[one].items():
            torch.testing.assert_close(value, torchs.state[other][name])


def test_a_training_step_imports_no_compiler() -> None:
    code = (
        "import sys, torch\n"
        "from finetune.train.optimizer import NamedOptimizer\n"
        "from finetune.train.settings import TrainSettings\n"
        "given = {'a': torch.ones(2, 2, requires_grad=True)}\n"
        "optimizer = NamedOptimizer(given, TrainSettings(num_steps=1))\n"
        "optimizer.gradients()\n"
        "optimizer.step(1e-3)\n"
        "optimizer.state()\n"
        "sys.exit('torch._dynamo' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
