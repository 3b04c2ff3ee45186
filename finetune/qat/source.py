"""What a run begins with and learns from besides data: an existing model's weights, its tokenizer, a teacher.

Any llama model that the server opens will do, whatever its types. Its vocabulary and chat template are kept. Not here:
models made from nothing (weights.py) and their vocabulary (finetune/dataset/dialogues/vocabulary.py).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.errors import TrainingError
from finetune.model.lora import LoraSpec
from finetune.model.model import TrainModel
from finetune.model.weights import FrozenWeights
from finetune.packed import Packed
from finetune.qat.config import QatSettings
from finetune.qat.induction import ROPE_THETA
from finetune.qat.quantizers import Ternary
from finetune.qat.shape import Shape
from finetune.train.checkpoint import read_newest
from quant.model_file import ModelFile, open_model
from server.text.gguf_export import gguf_tokenizer_metadata


def made_shape(settings: QatSettings) -> Shape:
    """Of a model from scratch."""
    return Shape(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_layers=settings.layers,
        num_heads=settings.heads,
        num_kv_heads=settings.kv_heads,
        head_dim=settings.head_dim,
        context_length=settings.context_length,
        tie_embeddings=settings.tie_embeddings,
        residual_streams=settings.residual_streams,
        ternary=Ternary(settings.ternary, settings.group),
        embedding_type=settings.embedding_type,
        name=settings.name,
        **({"rope_theta": ROPE_THETA} if settings.induction else {}),
    )


def base_shape(file: ModelFile, settings: QatSettings) -> Shape:
    """Raises TrainingError for an architecture that is not trained here."""
    config = file.config
    odd = {
        f"architecture {config.architecture}": config.architecture != "llama",
        "biases of Q, K and V": config.qkv_bias,
        "norms of Q and K": config.qk_norm,
        "two residual streams": config.residual_streams != 1,
        "rotary factors": config.rope_freq_factors is not None,
        "heads that are rotated in part": config.rope_dim != config.head_dim,
    }
    for what, is_odd in odd.items():
        if is_odd:
            raise TrainingError(f"{file.path} cannot be trained from: {what} (a plain llama can)")
    return Shape(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        context_length=min(settings.context_length, config.context_length),
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=config.rope_theta,
        tie_embeddings=config.tie_embeddings,
        ternary=Ternary(settings.ternary, settings.group),
        embedding_type=settings.embedding_type,
        name=settings.name,
    )


def base_parameters(file: ModelFile) -> dict[str, Tensor]:
    """Every tensor as float32, Q and K half-split. Raises TrainingError for a value that is not finite."""
    weights = FrozenWeights(file, device=torch.device("cpu"), dtype=torch.float32, cache=False)
    found = {}
    for name, tensor in weights.dense_tensors():
        if not bool(tensor.isfinite().all()):
            raise TrainingError(f"{file.path}: {name} holds a value that is not finite")
        found[name] = tensor.float().clone()
    return found


def run_parameters(run: Path, shape: Shape) -> dict[str, Tensor]:
    """The newest shadows of another run's. Raises TrainingError for a run of another shape."""
    identity, parameters = read_newest(run / "checkpoints")
    theirs, ours = ({**one, "name": None} for one in (identity.get("shape", {}), shape.as_json()))
    if theirs != ours:
        changed = [key for key in ours if theirs.get(key) != ours[key]]
        raise TrainingError(f"{run} trains a model of another shape ({', '.join(changed) or 'more settings'} differ)")
    return parameters


def take_parameters(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Raises TrainingError where names or shapes differ."""
    for name, tensor in parameters.items():
        if name not in values or values[name].shape != tensor.shape:
            shape = tuple(values[name].shape) if name in values else "missing"
            raise TrainingError(f"{name} is {shape}, the model has {tuple(tensor.shape)}: weights of another model")
        with torch.no_grad():
            tensor.copy_(values[name])


def tokenizer_metadata(file: ModelFile) -> dict[str, Any]:
    """Every `tokenizer.*` key of the model, for the file that will be written. Raises ConfigError."""
    if file.tokenizer.kind == "gguf":
        return {f"tokenizer.{key}": value for key, value in file.tokenizer.metadata.items()}
    return gguf_tokenizer_metadata(file.tokenizer, file.config.vocab_size)


class FileTeacher:
    """A served model as a teacher, frozen at its file's types."""

    def __init__(self, path: Path, vocab_size: int, *, device: str, dtype: torch.dtype) -> None:
        file = open_model(path)
        if file.config.vocab_size != vocab_size:
            raise TrainingError(
                f"the teacher {path} has {file.config.vocab_size} tokens, the model {vocab_size}: they must share one"
                " vocabulary"
            )
        self.digest = file.digest
        file.close()
        own = torch.bfloat16 if dtype == torch.float16 else dtype
        self._model = TrainModel.open(path, LoraSpec(rank=1), device=device, dtype=own)

    def hidden(self, packed: Packed, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        return self._model.base_hidden(packed, rows), self._model.frozen.head
