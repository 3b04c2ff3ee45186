"""Checkpoints of a run: parameters, optimizer and counters in one directory that is whole or not there.

    <run>/step-00000040/{parameters,optimizer}.safetensors, state.json
    <run>/best-00000040/...   the parameters with the lowest validation loss

Written beside and renamed, so that a kill at any instruction leaves the one before. The newest two are kept. Random
numbers are keyed by (seed, step, example), so no generator's state is stored. Safetensors and JSON only.
"""

import json
import os
import platform
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune.errors import TrainingError

NUM_KEPT = 2
"""The newest, and the one before for people who want to look."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What bit-identical results depend on besides the program."""

    torch: str
    num_threads: int
    cpu: str
    num_processes: int = 1

    @classmethod
    def here(cls) -> "Machine":
        cpu = torch.backends.cpu.get_cpu_capability() + platform.machine()
        num_processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        return cls(torch.__version__, torch.get_num_threads(), cpu, num_processes)


@dataclass(frozen=True, slots=True)
class Progress:
    """The counters of a run after `step` optimizer steps."""

    step: int = 0
    num_tokens: int = 0
    """Real example tokens so far."""
    best_loss: float | None = None
    best_step: int | None = None
    num_worse: int = 0
    """Evaluations since the best one."""
    first_loss: float | None = None
    is_exact: bool = True
    """Never resumed on another machine class, torch build or thread count."""
    loss_scale: float = 1.0
    """Of float16 (scaling.py)"""
    num_good: int = 0
    """Steps since the scale changed."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    progress: Progress
    parameters: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    machine: Machine


class Checkpoints:
    """Those of one run. `identity`: what must be the same for a resumed run (settings, data, base)."""

    def __init__(self, directory: Path, identity: Mapping[str, Any]) -> None:
        self._directory = directory
        self._identity = json.loads(json.dumps(identity))
        directory.mkdir(parents=True, exist_ok=True)

    def save(self, progress: Progress, parameters: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> Path:
        """Replaces one of the same step."""
        target = self._directory / f"step-{progress.step:08d}"
        self._write(target, progress, {"parameters": parameters, "optimizer": optimizer})
        worse = [path for path in self._directory.glob("best-*") if path != self._best(progress.best_step or 0)]
        for old in [*self._steps()[:-NUM_KEPT], *worse]:
            shutil.rmtree(old)
        return target

    def save_best(self, progress: Progress, parameters: Mapping[str, Tensor]) -> None:
        """The one before is removed when the next checkpoint knows of this one."""
        self._write(self._best(progress.step), progress, {"parameters": parameters})

    def load_best(self, step: int) -> dict[str, Tensor]:
        """Raises TrainingError."""
        return read_tensors(self._best(step) / "parameters.safetensors")

    def newest(self) -> Checkpoint | None:
        """None: the run has not come far enough to have one. Raises TrainingError for one of another run."""
        for leftover in self._directory.glob(".writing-*"):
            shutil.rmtree(leftover)
        steps = self._steps()
        if not steps:
            return None
        path = steps[-1]
        identity, progress, machine = _state(path / "state.json")
        if identity != self._identity:
            changed = [key for key in self._identity if identity.get(key) != self._identity[key]]
            raise TrainingError(
                f"{path} is a checkpoint of another run ({', '.join(changed) or 'more settings'} differ); "
                "use another directory, or remove it to begin anew"
            )
        return Checkpoint(
            progress,
            read_tensors(path / "parameters.safetensors"),
            read_tensors(path / "optimizer.safetensors"),
            machine,
        )

    def _best(self, step: int) -> Path:
        return self._directory / f"best-{step:08d}"

    def _steps(self) -> list[Path]:
        """Oldest first."""
        return sorted(self._directory.glob("step-*"))

    def _write(self, target: Path, progress: Progress, files: Mapping[str, Mapping[str, Tensor]]) -> None:
        beside = self._directory / f".writing-{uuid.uuid4().hex}"
        beside.mkdir()
        for name, tensors in files.items():
            save_file(
                {key: value.detach().contiguous() for key, value in tensors.items()}, beside / f"{name}.safetensors"
            )
        state = {"identity": self._identity, "progress": asdict(progress), "machine": asdict(Machine.here())}
        (beside / "state.json").write_text(json.dumps(state, indent=2) + "\n")
        for path in (*beside.iterdir(), beside):
            sync(path)
        if target.exists():  # made again after a kill, or by a run that was told to begin anew
            shutil.rmtree(target)
        beside.rename(target)
        sync(self._directory)


def read_newest(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Identity and parameters of a run's newest checkpoint, whatever run it is. Raises TrainingError."""
    steps = sorted(directory.glob("step-*"))
    if not steps:
        raise TrainingError(f"{directory} has no checkpoint to begin with")
    return _state(steps[-1] / "state.json")[0], read_tensors(steps[-1] / "parameters.safetensors")


def _state(path: Path) -> tuple[dict[str, Any], Progress, Machine]:
    try:
        state = json.loads(path.read_text())
        return state["identity"], Progress(**state["progress"]), Machine(**state["machine"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(
            f"the checkpoint {path} cannot be read ({error!r}); remove its directory to go on from the one before"
        ) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Raises TrainingError."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"the checkpoint {path} cannot be read ({error}); remove its directory to go on from the one before"
        ) from error


def sync(path: Path) -> None:
    """A file or a directory, to the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
