"""One stretch of training over one set of examples: the loop with its data, held-out measures, log and checkpoints.

A run is one phase, or the four stages of a curriculum. Everything that a phase does follows from its step's number, so
that it goes on bit for bit after a kill. Not here: what comes before and after (run.py), the curriculum's rules.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from finetune.dataset.packing import pack
from finetune.errors import DivergedError
from finetune.packed import Example, Packed
from finetune.qat.config import QatSettings
from finetune.qat.induction import circuit_names
from finetune.qat.metrics import Line, Metrics
from finetune.qat.model import Objective, QatModel, Teacher
from finetune.qat.shape import VOCABULARY_TENSORS
from finetune.qat.trainer import Held, Stepped, Trainer
from finetune.rounds.steps import Steps
from finetune.train.loop import StepLog, TrainResult, train
from finetune.train.ranks import Ranks
from finetune.train.settings import TrainSettings

PACKED_TOGETHER = 96
"""Examples. All of them share more rows (a quarter fewer to compute), but a micro-batch is then of one first tool, and
learning is slower: the shipped model's held-out loss after ten minutes was 1.65 instead of 1.40."""


@dataclass(frozen=True, eq=False)
class Phase:
    """`name` None: the run's only one. `is_complete`: whether a held-out measure ends it. `max_rise`: how many times
    the best held-out loss (or so many nats where that is below 1) is no training any more."""

    folder: Path
    examples: Sequence[Example]
    held_out: Sequence[Example]
    name: str | None = None
    max_steps: int | None = None
    rate_factor: float = 1.0
    is_complete: Callable[[Held], bool] = lambda held: False
    max_rise: float = math.inf


@dataclass(frozen=True, eq=False)
class Tools:
    """What all phases of a run share. `on_step(step, num_steps)` is for a progress bar."""

    model: QatModel
    settings: QatSettings
    teacher: Teacher | None
    ranks: Ranks
    metrics: Metrics
    identity: Mapping[str, Any]
    on_step: Callable[[int, int], None]


@dataclass(frozen=True)
class Done:
    result: TrainResult
    num_steps: int
    held: Held | None
    """Of the parameters that the phase ends with: the best measured, or the last."""


def run_phase(phase: Phase, tools: Tools) -> Done:
    """Raises DivergedError, TrainingError."""
    settings = tools.settings
    steps = phase_steps(phase, settings)
    objective = Objective(settings.entropy_weight, settings.distillation if tools.teacher else 0.0)
    trainer = Trainer(tools.model, objective, tools.teacher, tools.ranks)
    held_out = packed_held_out(phase.held_out, settings)
    log = _Log(phase, tools, trainer, steps.num_steps)
    result = train(
        trainer,
        lambda step: [Stepped(one, _share(settings, step, steps.num_steps)) for one in steps(step)],
        train_settings(settings, steps.num_steps, phase.rate_factor, has_held_out=bool(held_out)),
        phase.folder,
        identity={**tools.identity, "stage": phase.name, "examples": len(phase.examples), "held_out": len(held_out)},
        evaluate=(lambda: log.measure(held_out)) if held_out else None,
        ranks=tools.ranks,
        on_step=log.step,
        adamw_names=VOCABULARY_TENSORS,
        rates=dict.fromkeys(circuit_names() if settings.induction else (), settings.induction_rate),
        has_loss_scale=tools.model.dtype == torch.float16,
        is_complete=log.is_complete,
    )
    tools.model.weights.share = 1.0
    return Done(result, steps.num_steps, log.measures.get(result.progress.best_step or 0))


def phase_steps(phase: Phase, settings: QatSettings) -> Steps:
    return Steps(
        phase.examples,
        seed=settings.seed,
        epochs=settings.epochs,
        micro_batch_tokens=settings.micro_batch_tokens,
        tokens_per_step=settings.tokens_per_step,
        max_steps=phase.max_steps or settings.max_steps,
        window=PACKED_TOGETHER,
    )


def packed_held_out(examples: Sequence[Example], settings: QatSettings) -> list[Packed]:
    chosen = examples[:: max(1, math.ceil(len(examples) / settings.max_held_out))]
    if not chosen:
        return []
    longest = max(settings.micro_batch_tokens, *(len(one.token_ids) for one in chosen))
    return pack(chosen, longest, seed=settings.seed, epoch=0)


def train_settings(settings: QatSettings, num_steps: int, rate_factor: float, *, has_held_out: bool) -> TrainSettings:
    return TrainSettings(
        num_steps=num_steps,
        learning_rate=settings.learning_rate * rate_factor,
        optimizer=settings.optimizer,
        schedule=settings.schedule,
        warmup_share=settings.warmup_share,
        decay_share=settings.decay_share,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        eval_every=settings.evaluate_every if has_held_out else 0,
        patience=settings.patience or 0 if has_held_out else 0,
        checkpoint_every=settings.checkpoint_every,
        seed=settings.seed,
    )


def _share(settings: QatSettings, step: int, num_steps: int) -> float:
    """Of ternary weights in step 0, 1, ...: a straight line over the first `ternary_after` of the steps."""
    rising = settings.ternary_after * num_steps
    return 1.0 if step >= rising else step / rising


class _Log:
    """Counts since the last line, and the held-out measures by step: of a resumed phase what its log says."""

    def __init__(self, phase: Phase, tools: Tools, trainer: Trainer, num_steps: int) -> None:
        self._phase, self._tools, self._trainer, self._num_steps = phase, tools, trainer, num_steps
        self.measures = {
            one.step: Held(one.held_out_loss, 0.0, one.held_out_accuracy or 0.0)
            for one in tools.metrics.lines()
            if one.stage == phase.name and one.held_out_loss is not None
        }
        self._held: Held | None = None
        self._tokens, self._seconds = 0, 0.0

    def measure(self, held_out: Sequence[Packed]) -> float:
        self._held = self._trainer.measure(held_out)
        best = min((held.loss for held in self.measures.values()), default=math.inf)
        if self._held.loss > self._phase.max_rise * max(best, 1.0):
            raise DivergedError(f"the held-out loss is {self._held.loss:.4g}, it was {best:.4g}")
        return self._held.loss

    def is_complete(self, step: int) -> bool:
        """After `step` steps: by the last measure until then."""
        measured = [at for at in self.measures if at <= step]
        return bool(measured) and self._phase.is_complete(self.measures[max(measured)])

    def step(self, log: StepLog) -> None:
        self._tokens += log.num_tokens
        self._seconds += log.num_tokens / log.tokens_per_second
        self._tools.on_step(log.step, self._num_steps)
        held, self._held = self._held, None
        if held is None and log.step % self._tools.settings.log_every and log.step != self._num_steps:
            return
        line = Line(
            step=log.step,
            loss=log.loss,
            learning_rate=log.learning_rate,
            grad_norm=log.grad_norm,
            num_tokens=self._tokens,
            tokens_per_second=self._tokens / self._seconds,
            entropy=self._trainer.take_entropy(),
            share=_share(self._tools.settings, log.step - 1, self._num_steps),
            stage=self._phase.name,
        )
        if held is not None:
            self.measures[log.step] = held
            line = replace(line, held_out_loss=held.loss, held_out_accuracy=held.accuracy)
        self._tokens, self._seconds = 0, 0.0
        if self._tools.ranks.rank == 0:
            self._tools.metrics.add(line, self._num_steps)
