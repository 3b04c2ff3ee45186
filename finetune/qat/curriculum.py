"""Training in four stages from easy to hard: foundation, application, integration, mastery.

A stage trains on the examples up to a quantile of their difficulty and is measured on the held-out ones up to the same
score. It is complete when they are good enough (accuracy and loss), or its share of the steps is over. The next one is
entered when its own held-out examples are not hopeless yet; otherwise the one before is trained once more. A stage
that diverges (no number, a runaway loss, a held-out loss far above its best) goes back to its best checkpoint, or to
where it began, and tries again at half the rate. What is over is kept in `stages.json`, so that a killed run goes on in
its stage. Thresholds are choices; each stage's measures are in the log and the picture.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from finetune.errors import DivergedError, TrainingError
from finetune.packed import Example
from finetune.qat.data import Lessons
from finetune.qat.folder import whole
from finetune.qat.phase import Done, Phase, Tools, packed_held_out, phase_steps, run_phase
from finetune.qat.source import take_parameters
from finetune.qat.trainer import Held, Trainer
from finetune.train.checkpoint import read_tensors

MAX_ATTEMPTS = 3
RATE_AFTER_DIVERGING = 0.5
KEPT = "stages.json"
_FINAL = "final.safetensors"


@dataclass(frozen=True, slots=True)
class Stage:
    """`quantile`: of the difficulty, up to which it trains; `share`: of the run's steps, at most."""

    name: str
    quantile: float
    share: float
    min_entry_accuracy: float
    min_accuracy: float
    max_loss: float

    def is_complete(self, held: Held) -> bool:
        return held.accuracy >= self.min_accuracy and held.loss <= self.max_loss


STAGES = (
    Stage("foundation", 0.25, 0.20, 0.0, 0.95, 0.25),
    Stage("application", 0.50, 0.25, 0.3, 0.96, 0.20),
    Stage("integration", 0.75, 0.25, 0.4, 0.97, 0.15),
    Stage("mastery", 1.00, 0.30, 0.5, 0.995, 0.02),
)


def run_curriculum(lessons: Lessons, folder: Path, tools: Tools, stages: Sequence[Stage] = STAGES) -> dict[str, Any]:
    """The facts of all stages; the model has the last one's parameters. Raises DivergedError, TrainingError."""
    total = phase_steps(Phase(folder, lessons.examples, []), tools.settings).num_steps
    facts: list[dict[str, Any]] = []
    for number, stage in enumerate(stages):
        phase = _phase(stage, lessons, folder, total)
        before = stages[number - 1]
        again = folder / f"{before.name}-again"
        if number and (_any(tools, again.exists()) or not _may_enter(stage, phase, tools)):
            once_more = replace(_phase(before, lessons, folder, total), name=f"{before.name} again", folder=again)
            facts.append(_run(once_more, before, tools))
        facts.append(_run(phase, stage, tools))
    return {
        "stages": facts,
        "num_steps": sum(one["num_steps"] for one in facts),
        "held_out": facts[-1]["held_out"],
        "is_exact": all(one["is_exact"] for one in facts),
    }


def _phase(stage: Stage, lessons: Lessons, folder: Path, total: int) -> Phase:
    ranked = sorted(lessons.difficulty)
    limit = ranked[max(0, round(stage.quantile * len(ranked)) - 1)]
    held_out = _up_to(limit, lessons.held_out, lessons.held_out_difficulty)
    return Phase(
        folder / stage.name,
        _up_to(limit, lessons.examples, lessons.difficulty),
        held_out or lessons.held_out,
        name=stage.name,
        max_steps=max(1, round(stage.share * total)),
        is_complete=stage.is_complete,
        max_rise=2.0,
    )


def _up_to(limit: float, examples: Sequence[Example], difficulty: Sequence[float]) -> list[Example]:
    return [one for one, score in zip(examples, difficulty, strict=True) if score <= limit]


def _may_enter(stage: Stage, phase: Phase, tools: Tools) -> bool:
    """By the parameters that the stage before has left; a stage that has begun was entered."""
    held_out = packed_held_out(phase.held_out, tools.settings)
    if not held_out or _any(tools, phase.folder.exists()):
        return True
    held = Trainer(tools.model).measure(held_out)
    return held.accuracy >= stage.min_entry_accuracy


def _run(phase: Phase, stage: Stage, tools: Tools) -> dict[str, Any]:
    """One stage with its attempts, or what it left when it is over already."""
    phase.folder.mkdir(parents=True, exist_ok=True)
    kept = phase.folder / KEPT
    state = _state(kept) if kept.exists() else {"diverged": []}
    if "facts" in state:
        take_parameters(tools.model.parameters(), read_tensors(phase.folder / _FINAL))
        return dict(state["facts"])
    while (attempt := len(state["diverged"]) + 1) <= MAX_ATTEMPTS:
        _begin_attempt(phase.folder, attempt, tools)
        trying = replace(
            phase,
            folder=phase.folder / f"attempt-{attempt}",
            name=phase.name if attempt == 1 else f"{phase.name} {attempt}",
            rate_factor=RATE_AFTER_DIVERGING ** (attempt - 1),
        )
        try:
            done = run_phase(trying, tools)
        except DivergedError as error:
            state["diverged"].append(str(error))
            _keep(kept, state, tools)
            continue
        state["facts"] = _facts(phase, stage, done, state["diverged"])
        _save(phase.folder / _FINAL, tools)
        _keep(kept, state, tools)
        return dict(state["facts"])
    raise DivergedError(
        f"{phase.name} diverged {MAX_ATTEMPTS} times, at last: {state['diverged'][-1]}; lower the learning rate and use"
        " another folder"
    )


def _state(kept: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads(kept.read_text())
        _ = len(state["diverged"])
        return state
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{kept} cannot be read ({error!r}); remove its directory to do the stage again") from error


def _begin_attempt(folder: Path, attempt: int, tools: Tools) -> None:
    """The parameters that an attempt begins with: kept, so that a resumed run knows them too."""
    begin = folder / f"begin-{attempt}.safetensors"
    if not _any(tools, begin.exists()):
        best = sorted((folder / f"attempt-{attempt - 1}").glob("best-*/parameters.safetensors"))
        if best:
            take_parameters(tools.model.parameters(), read_tensors(best[-1]))
        elif attempt > 1:
            take_parameters(tools.model.parameters(), read_tensors(folder / f"begin-{attempt - 1}.safetensors"))
        _save(begin, tools)
    take_parameters(tools.model.parameters(), read_tensors(begin))


def _facts(phase: Phase, stage: Stage, done: Done, diverged: Sequence[str]) -> dict[str, Any]:
    return {
        "stage": phase.name,
        "num_examples": len(phase.examples),
        "num_steps": done.result.progress.step,
        "is_complete": done.held is not None and stage.is_complete(done.held),
        "held_out": None if done.held is None else {"loss": done.held.loss, "accuracy": done.held.accuracy},
        "diverged": list(diverged),
        "is_exact": done.result.is_exact,
        "conditions": asdict(stage),
    }


def _save(target: Path, tools: Tools) -> None:
    if tools.ranks.rank == 0:
        values = {name: tensor.detach().cpu().contiguous() for name, tensor in tools.model.parameters().items()}
        with whole(target) as beside:
            save_file(values, beside)
    tools.ranks.sum_number(0.0)  # the others wait until it is there


def _any(tools: Tools, flag: bool) -> bool:
    """Whether it is so for any rank; all go on together."""
    return tools.ranks.sum_number(float(flag)) > 0


def _keep(target: Path, state: dict[str, Any], tools: Tools) -> None:
    if tools.ranks.rank:
        return
    with whole(target) as beside:
        beside.write_text(json.dumps(state, indent=2) + "\n")
