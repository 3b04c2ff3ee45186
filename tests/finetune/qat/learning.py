"""What the tests of quantization-aware training learn: the alphabet, and the parts of a run over it."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.qat.model import QatModel
from finetune.qat.shape import VOCABULARY_TENSORS, Shape
from finetune.qat.trainer import Stepped, Trainer
from finetune.train.loop import StepLog, TrainResult, train
from finetune.train.settings import TrainSettings
from tests.finetune.model.builders import plain
from tests.tiny_vocab import byte_level_vocab

VOCAB = 384


def tiny_shape(**options: Any) -> Shape:
    return Shape(**{"vocab_size": VOCAB, "num_layers": 2, "intermediate_size": 256, **options})


def letters(text: str) -> list[int]:
    """Tokens are bytes."""
    return list(text.encode())


def alphabet(first: int, length: int = 24) -> list[int]:
    """From letter `first` on, around the alphabet: "X Y Z A B"."""
    return letters("".join(chr(ord("A") + (first + i) % 26) for i in range(length)))


def alphabet_steps(step: int, num_parts: int = 2) -> list[Stepped]:
    rng = np.random.default_rng(step)
    return [Stepped(plain(alphabet(int(rng.integers(26))))) for _ in range(num_parts)]


def run(
    directory: Path, model: QatModel, *, num_steps: int = 12, batches: Any = alphabet_steps, **options: Any
) -> tuple[TrainResult, list[StepLog], dict[str, Tensor]]:
    settings = options.pop("settings", None) or TrainSettings(
        num_steps=num_steps, learning_rate=6e-3, optimizer="muon", weight_decay=0.1, checkpoint_every=5
    )
    logs: list[StepLog] = []
    result = train(
        Trainer(model, **options.pop("trainer", {})),
        batches,
        settings,
        directory,
        identity=options.pop("identity", {"shape": model.shape.as_json()}),
        on_step=logs.append,
        adamw_names=VOCABULARY_TENSORS,
        has_loss_scale=model.dtype == torch.float16,
        **options,
    )
    return result, logs, {name: tensor.detach().clone() for name, tensor in model.parameters().items()}


def tokenizer_metadata() -> dict[str, Any]:
    """Bytes first, as `letters` has them."""
    vocab = byte_level_vocab(VOCAB)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": vocab.tokens,
        "tokenizer.ggml.merges": vocab.merges,
        "tokenizer.ggml.token_type": [1] * VOCAB,
    }


def copied(model: QatModel, **options: Any) -> QatModel:
    """The same parameters in another type."""
    other = QatModel(model.shape, **options)
    with torch.no_grad():
        for name, tensor in other.parameters().items():
            tensor.copy_(model.parameters()[name])
    return other
