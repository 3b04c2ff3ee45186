"""The same file's logits here and in llama.cpp, position by position."""

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quant.model_file import open_model
from server.engine.weights import load_core
from tests.server.engine.reference import core_logits
from tests.server.text.peer import PEER_PYTHON

PEER_SCRIPT = Path(__file__).parents[1] / "finetune" / "model" / "llamacpp_logits_peer.py"


@dataclass(frozen=True)
class Comparison:
    top1: float
    widest_gap: float
    """llama.cpp's between its two likeliest tokens, where the likeliest differ."""
    perplexities: tuple[float, float]
    """Ours, llama.cpp's."""
    positions: int


def our_logits(path: Path, texts: Sequence[np.ndarray]) -> list[np.ndarray]:
    core = load_core(open_model(path), isa="auto", num_threads=1, num_blocks=128, max_num_seqs=1, max_batch_tokens=64)
    return [np.concatenate(list(core_logits(core, ids))) for ids in texts]


def llamacpp_logits(model: Path, texts: Sequence[np.ndarray], output: Path) -> list[np.ndarray]:
    request = {"model": str(model), "loras": [None], "texts": [ids.tolist() for ids in texts], "output": str(output)}
    done = subprocess.run([PEER_PYTHON, str(PEER_SCRIPT)], input=json.dumps(request), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(output) as found:
        return [found[f"0/{i}"] for i in range(len(texts))]


def compare_logits(
    ours: Sequence[np.ndarray],
    theirs: Sequence[np.ndarray],
    texts: Sequence[np.ndarray],
    chosen: Sequence[np.ndarray] | None = None,
) -> Comparison:
    """`chosen`: of each text the positions that count [all]. The last one of a text has no token to predict."""
    counted = chosen or [np.arange(len(ids)) for ids in texts]
    a, b = (np.concatenate([one[at] for one, at in zip(side, counted, strict=True)]) for side in (ours, theirs))
    same = a.argmax(1) == b.argmax(1)
    top = np.partition(b, -2, axis=1)
    gaps = (top[:, -1] - top[:, -2])[~same]
    return Comparison(
        float(same.mean()),
        float(gaps.max(initial=0)),
        (perplexity(ours, texts, counted), perplexity(theirs, texts, counted)),
        len(a),
    )


def perplexity(logits: Sequence[np.ndarray], texts: Sequence[np.ndarray], counted: Sequence[np.ndarray]) -> float:
    losses = []
    for rows, ids, at in zip(logits, texts, counted, strict=True):
        at = at[at + 1 < len(ids)]
        wide = rows[at].astype(np.float64)
        highest = wide.max(1, keepdims=True)
        total = highest[:, 0] + np.log(np.exp(wide - highest).sum(1))
        losses.append(total - wide[np.arange(len(at)), ids[at + 1]])
    return float(np.exp(np.concatenate(losses).mean()))
