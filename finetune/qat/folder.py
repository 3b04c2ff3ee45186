"""The folder of a run: its files, what run they are of, and files that are whole or not there.

    OUT/vocabulary.json    of a model from scratch       OUT/metrics.jsonl   the log as numbers
    OUT/tokens-*.npz       rendered examples             OUT/curve.svg       the learning curve
    OUT/checkpoints/       to go on from                 OUT/model.gguf      what is served
    OUT/run.json           settings and digests that a call which goes on must have in common

Not here: checkpoints (finetune/train/checkpoint.py), what is in the log (metrics.py).
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune.errors import TrainingError
from finetune.train.checkpoint import sync
from finetune.train.ranks import Ranks

MODEL, CURVE, METRICS, VOCABULARY = "model.gguf", "curve.svg", "metrics.jsonl", "vocabulary.json"
CHECKPOINTS, RUN = "checkpoints", "run.json"


def make_folder(out: Path) -> None:
    """Raises TrainingError."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"{out} cannot be the folder of a run: {error.strerror}") from error


def has_checkpoint(out: Path) -> bool:
    """Whether a run has come far enough to go on from its own weights."""
    return any((out / CHECKPOINTS).glob("**/*.safetensors"))


def check_run(out: Path, identity: Mapping[str, Any], ranks: Ranks) -> None:
    """Keeps what the run is of, or compares. A log without checkpoints is of no run that goes on, and is removed.

    Raises TrainingError for another run's folder.
    """
    kept, ours = out / RUN, json.loads(json.dumps(identity))
    theirs = _identity(kept) if kept.exists() else None
    if theirs is not None and theirs != ours:
        changed = sorted(key for key in ours | theirs if ours.get(key) != theirs.get(key))
        raise TrainingError(
            f"{out} holds another run ({', '.join(changed)} differ); use another folder, or remove it to begin anew"
        )
    ranks.sum_number(0.0)  # nobody writes before all have looked, and nobody goes on before it is written
    if ranks.rank == 0 and not has_checkpoint(out):
        (out / METRICS).unlink(missing_ok=True)
        with whole(kept) as beside:
            beside.write_text(json.dumps(ours, indent=2) + "\n")
    ranks.sum_number(0.0)


def _identity(kept: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(kept.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise TrainingError(f"{kept} cannot be read ({error!r}); remove its folder to begin anew") from error


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """A path beside, which becomes the target when all is well."""
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        yield beside
        sync(beside)
        beside.replace(target)
        sync(target.parent)
    finally:
        beside.unlink(missing_ok=True)
