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
    is_call: bool | None = None  # whether the answer calls a tool; None: none was offered
    doubt: float = 1.0  # what `weights` were multiplied by (finetune/dataset/distrust.py)


@dataclass(frozen=True)
class Preference:
    """One prompt, the answer that is right (with its loss weights) and the one that was served."""

    chosen: Example
    rejected_ids: NDArray[np.int32]  # prompt and answer, end-of-turn included
    prompt_length: int


@dataclass(frozen=True)
class Answers:
    """Which loss terms of a micro-batch are one example's answer, for losses of whole answers. E examples."""

    spans: NDArray[np.int32]  # [E, 2]: loss terms [start, end), in the answer's order
    is_call: NDArray[np.int8]  # [E]: 1: a call; 0: none, though tools were offered; -1: no tools, or a KL example
    doubts: NDArray[np.float32]  # [E]


@dataclass(frozen=True)
class Pairs:
    """Preference pairs of a micro-batch: M tokens of both answers of P pairs, beside the loss terms."""

    ids: tuple[str, ...]  # [P]
    rows: NDArray[np.int32]  # [M]
    targets: NDArray[np.int32]  # [M]
    numbers: NDArray[np.int32]  # [M]: which pair
    signs: NDArray[np.int8]  # [M]: 1 in a chosen answer, -1 in a rejected one
    weights: NDArray[np.float64]  # [P]: the loss weight of the chosen answer
    references: NDArray[np.float64]  # [P]: log p(chosen) - log p(rejected) before training; NaN: not known yet


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
    answers: Answers | None = None  # None: made without it, for what needs none
    pairs: Pairs | None = None
