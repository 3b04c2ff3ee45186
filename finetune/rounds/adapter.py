"""An adapter as the training loop wants it: losses and gradients of micro-batches, and the loss of the validation part.

Micro-batches are computed alone, or two side by side, each with half of the threads: products of 500 rows take no
longer on one core than those of 1,000 on two, and what comes between them (norms, softmax, what Python does) leaves no
other core waiting. Beside other work a step of benchmarks/train_step.py's `full` takes a fifth less time; on a quiet
machine the gain is smaller. Gradients are added in one order, so equal inputs give equal bits at one thread count. Not
here: the model (finetune/model), the loop (finetune/train), which micro-batches there are (steps.py).
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.model.model import TrainModel
from finetune.packed import Packed

NUM_SIDES = 2


@dataclass(frozen=True, slots=True)
class Keyed:
    """A micro-batch, and what its dropout is drawn from."""

    packed: Packed
    key: int


Batch = tuple[Keyed, ...]
"""What is computed at once."""


def side_by_side(parts: Sequence[Keyed], max_rows: int) -> list[Batch]:
    """A step's micro-batches in twos, at most `max_rows` together; those of like cost beside each other."""
    batches: list[Batch] = []
    for part in sorted(parts, key=lambda one: (-_cost(one.packed), one.key)):
        rows = sum(len(one.packed.token_ids) for one in (*batches[-1], part)) if batches else 0
        if batches and len(batches[-1]) < NUM_SIDES and rows <= max_rows:
            batches[-1] = (*batches[-1], part)
        else:
            batches.append((part,))
    return batches


class Adapter:
    """What the loop trains."""

    def __init__(self, model: TrainModel) -> None:
        self._model = model
        # Checkpointing keeps one pass's inputs, adds its layers' gradients itself, and is for long contexts.
        self._has_sides = model.device.type == "cpu" and not model.options.checkpointing
        self._others = ThreadPoolExecutor(NUM_SIDES - 1, "side")

    def parameters(self) -> dict[str, Tensor]:
        return self._model.trained()

    def weight_of(self, batch: Batch) -> float:
        return sum(_weight(one.packed) for one in batch)

    def tokens_of(self, batch: Batch) -> int:
        return sum(one.packed.num_real_tokens for one in batch)

    def backward(self, batch: Batch, normalizer: float) -> float:
        threads = torch.get_num_threads()
        if len(batch) == 1 or threads < NUM_SIDES or not self._has_sides:
            return sum(self._alone(one, normalizer) for one in batch)
        share = threads // NUM_SIDES

        def one_side(part: Keyed) -> tuple[float, Sequence[Tensor | None]]:
            torch.set_num_threads(share)  # of the calling thread
            return self._gradients(part, normalizer)

        others = [self._others.submit(one_side, part) for part in batch[1:]]
        try:
            found = [one_side(batch[0]), *(other.result() for other in others)]
        finally:
            torch.set_num_threads(threads)
        return sum(self._add(*one) for one in found)

    def _alone(self, part: Keyed, normalizer: float) -> float:
        loss = self._model.loss(part.packed, normalizer, dropout_seed=part.key)
        loss.backward()
        return (loss.ce_sum + loss.extra_sum) / normalizer

    def _gradients(self, part: Keyed, normalizer: float) -> tuple[float, Sequence[Tensor | None]]:
        loss = self._model.loss(part.packed, normalizer, dropout_seed=part.key)
        wanted = list(self._model.trained().values())
        found = torch.autograd.grad(loss.total, wanted, allow_unused=True) if loss.total.requires_grad else ()
        return (loss.ce_sum + loss.extra_sum) / normalizer, found

    def _add(self, loss: float, gradients: Sequence[Tensor | None]) -> float:
        for parameter, gradient in zip(self._model.trained().values(), gradients, strict=False):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        return loss


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


def _cost(packed: Packed) -> int:
    """In rows: what has KL terms is run through the base too, without gradients."""
    return len(packed.token_ids) * (4 if packed.loss_kl.any() else 3)
