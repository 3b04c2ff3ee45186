"""Training models over the tiny one, with LoRA factors that do something."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.model.lora import LoraSpec
from finetune.model.model import TrainModel

Opener = Callable[..., TrainModel]


def stir(model: TrainModel, seed: int = 1) -> TrainModel:
    """B as large as A, so that gradients reach everything."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, factor in model.parameters().items():
            if ".lora_B." in name:
                factor.copy_(0.2 * torch.randn(factor.shape, generator=generator, dtype=torch.float64))
    return model


@pytest.fixture
def open_tiny(tiny_gguf: Path) -> Opener:
    def opened(path: Path = tiny_gguf, *, spec: LoraSpec | None = None, **options: Any) -> TrainModel:
        options = {"dtype": torch.float64} | options
        return stir(TrainModel.open(path, spec or LoraSpec(rank=4, alpha=8), **options))

    return opened
