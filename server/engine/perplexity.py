"""Perplexity of a text under a model: teacher-forced, by the same core that serves.

The text is cut into windows, each a sequence of its own from position 0, as llama.cpp's tool does it; the first token
of a window is not scored. Not covered: batching, adapters, sampling.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

import _sterna

WINDOW_TOKENS = 512


@dataclass(frozen=True)
class Perplexity:
    """`num_scored` tokens have a mean negative log-probability of log(value)."""

    value: float
    num_scored: int


def perplexity(
    core: "_sterna.Core",
    token_ids: Sequence[int],
    *,
    prefix_ids: Sequence[int] = (),
    window_tokens: int = WINDOW_TOKENS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Perplexity:
    """Over all windows of at most `window_tokens`, each after `prefix_ids` (BOS). Needs blocks for one window.

    `progress(done, total)` counts tokens. Raises ValueError for a text with nothing to score.
    """
    body = window_tokens - len(prefix_ids)
    assert body > 0, (window_tokens, prefix_ids)
    total, scored = 0.0, 0
    for start in range(0, len(token_ids), body):
        window = np.array([*prefix_ids, *token_ids[start : start + body]], np.int32)
        logprobs = window_logprobs(core, window)
        # After a BOS every token is predicted from something, without one all but the first.
        total += float(logprobs[max(len(prefix_ids) - 1, 0) :].sum(dtype=np.float64))
        scored += len(logprobs) - max(len(prefix_ids) - 1, 0)
        progress(min(start + body, len(token_ids)), len(token_ids))
    if scored == 0:
        raise ValueError(f"{len(token_ids)} tokens leave nothing to predict; two are the least")
    return Perplexity(math.exp(-total / scored), scored)


def window_logprobs(core: "_sterna.Core", ids: np.ndarray) -> np.ndarray:
    """float32 (T-1,): entry i is the log-probability of token i + 1 after those before it."""
    none, no_floats = np.empty(0, np.int32), np.empty(0, np.float32)
    core.set_sequence(0, none, none, 0.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0, 0, 0, none, no_floats, none, 0)
    rows = min(core.max_batch_tokens, core.max_logit_rows)
    table = np.arange(-(-len(ids) // core.block_size), dtype=np.int32)[None]
    result = np.empty(max(len(ids) - 1, 0), np.float32)
    for begin in range(0, len(result), rows):
        count = min(rows, len(result) - begin)
        minus = np.full(count, -1, np.int32)
        index = np.arange(count, dtype=np.int32)
        core.step(
            token_ids=ids[begin : begin + count],
            seq_starts=np.array([0, count], np.int32),
            seq_positions=np.array([begin], np.int32),
            block_tables=table,
            lora_slots=minus[:1],
            logit_rows=index,
            slots=np.zeros(count, np.int32),
            positions=begin + 1 + index,
            targets=ids[begin + 1 : begin + 1 + count],
            drafts=minus,
            num_top=np.zeros(count, np.int32),
            use_mask=np.zeros(count, np.uint8),
            out_tokens=np.empty(count, np.int32),
            out_logprobs=result[begin : begin + count],
            out_top_ids=np.empty((count, 20), np.int32),
            out_top_logprobs=np.empty((count, 20), np.float32),
        )
    return result
