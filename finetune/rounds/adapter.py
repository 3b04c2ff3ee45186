"""An adapter as the training loop wants it: losses and gradients of micro-batches, and the loss of the validation part.

Not here: the model (finetune/model), the loop (finetune/train), which micro-batches there are (steps.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.model.model import TrainModel
from finetune.packed import Packed


@dataclass(frozen=True, slots=True)
class Keyed:
    """A micro-batch, and what its dropout is drawn from."""

    packed: Packed
    key: int


class Adapter:
    """What the loop trains."""

    def __init__(self, model: TrainModel) -> None:
        self._model = model

    def parameters(self) -> dict[str, Tensor]:
        return self._model.trained()

    def weight_of(self, batch: Keyed) -> float:
        return _weight(batch.packed)

    def tokens_of(self, batch: Keyed) -> int:
        return batch.packed.num_real_tokens

    def backward(self, batch: Keyed, normalizer: float) -> float:
        loss = self._model.loss(batch.packed, normalizer, dropout_seed=batch.key)
        loss.backward()
        return (loss.ce_sum + loss.extra_sum) / normalizer


def validation_loss(model: TrainModel, packed: Sequence[Packed], pause: Callable[[], None]) -> float:
    """Mean cross-entropy per unit of weight, without dropout; `pause` comes before every micro-batch."""
    total = 0.0
    for one in packed:
        pause()
        with torch.no_grad():
            total += model.loss(one, 1.0, dropout_seed=None).ce_sum
    return total / sum(map(_weight, packed))


def _weight(packed: Packed) -> float:
    return float(packed.loss_weights.sum(dtype="float64"))
