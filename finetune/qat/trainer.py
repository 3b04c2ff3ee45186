"""A model that trains quantized, as the training loop wants it: gradients of micro-batches, held-out measures, entropy.

Not here: the model (model.py), the loop (finetune/train), which micro-batches there are (data.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from finetune.packed import Packed
from finetune.qat.model import Objective, QatModel, Teacher
from finetune.train.ranks import Alone, Ranks


@dataclass(frozen=True, slots=True)
class Stepped:
    """A micro-batch, and the share of ternary weights in its step (1: as served)."""

    packed: Packed
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class Held:
    """Of held-out micro-batches, per unit of weight, with the weights as they are served."""

    loss: float
    entropy: float
    accuracy: float
    """Of the targets the share that is the most likely token."""


class Trainer:
    """What the loop trains."""

    def __init__(
        self,
        model: QatModel,
        objective: Objective | None = None,
        teacher: Teacher | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self._model, self._objective, self._teacher = model, objective or Objective(), teacher
        self._ranks = ranks or Alone()
        self._entropy = self._weight = 0.0

    def parameters(self) -> dict[str, Tensor]:
        return self._model.parameters()

    def weight_of(self, batch: Stepped) -> float:
        return weight(batch.packed)

    def tokens_of(self, batch: Stepped) -> int:
        return batch.packed.num_real_tokens

    def backward(self, batch: Stepped, normalizer: float) -> float:
        self._model.weights.share = batch.share
        loss = self._model.loss(batch.packed, normalizer, self._objective, self._teacher)
        if loss.total.requires_grad:
            loss.total.backward()
        self._entropy += loss.entropy_sum
        self._weight += weight(batch.packed)
        return loss.value / normalizer

    def take_entropy(self) -> float:
        """Mean entropy of the predictions since the last call, of all ranks (which all have to ask)."""
        total = self._ranks.sum_number(self._entropy)
        weights = self._ranks.sum_number(self._weight)
        self._entropy = self._weight = 0.0
        return total / weights if weights else 0.0

    def measure(self, held_out: Sequence[Packed]) -> Held:
        self._model.weights.share = 1.0
        found = [self._model.measure(one) for one in held_out]
        total = sum(map(weight, held_out))
        return Held(
            sum(one.ce_sum for one in found) / total,
            sum(one.entropy_sum for one in found) / total,
            sum(one.num_right for one in found) / total,
        )


def weight(packed: Packed) -> float:
    return float(packed.loss_weights.sum(dtype="float64"))
