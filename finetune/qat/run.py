"""A whole run: data, vocabulary, model, training, the exported file and its learning curve, in one folder (folder.py).

Whatever is there already is gone on from: a second call of a finished run only writes the file again. Not here: the
command line (server/commands/train.py), the loop (finetune/train), one stretch of training (phase.py).
"""

import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from finetune.dataset.dialogues.vocabulary import SmallVocabulary, train_vocabulary
from finetune.dataset.render import Renderer
from finetune.errors import TrainingError
from finetune.model.allocator import keep_freed_memory
from finetune.qat.config import QatSettings
from finetune.qat.copying import copying_examples, plain_tokens
from finetune.qat.curriculum import run_curriculum
from finetune.qat.data import Lessons, Source, read_lessons, with_answer_weight
from finetune.qat.export import check_matrix_type, export_gguf
from finetune.qat.folder import (
    CHECKPOINTS,
    CURVE,
    METRICS,
    MODEL,
    VOCABULARY,
    check_run,
    has_checkpoint,
    make_folder,
    whole,
)
from finetune.qat.induction import begin_with_induction
from finetune.qat.memory import MemoryPlan, plan_memory
from finetune.qat.metrics import Metrics
from finetune.qat.model import QatModel
from finetune.qat.phase import Phase, Tools, phase_steps, run_phase
from finetune.qat.picture import picture
from finetune.qat.shape import Shape
from finetune.qat.source import (
    FileTeacher,
    base_parameters,
    base_shape,
    made_shape,
    run_parameters,
    take_parameters,
    tokenizer_metadata,
)
from finetune.train.ranks import Ranks, joined, local_processes
from quant.formats import GGMLType
from quant.model_file import open_model
from server.machine import peak_bytes, physical_cores


@dataclass(frozen=True)
class Console:
    """Where a run tells how it goes. `status` replaces itself, `say` stays; `on_step(step, num_steps)`."""

    say: Callable[[str], None]
    status: Callable[[str], None]
    on_step: Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class _Begin:
    """What a run begins with: shape, tokenizer, and its base's weights where it has one."""

    shape: Shape
    metadata: dict[str, Any]
    renderer: Renderer
    parameters: dict[str, torch.Tensor] | None
    base_digest: str | None


def run(data: Path, out: Path, settings: QatSettings, console: Console) -> dict[str, Any]:
    """Train what `settings` say on `data`; the facts of the finished run. Raises FinetuneError, ModelFileError."""
    source = Source(data)
    make_folder(out)
    torch.set_num_threads(settings.threads or max(1, physical_cores() // local_processes()))
    keep_freed_memory()
    if settings.device != "cpu" and not torch.cuda.is_available():
        raise TrainingError(f"device {settings.device}: torch finds no GPU here; leave it out to train on the CPU")
    with joined() as ranks:
        console.status("reading the dialogues")
        begin = _begin(source, out, settings)
        kind = check_matrix_type(begin.shape, GGMLType[settings.type.upper()] if settings.type else None)
        limit = min(begin.shape.context_length, settings.micro_batch_tokens)
        lessons = with_answer_weight(read_lessons(source, begin.renderer, out, limit), settings.answer_weight)
        lessons = _with_copying(lessons, begin, settings)
        model = QatModel(begin.shape, dtype=_dtype(settings), device=settings.device, seed=settings.seed)
        if settings.induction:
            begin_with_induction(begin.shape, model.parameters(), seed=settings.seed)
        if settings.weights_from is not None and not has_checkpoint(out):
            take_parameters(model.parameters(), run_parameters(settings.weights_from, begin.shape))
        if begin.parameters is not None:
            take_parameters(model.parameters(), begin.parameters)
        console.status("")
        plan = _plan(model, lessons, settings)
        if ranks.rank == 0:
            console.say(_opening(model, lessons, plan))
        tools = _tools(model, out, settings, begin, lessons, ranks, console)
        check_run(out, tools.identity, ranks)
        facts = _train(lessons, out, tools)
        if ranks.rank == 0:
            facts |= _finish(model, begin, out, kind, tools)
        return facts | {"memory": {**asdict(plan), "total": plan.total, "peak": peak_bytes()}}


def _begin(source: Source, out: Path, settings: QatSettings) -> _Begin:
    if settings.base is not None:
        file = open_model(settings.base)
        try:
            shape, metadata = base_shape(file, settings), tokenizer_metadata(file)
            return _Begin(shape, metadata, Renderer.open(settings.base), base_parameters(file), file.digest)
        finally:
            file.close()
    kept = out / VOCABULARY
    if settings.weights_from is not None and not has_checkpoint(out):
        _same_vocabulary(settings.weights_from / VOCABULARY, kept)
    if kept.exists():
        vocabulary = SmallVocabulary.load(kept)
    else:
        vocabulary = train_vocabulary((one for _, one in source.train()), settings.vocab_size)
        with whole(kept) as beside:
            vocabulary.save(beside)
    if len(vocabulary.tokens) != settings.vocab_size:
        raise TrainingError(
            f"{kept} has {len(vocabulary.tokens)} tokens, vocab_size is {settings.vocab_size}: use another folder"
        )
    metadata = {f"tokenizer.{key}": value for key, value in vocabulary.metadata().items()}
    return _Begin(made_shape(settings), metadata, vocabulary.renderer(), None, None)


def _same_vocabulary(theirs: Path, kept: Path) -> None:
    """A copy, or what is there already if it is one."""
    if not theirs.is_file():
        raise TrainingError(f"{theirs} is no file: weights_from takes the folder of a run from scratch")
    if kept.exists() and kept.read_bytes() != theirs.read_bytes():
        raise TrainingError(f"{kept} is another vocabulary than {theirs}: use another folder")
    with whole(kept) as beside:
        beside.write_bytes(theirs.read_bytes())


def _with_copying(lessons: Lessons, begin: _Begin, settings: QatSettings) -> Lessons:
    number = round(settings.copying * len(lessons.examples))
    if not number:
        return lessons
    copies = copying_examples(plain_tokens(begin.metadata, lessons.examples), number, seed=settings.seed)
    return replace(lessons, examples=lessons.examples + copies, difficulty=lessons.difficulty + [0.0] * number)


def _tools(
    model: QatModel, out: Path, settings: QatSettings, begin: _Begin, lessons: Lessons, ranks: Ranks, console: Console
) -> Tools:
    teacher, digests = None, {"data": lessons.digest}
    if begin.base_digest is not None:
        digests["base_digest"] = begin.base_digest
    if settings.teacher is not None:
        teacher = FileTeacher(settings.teacher, begin.shape.vocab_size, device=settings.device, dtype=_dtype(settings))
        digests["teacher_digest"] = teacher.digest
    say = console.say if ranks.rank == 0 else lambda text: None
    return Tools(
        model=model,
        settings=settings,
        teacher=teacher,
        ranks=ranks,
        metrics=Metrics(out / METRICS, say),
        identity={"shape": model.shape.as_json(), **digests} | settings.identity(),
        on_step=console.on_step,
    )


def _train(lessons: Lessons, out: Path, tools: Tools) -> dict[str, Any]:
    folder = out / CHECKPOINTS
    if tools.settings.curriculum:
        return run_curriculum(lessons, folder, tools)
    done = run_phase(Phase(folder, lessons.examples, lessons.held_out), tools)
    progress = done.result.progress
    return {
        "num_steps": progress.step,
        "num_tokens": progress.num_tokens,
        "stopped_early": done.result.stopped_early,
        "is_exact": done.result.is_exact,
        "best_step": progress.best_step,
        "held_out": None if done.held is None else {"loss": done.held.loss, "accuracy": done.held.accuracy},
    }


def _finish(model: QatModel, begin: _Begin, out: Path, kind: GGMLType, tools: Tools) -> dict[str, Any]:
    parameters = {name: tensor.detach().cpu() for name, tensor in model.parameters().items()}
    target = out / MODEL
    export_gguf(target, begin.shape, parameters, begin.metadata, matrix_type=kind, overwrite=True)
    lines = tools.metrics.lines()
    with whole(out / CURVE) as beside:
        beside.write_text(picture(lines, f"{begin.shape.name}: {begin.shape.num_parameters / 1e6:.1f} M parameters"))
    return {
        "object": "train.run",
        "model": str(target),
        "model_bytes": target.stat().st_size,
        "num_parameters": begin.shape.num_parameters,
        "curve": str(out / CURVE),
        "data_digest": tools.identity["data"],
    }


def _plan(model: QatModel, lessons: Lessons, settings: QatSettings) -> MemoryPlan:
    most = max(settings.micro_batch_tokens, *(len(one.token_ids) for one in lessons.examples))
    if settings.optimizer == "muon":
        torch.optim.Muon([torch.ones(1, 1, requires_grad=True)])  # imports torch._dynamo: 70 MB
    epoch = settings.model_copy(update={"epochs": 1.0})
    steps = phase_steps(Phase(Path(), lessons.examples, ()), epoch)  # its micro-batches: 100 MB of 80,000 examples
    num_steps = min(math.ceil(steps.num_steps * settings.epochs), settings.max_steps or sys.maxsize)
    # What is there by now holds the shadows, which the plan counts itself.
    process = max(peak_bytes() - 4 * model.shape.num_parameters, 0)
    is_muon = settings.optimizer == "muon"
    return plan_memory(model.shape, model.dtype, most, is_muon=is_muon, num_steps=num_steps, process_bytes=process)


def _opening(model: QatModel, lessons: Lessons, plan: MemoryPlan) -> str:
    parts = {name: f"{value / 2**20:,.0f}" for name, value in asdict(plan).items()}
    left_out = f", {lessons.num_too_long:,} too long" if lessons.num_too_long else ""
    return (
        f"{model.shape.num_parameters:,} parameters; {len(lessons.examples):,} examples"
        f" ({len(lessons.held_out):,} held out{left_out})\n"
        f"memory in MiB: {', '.join(f'{name} {value}' for name, value in parts.items())};"
        f" together {plan.total / 2**20:,.0f}"
    )


def _dtype(settings: QatSettings) -> torch.dtype:
    found: torch.dtype = getattr(torch, settings.dtype)
    return found
