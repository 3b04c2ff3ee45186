"""A finished run as a folder to ship: the model, its learning curve, and a card in which no number was typed by hand.

    OUT/model.gguf, OUT/curve.svg    the run's
    OUT/README.md                    commands, data digest, size, sha256, training, and the scores beside the baselines

Everything comes from the run's checkpoints, log and file, from the data set's manifest, and from what `sterna dataset
score --json` printed; that all three are of the same data, and the scores of this model, is checked. Not here: training
(run.py), asking the server (finetune/dataset/dialogues/evaluate.py).
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune.dataset.dialogues.generate import Options
from finetune.dataset.dialogues.quality import read_manifest
from finetune.dataset.dialogues.scoring import METRICS, NO_CALL, RIGHT_ARGUMENTS, RIGHT_TOOL, WELL_FORMED
from finetune.dataset.dialogues.vocabulary import SmallVocabulary
from finetune.dataset.render import Renderer
from finetune.errors import TrainingError
from finetune.qat.config import QatSettings
from finetune.qat.data import Source, lessons_digest
from finetune.qat.folder import CURVE, MODEL, VOCABULARY, whole
from finetune.qat.folder import METRICS as METRICS_FILE
from finetune.qat.metrics import Line, Metrics
from finetune.qat.picture import picture
from server.models.inspect import inspect_model

TARGETS = {RIGHT_TOOL: 0.95, RIGHT_ARGUMENTS: 0.85, NO_CALL: 0.90, WELL_FORMED: 0.99}
"""On the part "families": tools of the training set, in scenario families that training has not seen."""
PARTS = {
    "families": "seen tools, unseen families",
    "fresh_values": "seen templates, fresh values",
    "unseen_tools": "unseen tools",
    "renamed_tools": "seen tools, unseen names",
}
LIMITS = """\
- It knows the tools of its training set, in English, from requests of one or two sentences, with at most a few calls in
  sequence. How it does on tools that it never saw is in the table; better to train it on yours.
- It knows nothing about the world: questions that no tool answers get short answers of the kinds in its training data.
- What was measured is synthetic: request families, values, tools and names were held out, the generator was the same.
- Its calls are what the table says without constrained decoding. The server can also hold it to a schema
  (`tool_choice: "required"`), which makes every call well-formed and none of them right."""


def write_card(data: Path, run: Path, scores: Path, out: Path) -> None:
    """Raises TrainingError for a run, scores or data that do not belong together, DialogueError for a bad manifest."""
    found = _read_scores(scores)
    manifest = read_manifest(data)
    if found["dataset"] != manifest["digest"]:
        raise TrainingError(f"{scores} is of the data set {found['dataset']}, {data} is {manifest['digest']}")
    if not (run / MODEL).exists():
        raise TrainingError(f"{run} is no finished run of `sterna train`: it has no {MODEL}")
    stages = _read_stages(run)
    facts = inspect_model(run / MODEL)
    _check_data(stages[-1].state["identity"], data, run, facts["context_length"])
    ours = [facts["system_fingerprint"]]
    if found["system_fingerprints"] != ours:
        theirs = ", ".join(found["system_fingerprints"])
        raise TrainingError(f"{scores} is of the model {theirs}, {run / MODEL} is {ours[0]}: score this one")
    out.mkdir(parents=True, exist_ok=True)
    text = "\n".join(_card(out.resolve().name, manifest, stages, facts, run / MODEL, found))
    with whole(out / MODEL) as beside:
        shutil.copyfile(run / MODEL, beside)
    with whole(out / CURVE) as beside:
        beside.write_text(
            picture(_all_lines(stages), f"{facts['name']}: {facts['num_parameters'] / 1e6:.1f} M parameters")
        )
    with whole(out / "README.md") as beside:
        beside.write_text(text + "\n")


def train_flags(identity: Mapping[str, Any]) -> list[str]:
    """What `sterna train` was given beside its folders, as far as the result depends on it."""
    flags = []
    for name, field in QatSettings.model_fields.items():
        value = identity.get(name, field.default)
        if value == field.default:
            continue
        flag = name.replace("_", "-")
        flags.append(f"--{'' if value else 'no-'}{flag}" if isinstance(value, bool) else f"--{flag} {value}")
    return flags


def _read_scores(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        measured = found["scores"]["model"]["families"].keys()
        _ = found["dataset"], found["limit"], found["num_dialogues"], found["scores"]["nearest"]["families"]
        _ = ", ".join(found["system_fingerprints"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{path} is not what `sterna dataset score --json` prints: {error!r}") from error
    if missing := [_words(metric) for metric in TARGETS if metric not in measured]:
        raise TrainingError(f"{path} has no turn that measures {', '.join(missing)}: score more dialogues")
    return found


@dataclass(frozen=True)
class _Stage:
    """`state`: of the last checkpoint. Steps and tokens are those of all parts of a curriculum; lines up to there."""

    state: dict[str, Any]
    num_steps: int
    num_tokens: int
    lines: Sequence[Line]


def _read_stages(run: Path) -> list[_Stage]:
    """The run, after those that it has its weights from."""
    newest: dict[Path, Path] = {one.parent.parent: one for one in sorted(run.glob("checkpoints/**/step-*/state.json"))}
    if not newest:
        raise TrainingError(f"{run} is no run of `sterna train`: it has no checkpoint")
    states = [json.loads(path.read_text()) for path in newest.values()]
    num_steps = sum(one["progress"]["step"] for one in states)
    lines = [one for one in Metrics(run / METRICS_FILE, lambda text: None).lines() if one.step <= num_steps]
    before = states[-1]["identity"].get("weights_from")
    return [
        *(_read_stages(Path(before)) if before else []),
        _Stage(states[-1], num_steps, sum(one["progress"]["num_tokens"] for one in states), lines),
    ]


def _all_lines(stages: Sequence[_Stage]) -> list[Line]:
    if len(stages) == 1:
        return list(stages[0].lines)
    return [
        replace(one, stage=one.stage or f"run {number}")
        for number, stage in enumerate(stages, 1)
        for one in stage.lines
    ]


def _check_data(identity: Mapping[str, Any], data: Path, run: Path, context_length: int) -> None:
    base = identity.get("base")
    renderer = SmallVocabulary.load(run / VOCABULARY).renderer() if base is None else Renderer.open(Path(base))
    digest = lessons_digest(Source(data), renderer, min(context_length, identity["micro_batch_tokens"]))
    if digest != identity["data"]:
        raise TrainingError(f"{run} was trained on other data ({identity['data']}) than {data} ({digest})")


def _card(
    name: str,
    manifest: Mapping[str, Any],
    stages: Sequence[_Stage],
    facts: Mapping[str, Any],
    model: Path,
    scores: Mapping[str, Any],
) -> Iterator[str]:
    yield f"# {name}\n"
    yield f"A tool-calling model of {facts['num_parameters'] / 1e6:.1f} million parameters with ternary weights: every"
    yield f"matrix of its layers holds -1, 0 and 1 times a scale. `sterna serve models/{name}` serves it, and any"
    yield "llama.cpp that knows its types loads it.\n"
    yield f"![Learning curve]({CURVE})\n\n## What it reaches\n"
    yield from _score_tables(manifest, scores)
    yield "\n## What it is\n"
    yield from _table(("", ""), _facts(manifest, stages, facts, model))
    yield "\n## How it was made\n\n```console"
    defaults = Options()
    options = manifest["options"]
    flags = [f"--{key} {options[key]}" for key in ("templates", "seed", "renamed")]
    flags += ["--thinking"] if options["thinking"] != defaults.thinking else []
    yield f"$ sterna dataset generate ./dialogues {' '.join(flags)}"
    yield "$ sterna dataset report ./dialogues"
    yield from _train_commands(stages, facts)
    yield "$ sterna serve ./nano"
    limit = "" if scores["limit"] is None else f" --limit {scores['limit']}"
    yield f"$ sterna dataset score ./dialogues{limit} --json > scores.json"
    yield f"$ sterna dataset card ./dialogues ./nano models/{name} --scores scores.json\n```"
    yield "\n## Limits\n"
    yield LIMITS
    yield "\nApache-2.0, as the project."


def _train_commands(stages: Sequence[_Stage], facts: Mapping[str, Any]) -> Iterator[str]:
    kinds = {one["type"] for one in facts["tensor_types"]}
    for number, stage in enumerate(stages, 1):
        identity, machine = dict(stage.state["identity"]), stage.state["machine"]
        if number > 1:
            identity["weights_from"] = f"./nano-{number - 1}"
        flags = train_flags(identity)
        command = "sterna train"
        if (num_processes := machine.get("num_processes", 1)) > 1:
            command = f"torchrun --no-python --nproc-per-node={num_processes} {command}"
        flags.append(f"--threads {machine['num_threads']}")
        if number == len(stages) and "TQ1_0" in kinds:
            flags.append("--type tq1_0")
        folder = "./nano" if number == len(stages) else f"./nano-{number}"
        yield f"$ {command} ./dialogues {folder} {' '.join(flags)}"


def _score_tables(manifest: Mapping[str, Any], scores: Mapping[str, Any]) -> Iterator[str]:
    num_held_out = manifest["files"]["held_out.jsonl"]["rows"]
    yield f"On {scores['num_dialogues']:,} of {num_held_out:,} held-out dialogues, every turn with the right history,"
    yield "greedily and without constrained decoding. The targets hold for seen tools in unseen families.\n"
    sides = scores["scores"]
    families = sides["model"]["families"]
    yield from _table(
        ("seen tools, unseen families", "target", "reached", ""),
        [
            (_words(metric), f"{target:.0%}", f"{families[metric]['share']:.1%}",
             "met" if families[metric]["share"] >= target else "missed")
            for metric, target in TARGETS.items()
        ],
    )  # fmt: skip
    yield "\nBeside rules that learn nothing: a call to every request (to the tool that shares most words with it), no"
    yield "call ever, and the call of the nearest training example. Intervals are 95 %, with templates as clusters.\n"
    yield from _table(
        ("part", "metric", "turns", "model", "95 %", "always call", "never call", "nearest"),
        [
            (label, _words(metric), f"{one['num']:,}",
             f"{one['share']:.1%}", f"{one['lower']:.1%} - {one['upper']:.1%}",
             *(f"{sides[side][part][metric]['share']:.1%}" for side in ("always_call", "never_call", "nearest")))
            for part, label in PARTS.items()
            for metric in METRICS
            if (one := sides["model"].get(part, {}).get(metric))
        ],
    )  # fmt: skip
    yield '\n"Stops": no further call after the answer of a tool that ends the dialogue.'


def _facts(
    manifest: Mapping[str, Any],
    stages: Sequence[_Stage],
    facts: Mapping[str, Any],
    model: Path,
) -> Iterator[tuple[str, str]]:
    state, lines = stages[-1].state, stages[-1].lines
    identity, machine = state["identity"], state["machine"]
    types = ", ".join(f"{one['type']} ({one['bytes']:,} bytes)" for one in facts["tensor_types"])
    hours = sum(one.num_tokens / one.tokens_per_second for stage in stages for one in stage.lines) / 3600
    num_steps, num_tokens = (sum(getattr(one, name) for one in stages) for name in ("num_steps", "num_tokens"))
    best = state["progress"]["best_step"]
    held = next((one for one in reversed(lines) if one.step == best and one.held_out_loss is not None), None)
    yield "parameters", f"{facts['num_parameters']:,}"
    yield (
        "architecture",
        (
            f"{facts['architecture']}: {facts['num_layers']} layers, hidden {facts['hidden_size']}, feed-forward"
            f" {facts['intermediate_size']}, {facts['num_heads']} heads, {facts['num_kv_heads']} KV heads, context"
            f" {facts['context_length']:,}, vocabulary {facts['vocab_size']:,}"
        ),
    )
    yield "weights", types
    yield "activations", "int8 with a scale for each 32"
    yield "file", f"{model.stat().st_size:,} bytes"
    yield "sha256", f"`{hashlib.sha256(model.read_bytes()).hexdigest()}`"
    yield (
        "training",
        (
            f"{num_steps:,} steps, {num_tokens:,} tokens of {identity['examples']:,} examples, {hours:.1f} hours on"
            f" {machine.get('num_processes', 1)} process(es) of {machine['num_threads']} thread(s)"
            f" ({machine['cpu']}, torch {machine['torch']})"
        ),
    )
    if held is not None:
        yield (
            "validation",
            f"loss {held.held_out_loss:.4f}, {held.held_out_accuracy:.1%} of the tokens, at step {best:,}",
        )
    rows = ", ".join(f"{name} {one['rows']:,}" for name, one in manifest["files"].items())
    yield "data", f"`{manifest['digest']}` ({rows})"
    yield "licence", "Apache-2.0"


def _table(heads: Sequence[str], rows: "Iterator[tuple[str, ...]] | Sequence[tuple[str, ...]]") -> Iterator[str]:
    for row in (heads, ["---"] * len(heads), *rows):
        yield f"| {' | '.join(row)} |"


def _words(name: str) -> str:
    return name.replace("_", " ")
