"""The training of a round: a snapshot in, a PEFT directory out, resumed from its checkpoints after a kill.

The model is the served file with LoRA on it; a warm start takes rank, scale and values from the parent version. What
is trained, in which order and with which random numbers follows from the snapshot and the round's settings alone.
Imports torch. Not here: the loop (finetune/train), the model (finetune/model), what is learned from (finetune/dataset).
"""

import io
import json
import shutil
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from finetune.config import FinetuneSettings
from finetune.dataset.examples import Lessons, snapshot_lessons
from finetune.dataset.packing import pack
from finetune.dataset.snapshot import Snapshot
from finetune.dataset.token_classes import ClassWeights
from finetune.model.answer_losses import AnswerLosses
from finetune.model.lora import LoraSpec
from finetune.model.model import TrainModel
from finetune.model.peft import CONFIG_NAME, TENSORS_NAME, export_peft, import_peft
from finetune.packed import Packed
from finetune.rounds.adapter import NUM_SIDES, Adapter, Batch, Keyed, side_by_side, validation_loss
from finetune.rounds.engine import Done, Task
from finetune.rounds.errors import RoundError
from finetune.rounds.references import reference_margins
from finetune.rounds.steps import LAYOUT, Steps
from finetune.rounds.validation import split_validation
from finetune.rounds.weights import PEFT, Parent
from finetune.train.loop import StepLog, TrainResult, train
from finetune.train.settings import TrainSettings

PARENT = "parent"
LOSSES = "losses.jsonl"
NUM_POINTS = 200
"""Of the loss curve that a round's row keeps."""


def run_training(
    task: Task,
    snapshot: Snapshot,
    model: Path,
    own: FinetuneSettings,
    *,
    parent: Parent | None,
    pause: Callable[[], None],
) -> Done:
    """Raises DivergedError, TrainingError, RoundError, ModelFileError."""
    spec = lora_spec(own) if parent is None else _unpack(parent, task.folder / PARENT, own.dropout)
    trained = open_model(model, spec, own)
    try:
        if trained.base_digest() != task.round.base_digest:
            raise RoundError(f"the base changed: {model} is {trained.base_digest()}, the round began with another")
        if parent is not None:
            import_peft(trained, task.folder / PARENT)
        trained.answer_losses = answer_losses(own)
        lessons, validated = round_lessons(snapshot, own)
        references = reference_margins(
            trained, lessons.pairs, task.folder, micro_batch_tokens=own.micro_batch_tokens, pause=pause
        )
        steps = round_steps(lessons, references, own)
        losses = task.folder / LOSSES
        _cut_torn_line(losses)

        def on_step(log: StepLog) -> None:
            with losses.open("a") as file:
                file.write(json.dumps([log.step, log.loss, log.validation_loss]) + "\n")
            measured = {} if log.validation_loss is None else {"validation_loss": log.validation_loss}
            task.progress(
                log.step,
                steps.num_steps,
                loss=log.loss,
                learning_rate=log.learning_rate,
                grad_norm=log.grad_norm,
                num_tokens=log.num_tokens,
                tokens_per_second=log.tokens_per_second,
                **measured,
            )

        result = train(
            Adapter(trained),
            lambda step: micro_batches(steps(step), own, step),
            train_settings(own, steps.num_steps),
            task.folder / "checkpoints",
            identity={
                "snapshot": snapshot.digest,
                "base": task.round.base_digest,
                "steps": LAYOUT,
                "lora": _plain(spec),
                "parent": None if parent is None else parent.name,
                "validation": [one.num_real_tokens for one in validated],
                "losses": asdict(trained.answer_losses),
            },
            evaluate=(lambda: validation_loss(trained, validated, pause)) if validated else None,
            pause=pause,
            on_step=on_step,
        )
        _write_peft(trained, task.folder / PEFT)
    finally:
        trained.close()
    return Done(_facts(result, _logged(losses), lessons, validated))


def _facts(
    result: TrainResult, logged: Sequence[tuple[int, float, float | None]], lessons: Lessons, validated: list[Packed]
) -> dict[str, Any]:
    """What the round's row keeps of its training."""
    curve = [[step, loss] for step, loss, _ in logged]
    facts = {
        "num_steps": result.progress.step,
        "num_tokens": result.progress.num_tokens,
        "first_loss": curve[0][1],
        "last_loss": curve[-1][1],
        "losses": curve[:: -(-len(curve) // NUM_POINTS)],
        "is_exact": result.is_exact,
    }
    if lessons.pairs:
        facts["num_pairs"] = len(lessons.pairs)
    if validated:
        facts["validation"] = {
            "num_examples": sum(one.num_examples for one in validated),
            "losses": [[step, loss] for step, _, loss in logged if loss is not None],
            "best_step": result.progress.best_step,
            "best_loss": result.progress.best_loss,
            "stopped_early": result.stopped_early,
        }
    return facts


def round_lessons(snapshot: Snapshot, own: FinetuneSettings) -> tuple[Lessons, list[Packed]]:
    """What is trained on, and the micro-batches that are validated on. Raises RoundError."""
    lessons = snapshot_lessons(
        snapshot, _class_weights(own), with_pairs=bool(own.dpo_weight), with_distrust=own.distrust
    )
    if own.evaluate_every is None:
        return lessons, []
    train, validated = split_validation(
        [*lessons.examples, *(pair.chosen for pair in lessons.pairs)],
        share=own.validation_share,
        evaluate_every=own.evaluate_every,
        tokens_per_step=own.tokens_per_step,
        seed=own.seed,
    )
    kept = {one.id for one in train}
    lessons = Lessons(
        [one for one in lessons.examples if one.id in kept], [one for one in lessons.pairs if one.chosen.id in kept]
    )
    longest = max(own.micro_batch_tokens, *(len(one.token_ids) for one in validated))
    return lessons, pack(validated, longest, seed=own.seed, epoch=0)


def lora_spec(own: FinetuneSettings) -> LoraSpec:
    pairs = (one.split("=") for one in own.ranks.split(",")) if own.ranks else ()
    return LoraSpec(
        rank=own.rank,
        alpha=own.alpha,
        dropout=own.dropout,
        use_rslora=own.rslora,
        rank_pattern={projection: int(rank) for projection, rank in pairs},
    )


def open_model(path: Path, spec: LoraSpec, own: FinetuneSettings) -> TrainModel:
    return TrainModel.open(path, spec, checkpointing=own.checkpointing, upcast=own.upcast, seed=own.seed)


def answer_losses(own: FinetuneSettings) -> AnswerLosses:
    return AnswerLosses(own.dpo_weight, own.dpo_beta, own.sequence_weight, own.call_head_weight)


def round_steps(lessons: Lessons, references: Mapping[str, float], own: FinetuneSettings) -> Steps:
    return Steps(
        lessons.examples,
        pairs=lessons.pairs,
        references=references,
        seed=own.seed,
        epochs=own.epochs,
        micro_batch_tokens=max(1, own.micro_batch_tokens // NUM_SIDES),
        tokens_per_step=own.tokens_per_step,
        max_steps=own.max_steps,
        is_curriculum=own.curriculum,
        num_sides=NUM_SIDES,
    )


def micro_batches(parts: Sequence[Packed], own: FinetuneSettings, step: int) -> list[Batch]:
    keyed = [Keyed(one, own.seed + 1_000_003 * step + place) for place, one in enumerate(parts)]
    return side_by_side(keyed, own.micro_batch_tokens)


def train_settings(own: FinetuneSettings, num_steps: int) -> TrainSettings:
    return TrainSettings(
        num_steps=num_steps,
        learning_rate=own.learning_rate,
        optimizer=own.optimizer,
        schedule=own.schedule,
        checkpoint_every=own.checkpoint_every,
        eval_every=own.evaluate_every or 0,
        patience=own.patience or 0,
        seed=own.seed,
    )


def _class_weights(own: FinetuneSettings) -> ClassWeights:
    return ClassWeights(
        structure=own.structure_weight,
        answer=own.answer_weight,
        thinking=own.thinking_weight,
        argument_key=own.argument_key_weight,
        argument_value=own.argument_value_weight,
        tool_name=own.tool_name_weight,
    )


def _write_peft(model: TrainModel, target: Path) -> None:
    """Whole or not there."""
    new = target.with_suffix(".new")
    for folder in (new, target):
        if folder.exists():
            shutil.rmtree(folder)
    new.mkdir()
    export_peft(model, new)
    new.rename(target)


def _cut_torn_line(path: Path) -> None:
    """What a kill in the middle of a write left; the step comes again."""
    if path.exists():
        whole, newline, _ = path.read_bytes().rpartition(b"\n")
        with path.open("r+b") as file:
            file.truncate(len(whole) + len(newline))


def _logged(path: Path) -> list[tuple[int, float, float | None]]:
    """(step, loss, validation loss): of a step that a resumed run did again, the last line; both are the same."""
    steps: dict[int, tuple[int, float, float | None]] = {}
    for line in path.read_bytes().splitlines():
        step, loss, validation = json.loads(line)
        steps[step] = (step, loss, validation)
    return [steps[step] for step in sorted(steps)]


def _unpack(parent: Parent, folder: Path, dropout: float) -> LoraSpec:
    """Its ranks and scales. Raises RoundError."""
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(io.BytesIO(parent.archive)) as archive:
        for name in (CONFIG_NAME, TENSORS_NAME):
            (folder / name).write_bytes(archive.read(name))
    config = json.loads((folder / CONFIG_NAME).read_bytes())
    try:
        return LoraSpec(
            rank=config["r"],
            alpha=float(config["lora_alpha"]),
            dropout=dropout,
            use_rslora=bool(config.get("use_rslora")),
            targets=tuple(sorted(config["target_modules"])),
            rank_pattern=config.get("rank_pattern") or {},
            alpha_pattern=config.get("alpha_pattern") or {},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise RoundError(f"a round cannot begin with {parent.name}: {error}") from error


def _plain(spec: LoraSpec) -> dict[str, Any]:
    return asdict(replace(spec, rank_pattern=dict(spec.rank_pattern), alpha_pattern=dict(spec.alpha_pattern)))
