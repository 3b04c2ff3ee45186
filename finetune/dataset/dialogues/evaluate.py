"""A served model on a data set's held-out part: every turn asked through the API, greedily and unconstrained.

What comes back are the numbers of the model card: the model beside three baselines, by part. The requests are marked as
evaluations and kept out of the log.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from finetune.dataset.dialogues import scoring
from finetune.dataset.dialogues.baselines import NearestTemplate, always_call, never_call
from finetune.dataset.dialogues.examples import Turn
from finetune.dataset.dialogues.quality import read_manifest
from finetune.dataset.dialogues.verify import read_sound
from finetune.serving.api import ServerApi

MAX_ANSWER_TOKENS = 128
"""The longest answer of a set has about 90, thinking included; one that goes on is wrong anyway."""


def evaluate(
    folder: Path,
    api: ServerApi,
    *,
    model: str | None = None,
    limit: int | None = None,
    concurrency: int = 8,
    on_turn: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """`model`: as requests name it; None: the server's base. `limit`: dialogues of each part; None: all.

    Raises DialogueError for a set that cannot be read or judged, RefusedError and ServerDownError.
    """
    manifest = read_manifest(folder)
    held_out = scoring.sample(read_sound(folder / "held_out.jsonl"), limit)
    nearest = NearestTemplate(read_sound(folder / "train.jsonl"))
    name = model or api.base_name()
    fingerprints: set[str] = set()

    def ask(turn: Turn) -> scoring.Message:
        found = api.answer(name, turn.request, max_tokens=MAX_ANSWER_TOKENS)
        fingerprints.add(str(found["system_fingerprint"]))
        on_turn()
        message: scoring.Message = found["message"]
        return message

    with ThreadPoolExecutor(concurrency) as pool:
        scores = {"model": scoring.score(held_out, ask, map_turns=pool.map)}
    for baseline, responder in (("always_call", always_call), ("never_call", never_call), ("nearest", nearest)):
        scores[baseline] = scoring.score(held_out, responder)
    return {
        "model": name,
        "system_fingerprints": sorted(fingerprints),
        "dataset": manifest["digest"],
        "limit": limit,
        "num_dialogues": len(held_out),
        "scores": {side: scoring.body(one) for side, one in scores.items()},
    }
