"""How large an exported file is beside the bf16 checkpoint: models/sterna-nano-tools with a larger vocabulary."""

from pathlib import Path

import pytest
import torch

from finetune.qat.export import export_gguf
from finetune.qat.shape import EmbeddingType, Shape
from finetune.qat.weights import initial_parameters
from quant.formats import GGMLType


@pytest.mark.parametrize(
    ("embedding_type", "kind", "most"),
    [("q8_0", GGMLType.TQ2_0, 0.36), ("q8_0", GGMLType.TQ1_0, 0.36), ("q4_0", GGMLType.TQ2_0, 0.20)],
)
def test_a_file_is_a_fraction_of_its_bf16_checkpoint(
    embedding_type: EmbeddingType, kind: GGMLType, most: float, tmp_path: Path
) -> None:
    shape = Shape(
        vocab_size=4096, hidden_size=512, intermediate_size=1024, num_layers=5, num_heads=8, num_kv_heads=2,
        embedding_type=embedding_type,
    )  # fmt: skip
    vocabulary = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [f"token {number}" for number in range(shape.vocab_size)],
        "tokenizer.ggml.merges": [f"left{number} right" for number in range(shape.vocab_size)],
        "tokenizer.ggml.token_type": [1] * shape.vocab_size,
    }
    parameters = initial_parameters(shape, seed=0, dtype=torch.float32, device=torch.device("cpu"))
    export_gguf(tmp_path / "model.gguf", shape, parameters, vocabulary, matrix_type=kind)
    share = (tmp_path / "model.gguf").stat().st_size / (2 * shape.num_parameters)
    print(f"{kind.name} with {embedding_type}: {share:.1%} of {2 * shape.num_parameters:,} bytes")
    assert share < most
