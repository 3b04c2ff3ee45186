"""The training loop, in one function: resume, step, evaluate, checkpoint, stop.

A step is a list of micro-batches; its loss is the weighted sum over all of them, on all ranks, divided by the sum of
the weights, so that how a step is cut does not matter. The loop knows nothing of what is computed: `model` may be an
adapter over a frozen base or a whole network. Nothing here depends on the clock, but for the tokens per second it
reports.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from finetune.errors import DivergedError
from finetune.model.allocator import return_holes
from finetune.train.checkpoint import Checkpoints, Machine, Progress
from finetune.train.optimizer import NamedOptimizer
from finetune.train.ranks import Alone, Ranks
from finetune.train.scaling import begin_scaling, scaled_on
from finetune.train.schedule import learning_rate
from finetune.train.settings import TrainSettings

logger = logging.getLogger(__name__)

Batch = TypeVar("Batch", contravariant=True)
AnyBatch = TypeVar("AnyBatch")

RUNAWAY_FACTOR = 4.0
"""A loss this many times the first one, or this many nats where the first was below 1 (an easy or KL-only step), is no
training any more: the rate is far too high."""
_HOLES_EVERY = 20
"""Steps. Pages that come back fault anew: 0.6 s a gigabyte."""


class Trainable(Protocol[Batch]):
    """What is trained."""

    def parameters(self) -> dict[str, Tensor]:
        """Leaves with `requires_grad`, by name."""

    def weight_of(self, batch: Batch) -> float:
        """The sum of the weights of its loss terms."""

    def tokens_of(self, batch: Batch) -> int:
        """Real tokens in it, for the report."""

    def backward(self, batch: Batch, normalizer: float) -> float:
        """Adds the gradient of (weighted loss of the batch) / normalizer; returns that loss."""


@dataclass(frozen=True, slots=True)
class StepLog:
    """One optimizer step."""

    step: int
    """From 1."""
    loss: float
    """Mean per unit of weight, before the step."""
    learning_rate: float
    grad_norm: float
    """Before clipping; infinite: float16 overflowed, and the step was skipped."""
    num_tokens: int
    tokens_per_second: float
    validation_loss: float | None = None


@dataclass(frozen=True, slots=True)
class TrainResult:
    progress: Progress
    stopped_early: bool
    is_exact: bool
    """False: resumed on another machine class, torch build or thread count; equal within tolerance, not bit for bit."""


def train(
    model: Trainable[AnyBatch],
    batches: Callable[[int], Sequence[AnyBatch]],
    settings: TrainSettings,
    directory: Path,
    *,
    identity: Mapping[str, Any],
    evaluate: Callable[[], float] | None = None,
    ranks: Ranks | None = None,
    pause: Callable[[], None] = lambda: None,
    on_step: Callable[[StepLog], None] = lambda log: None,
    adamw_names: frozenset[str] = frozenset(),
    rates: Mapping[str, float] = MappingProxyType({}),
    has_loss_scale: bool = False,
    is_complete: Callable[[int], bool] = lambda step: False,
) -> TrainResult:
    """Train from where `directory` left off. `batches(step)`: all micro-batches of step 0, 1, ...; always the same.

    `identity`: digests of data and base, so that a checkpoint of another run is refused. `evaluate`: the validation
    loss of the present parameters. `pause` is called between micro-batches and may wait. `on_step` comes before the
    step's checkpoint: after a kill between the two it hears of the step again. `is_complete(step)`: after `step` steps.
    `has_loss_scale`: for float16 (scaling.py). Raises DivergedError, TrainingError.
    """
    ranks = ranks or Alone()
    parameters = model.parameters()
    optimizer = NamedOptimizer(parameters, settings, adamw_names=adamw_names, rates=rates, ranks=ranks)
    checkpoints = Checkpoints(directory, {"settings": settings.as_json(), **identity})
    progress = begin_scaling(Progress()) if has_loss_scale else Progress()
    found = checkpoints.newest()
    if found is not None:
        here = Machine.here()
        is_exact = found.progress.is_exact and found.machine == here
        if found.machine != here:
            logger.warning(
                "step %d was computed by %s, and %s goes on: equal within tolerance, not bit for bit",
                found.progress.step,
                found.machine,
                here,
            )
        progress = replace(found.progress, is_exact=is_exact)
        _copy_into(parameters, found.parameters)
        optimizer.load(found.optimizer)

    while progress.step < settings.num_steps and not _is_over(progress, settings) and not is_complete(progress.step):
        start = time.perf_counter()
        step_batches = batches(progress.step)
        mine = step_batches[ranks.rank :: ranks.world_size]
        normalizer = ranks.sum_number(sum(model.weight_of(batch) for batch in mine))
        optimizer.clear_gradients()
        if progress.step % _HOLES_EVERY == 0:
            return_holes()
        loss = 0.0
        for batch in mine:
            pause()
            loss += model.backward(batch, normalizer / progress.loss_scale) / progress.loss_scale
        loss = ranks.sum_number(loss)
        gradients = optimizer.gradients()
        ranks.sum_gradients(gradients)
        if has_loss_scale:
            torch._foreach_mul_(gradients, 1 / progress.loss_scale)
        grad_norm = float(torch.nn.utils.get_total_norm(gradients))
        is_skipped = has_loss_scale and not math.isfinite(grad_norm)
        _check(progress, loss, 0.0 if is_skipped else grad_norm)
        rate = learning_rate(settings, progress.step)
        if not is_skipped:
            torch.nn.utils.clip_grads_with_norm_(parameters.values(), settings.max_grad_norm, torch.tensor(grad_norm))
            optimizer.step(rate)
        if has_loss_scale:
            progress = scaled_on(progress, is_finite=not is_skipped)

        num_tokens = sum(model.tokens_of(batch) for batch in step_batches)
        progress = replace(
            progress,
            step=progress.step + 1,
            num_tokens=progress.num_tokens + num_tokens,
            first_loss=loss if progress.first_loss is None else progress.first_loss,
        )
        seconds = time.perf_counter() - start
        validation = None
        is_last = progress.step == settings.num_steps
        if evaluate is not None and settings.eval_every and (is_last or progress.step % settings.eval_every == 0):
            validation = evaluate()
            progress = _judged(progress, validation)
        on_step(StepLog(progress.step, loss, rate, grad_norm, num_tokens, num_tokens / seconds, validation))
        if validation is not None and progress.best_step == progress.step and ranks.rank == 0:
            checkpoints.save_best(progress, parameters)
        if is_last or progress.step % settings.checkpoint_every == 0 or validation is not None:
            state = optimizer.state()
            if ranks.rank == 0:
                checkpoints.save(progress, parameters, state)

    if progress.best_step is not None and progress.best_step != progress.step:
        _copy_into(parameters, checkpoints.load_best(progress.best_step))
    return TrainResult(progress, progress.step < settings.num_steps, progress.is_exact)


def _is_over(progress: Progress, settings: TrainSettings) -> bool:
    return bool(settings.patience) and progress.num_worse >= settings.patience


def _judged(progress: Progress, loss: float) -> Progress:
    if not math.isfinite(loss):
        raise DivergedError(f"the validation loss after step {progress.step} is {loss}")
    if progress.best_loss is None or loss < progress.best_loss:
        return replace(progress, best_loss=loss, best_step=progress.step, num_worse=0)
    return replace(progress, num_worse=progress.num_worse + 1)


def _check(progress: Progress, loss: float, grad_norm: float) -> None:
    """Raises DivergedError; the parameters are still those of the step before."""
    where = f"in step {progress.step + 1}"
    if not math.isfinite(loss):
        raise DivergedError(f"the loss {where} is {loss}; nothing of this run is used. Try a lower learning rate.")
    if not math.isfinite(grad_norm):
        raise DivergedError(f"a gradient {where} is {grad_norm} (the loss is {loss:.4g}); nothing of this run is used.")
    first = progress.first_loss
    if first is not None and loss > RUNAWAY_FACTOR * max(first, 1.0):
        raise DivergedError(
            f"the loss {where} is {loss:.4g}, it began at {first:.4g}: it runs away. Try a lower learning rate."
        )


def _copy_into(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in parameters.items():
            tensor.copy_(values[name])
