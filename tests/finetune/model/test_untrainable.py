"""Models that the engine serves and LoRA training does not know are refused by name."""

from pathlib import Path
from typing import Any

import pytest

from finetune.errors import TrainingError
from finetune.model.lora import LoraSpec
from finetune.model.memory import plan_memory
from finetune.model.model import ModelOptions, TrainModel
from quant.model_file import open_model
from tests.tiny_models import write_tiny_gguf


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ({"architecture": "bitnet-b1.58"}, "of a bitnet model cannot be trained"),
        ({"residual_streams": 2}, "has 2 residual streams; one is accepted"),
    ],
)
def test_untrainable_models_are_refused(tmp_path: Path, shape: dict[str, Any], reason: str) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf", **shape)
    with pytest.raises(TrainingError, match=reason):
        TrainModel.open(path, LoraSpec(rank=4))
    file = open_model(path)
    with pytest.raises(TrainingError, match=reason):
        plan_memory(file, LoraSpec(rank=4), ModelOptions(), 16)
    file.close()
