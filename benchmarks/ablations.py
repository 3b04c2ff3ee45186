"""Which losses help: the base recipe beside each of those that are off by default, over seeds, on one snapshot.

    python -m benchmarks.ablations DATA_DIR/snapshots/tools/0f3c... [--model FILE] [--seeds 3] [--only dpo,sequence]
                                   [--set rank=8 --set epochs=2]

A fifth of the training side's clusters is measured on and never trained on; the split changes with the seed, and all
recipes of a seed have the same. Measured: the share of calls that greedy decoding gives token by token (the most likely
token is right at every place), the share of answers without one whose most likely first token begins none (there are
many ways to say no), their mean (balanced), and the loss per token. Each gain is paired by seed: its mean and 95 %
interval (t). A recipe is worth keeping when the whole interval is above 0. Not measured: serving, the gate. Ends with
one line of JSON.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune.config import FinetuneSettings
from finetune.dataset.examples import Lessons, snapshot_lessons
from finetune.dataset.order import shuffled
from finetune.dataset.snapshot import Snapshot
from finetune.model.allocator import keep_freed_memory
from finetune.model.model import TrainModel
from finetune.packed import Example
from finetune.rounds.adapter import Adapter
from finetune.rounds.references import reference_margins
from finetune.rounds.training import answer_losses, lora_spec, micro_batches, open_model, round_steps, train_settings
from finetune.train.loop import train
from server.config import DEFAULT_MODEL, Settings
from server.machine import physical_cores
from server.models.catalog import resolve_model

RECIPES: dict[str, dict[str, Any]] = {
    "base": {},
    "dpo": {"dpo_weight": 1.0},
    "sequence": {"sequence_weight": 1.0},
    "call head": {"call_head_weight": 0.1},
    "distrust": {"distrust": True},
}
MEASURED_SHARE = 0.2
METRICS = ("balanced", "call", "no_call", "loss")
T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
"""Of Student's t with 1, 2, ... degrees of freedom, two-sided."""
Scores = dict[str, float]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("snapshot", type=Path)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(RECIPES), help="recipes beside base")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of all recipes")
    parser.add_argument("--threads", type=int, default=physical_cores())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    snapshot = Snapshot.open(options.snapshot)
    model = resolve_model(options.model, Settings().cache_dir).path
    common = dict(one.split("=", 1) for one in options.set)
    names = ["base", *(name for name in RECIPES if name != "base" and name in options.only)]
    found: dict[str, list[Scores]] = {name: [] for name in names}
    for seed in range(options.seeds):
        for name in names:
            own = FinetuneSettings.model_validate({**common, **RECIPES[name], "seed": seed})
            found[name].append(run(snapshot, model, own))
            print(f"seed {seed}, {name}: {_text(found[name][-1])}", file=sys.stderr, flush=True)
    gains = {name: {metric: gain(found[name], found["base"], metric) for metric in METRICS} for name in names}
    print(table(found, gains))
    print(json.dumps({"snapshot": snapshot.digest, "seeds": options.seeds, "scores": found, "gains": gains}))


def run(snapshot: Snapshot, model: Path, own: FinetuneSettings) -> Scores:
    """Train one recipe with one seed, and measure it."""
    plain = snapshot_lessons(snapshot).examples
    measured = _measured(plain, own.seed)
    lessons = snapshot_lessons(snapshot, with_pairs=bool(own.dpo_weight), with_distrust=own.distrust)
    gone = {one.cluster for one in measured}
    lessons = Lessons(
        [one for one in lessons.examples if one.kl or one.cluster not in gone],
        [one for one in lessons.pairs if one.chosen.cluster not in gone],
    )
    if own.dpo_weight and not lessons.pairs:
        raise SystemExit("this snapshot has no corrections of served answers, so there is nothing for dpo")
    trained = open_model(model, lora_spec(own), own)
    try:
        trained.answer_losses = answer_losses(own)
        with tempfile.TemporaryDirectory() as folder:
            references = reference_margins(
                trained, lessons.pairs, Path(folder), micro_batch_tokens=own.micro_batch_tokens, pause=lambda: None
            )
            steps = round_steps(lessons, references, own)
            train(
                Adapter(trained),
                lambda step: micro_batches(steps(step), own, step),
                train_settings(own, steps.num_steps),
                Path(folder) / "checkpoints",
                identity={},
            )
        return _measure(trained, measured)
    finally:
        trained.close()


def _measured(examples: Sequence[Example], seed: int) -> list[Example]:
    clusters = sorted({one.cluster for one in examples if not one.kl})
    order = shuffled(clusters, seed=seed, epoch=0)
    chosen = {clusters[index] for index in order[: max(1, round(MEASURED_SHARE * len(clusters)))]}
    return [one for one in examples if not one.kl and one.cluster in chosen]


def _measure(model: TrainModel, examples: Sequence[Example]) -> Scores:
    right: dict[bool, list[bool]] = {True: [], False: []}
    beginnings = {int(one.token_ids[np.flatnonzero(one.weights)[0]]) for one in examples if one.is_call}
    losses: list[float] = []
    for one in examples:
        at = np.flatnonzero(one.weights)
        logits = model.logits(one.token_ids, at - 1)
        targets = torch.from_numpy(one.token_ids[at].astype(np.int64))
        losses += torch.nn.functional.cross_entropy(logits, targets, reduction="none").tolist()
        likely = logits.argmax(-1)
        right[bool(one.is_call)].append(
            bool((likely == targets).all()) if one.is_call else int(likely[0]) not in beginnings
        )
    if not right[True] or not right[False]:
        raise SystemExit("the measured part has answers of one kind only: calling and not calling cannot be balanced")
    call, no_call = (statistics.fmean(right[kind]) for kind in (True, False))
    return {
        "balanced": (call + no_call) / 2,
        "call": call,
        "no_call": no_call,
        "loss": statistics.fmean(losses),
        "num_examples": len(examples),
    }


def gain(found: Sequence[Scores], base: Sequence[Scores], metric: str) -> Mapping[str, float | None]:
    """Mean difference by seed, and half of its 95 % interval (None with one seed)."""
    differences = [one[metric] - other[metric] for one, other in zip(found, base, strict=True)]
    half = None
    if len(differences) > 1:
        t = T_95[len(differences) - 2] if len(differences) - 2 < len(T_95) else 1.96
        half = t * statistics.stdev(differences) / math.sqrt(len(differences))
    return {"mean": statistics.fmean(differences), "half_95": half}


def table(found: Mapping[str, Sequence[Scores]], gains: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    lines = ["recipe     " + "".join(f"{metric:>10}{'gain':>18}" for metric in METRICS)]
    for name, scores in found.items():
        cells = []
        for metric in METRICS:
            half = gains[name][metric]["half_95"]
            spread = "" if half is None else f" ±{half:.4f}"
            own = "" if name == "base" else f"{gains[name][metric]['mean']:+.4f}{spread}"
            cells.append(f"{statistics.fmean(one[metric] for one in scores):>10.4f}{own:>18}")
        lines.append(f"{name:<11}" + "".join(cells))
    return "\n".join(lines)


def _text(scores: Scores) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in scores.items())


if __name__ == "__main__":
    main()
