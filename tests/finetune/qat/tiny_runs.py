"""Runs of a second: settings and data."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.qat.config import QatSettings
from finetune.qat.run import Console

TINY: dict[str, Any] = {
    "vocab_size": 300,
    "intermediate_size": 256,
    "layers": 1,
    "context_length": 256,
    "max_steps": 6,
    "tokens_per_step": 200,
    "micro_batch_tokens": 256,
    "evaluate_every": 3,
    "log_every": 1,
    "checkpoint_every": 2,
    "threads": 1,
    "dtype": "float32",
    "epochs": 3.0,
}
BIRDS = ("tern", "gull", "heron", "auk", "crane", "swan", "owl", "kite")


def line(number: int) -> bytes:
    bird, other = BIRDS[number % 8], BIRDS[(number * 5 + 1) % 8]
    messages = [
        {"role": "user", "content": f"Say {bird} then {other}, number {number}."},
        {"role": "assistant", "content": f"{bird} {other}"},
    ]
    return json.dumps({"messages": messages}).encode() + b"\n"


def write_birds(path: Path, num_lines: int = 80) -> Path:
    path.write_bytes(b"".join(map(line, range(num_lines))))
    return path


def quiet(on_step: Callable[[int, int], None] = lambda step, num_steps: None) -> Console:
    return Console(lambda text: None, lambda text: None, on_step)


def tiny(**options: Any) -> QatSettings:
    return QatSettings(**{**TINY, **options})
