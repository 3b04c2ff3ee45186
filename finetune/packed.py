"""Training data as plain arrays: one tokenized example, and one packed micro-batch of examples that share prompts.

The datasets (`finetune/dataset/`) make these, the trainer reads them; neither knows the other. Nothing here
tokenizes, chooses or computes. Shapes: L tokens of an example, T rows of a packed sequence, N loss terms.

The loss of an optimizer step is sum(weight * cross-entropy) / sum(weights over ALL micro-batches and ranks of
the step), so the denominator is known before the first micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Example:
    """One training example, tokenized by the server's own template and tokenizer."""

    id: str  # the trace's id (with its choice), or "replay:..." / "general:..."
    token_ids: NDArray[np.int32]  # [L]: prompt and answer, end-of-turn included
    # float32 [L]: weights[t] is the loss weight of PREDICTING token t: 0 on everything but assistant tokens
    weights: NDArray[np.float32]  # weights[0] == 0: nothing predicts the first token
    cluster: str  # the episode cluster: the unit of statistics and of splits
    kl: bool = False  # a general or replayed example: KL to the base instead of cross-entropy


@dataclass(frozen=True)
class Segment:
    """A run of tokens laid out once: it attends causally to itself and fully to its ancestors."""

    start: int  # rows [start, end) of the packed sequence
    end: int
    parent: int  # the parent segment's index, -1: none


@dataclass(frozen=True)
class Packed:
    """One micro-batch: a forest of segments in one row of tokens."""

    token_ids: NDArray[np.int32]  # [T]
    positions: NDArray[np.int32]  # [T]: a branch goes on at the length of its prefix
    segments: tuple[Segment, ...]  # parents before children, in row order
    loss_rows: NDArray[np.int32]  # [N]: the row whose logits predict the target (a shared prompt's last row: several)
    loss_targets: NDArray[np.int32]  # [N]
    loss_weights: NDArray[np.float32]  # [N]
    loss_kl: NDArray[np.bool_]  # [N]
    num_examples: int
    num_real_tokens: int  # a shared prefix counted once per example
