"""The training of a round: a snapshot in, a PEFT directory out, resumed from its checkpoints after a kill.

The model is the served file with LoRA on it; a warm start takes rank, scale and values from the parent version. What
is trained, in which order and with which random numbers follows from the snapshot and the round's settings alone.
Imports torch. Not here: the loop (finetune/train), the model (finetune/model), what is learned from (finetune/dataset).
"""

import io
import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from finetune.config import FinetuneSettings
from finetune.dataset.examples import snapshot_examples
from finetune.dataset.snapshot import Snapshot
from finetune.dataset.token_classes import ClassWeights
from finetune.model.lora import LoraSpec
from finetune.model.model import TrainModel
from finetune.model.peft import CONFIG_NAME, TENSORS_NAME, export_peft, import_peft
from finetune.packed import Packed
from finetune.rounds.engine import Done, Task
from finetune.rounds.errors import RoundError
from finetune.rounds.steps import Steps
from finetune.rounds.weights import PEFT, Parent
from finetune.train.loop import StepLog, train
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
    spec = LoraSpec(rank=own.rank, alpha=own.alpha, dropout=own.dropout, use_rslora=own.rslora)
    if parent is not None:
        spec = _unpack(parent, task.folder / PARENT)
    trained = TrainModel.open(model, spec, checkpointing=own.checkpointing, seed=own.seed)
    try:
        if trained.base_digest() != task.round.base_digest:
            raise RoundError(f"the base changed: {model} is {trained.base_digest()}, the round began with another")
        if parent is not None:
            import_peft(trained, task.folder / PARENT)
        steps = Steps(
            list(snapshot_examples(snapshot, _class_weights(own))),
            seed=own.seed,
            epochs=own.epochs,
            micro_batch_tokens=own.micro_batch_tokens,
            tokens_per_step=own.tokens_per_step,
            max_steps=own.max_steps,
            is_curriculum=own.curriculum,
        )
        settings = TrainSettings(
            num_steps=steps.num_steps,
            learning_rate=own.learning_rate,
            optimizer=own.optimizer,
            schedule=own.schedule,
            checkpoint_every=own.checkpoint_every,
            seed=own.seed,
        )
        losses = task.folder / LOSSES

        def on_step(log: StepLog) -> None:
            with losses.open("a") as file:
                file.write(json.dumps([log.step, log.loss]) + "\n")
            task.progress(
                log.step,
                steps.num_steps,
                loss=log.loss,
                learning_rate=log.learning_rate,
                grad_norm=log.grad_norm,
                num_tokens=log.num_tokens,
                tokens_per_second=log.tokens_per_second,
            )

        result = train(
            _Adapter(trained),
            lambda step: [_Keyed(one, own.seed + 1_000_003 * step + place) for place, one in enumerate(steps(step))],
            settings,
            task.folder / "checkpoints",
            identity={
                "snapshot": snapshot.digest,
                "base": task.round.base_digest,
                "lora": _plain(spec),
                "parent": None if parent is None else parent.name,
            },
            pause=pause,
            on_step=on_step,
        )
        _write_peft(trained, task.folder / PEFT)
    finally:
        trained.close()
    curve = _curve(losses)
    return Done(
        {
            "num_steps": result.progress.step,
            "num_tokens": result.progress.num_tokens,
            "first_loss": curve[0][1],
            "last_loss": curve[-1][1],
            "losses": curve[:: -(-len(curve) // NUM_POINTS)],
            "is_exact": result.is_exact,
        }
    )


@dataclass(frozen=True, slots=True)
class _Keyed:
    """A micro-batch, and what its dropout is drawn from."""

    packed: Packed
    key: int


class _Adapter:
    """What the loop trains."""

    def __init__(self, model: TrainModel) -> None:
        self._model = model

    def parameters(self) -> dict[str, Tensor]:
        return self._model.parameters()

    def weight_of(self, batch: _Keyed) -> float:
        return float(batch.packed.loss_weights.sum(dtype="float64"))

    def tokens_of(self, batch: _Keyed) -> int:
        return batch.packed.num_real_tokens

    def backward(self, batch: _Keyed, normalizer: float) -> float:
        loss = self._model.loss(batch.packed, normalizer, dropout_seed=batch.key)
        loss.backward()
        return loss.ce_sum / normalizer


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


def _curve(path: Path) -> list[list[float]]:
    """(step, loss): of a step that a resumed run did again, the last line; both are the same."""
    steps: dict[int, float] = {}
    for line in path.read_bytes().rpartition(b"\n")[0].splitlines():
        step, loss = json.loads(line)
        steps[step] = loss
    return [[step, steps[step]] for step in sorted(steps)]


def _unpack(parent: Parent, folder: Path) -> LoraSpec:
    """Its rank and scales. Raises RoundError."""
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(io.BytesIO(parent.archive)) as archive:
        for name in (CONFIG_NAME, TENSORS_NAME):
            (folder / name).write_bytes(archive.read(name))
    config = json.loads((folder / CONFIG_NAME).read_bytes())
    try:
        return LoraSpec(
            rank=config["r"],
            alpha=float(config["lora_alpha"]),
            use_rslora=bool(config.get("use_rslora")),
            targets=tuple(sorted(config["target_modules"])),
            rank_pattern=config.get("rank_pattern") or {},
            alpha_pattern=config.get("alpha_pattern") or {},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise RoundError(f"a round cannot begin with {parent.name}: {error}") from error


def _plain(spec: LoraSpec) -> dict[str, Any]:
    return asdict(replace(spec, rank_pattern=dict(spec.rank_pattern), alpha_pattern=dict(spec.alpha_pattern)))
