"""From a snapshot's rows to what the trainer reads: examples with a weight for every token, and preference pairs.

Loss falls on the answer only, its end of turn included; system, user and tool tokens and earlier turns have none (an
agent's earlier turns are traces of their own). The base's answers to the general prompts are marked for KL.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finetune.dataset.rows import ExampleRow
from finetune.dataset.snapshot import Snapshot
from finetune.dataset.token_classes import ClassWeights
from finetune.packed import Example


@dataclass(frozen=True)
class PreferencePair:
    """One prompt, the answer that is right and the one that was served."""

    id: str
    cluster: str
    prompt_ids: NDArray[np.int32]
    chosen_ids: NDArray[np.int32]
    rejected_ids: NDArray[np.int32]


def snapshot_examples(snapshot: Snapshot, weights: ClassWeights | None = None) -> Iterator[Example]:
    """All that is trained on: new, replayed, general."""
    for row in (*snapshot.train(), *snapshot.replay()):
        yield example(row, weights)
    for row in snapshot.general():
        yield example(row, kl=True)


def example(row: ExampleRow, weights: ClassWeights | None = None, *, kl: bool = False) -> Example:
    """`weights` by class of token; all 1 without."""
    table = (weights or ClassWeights()).table()
    answer = table[row.token_classes()]
    return Example(
        id=row.id,
        token_ids=np.array([*row.prompt_ids, *row.answer_ids], np.int32),
        weights=np.concatenate([np.zeros(len(row.prompt_ids), np.float32), answer]),
        cluster=row.cluster,
        kl=kl,
    )


def preference_pairs(rows: Iterable[ExampleRow]) -> Iterator[PreferencePair]:
    """Of the rows whose answer was corrected and served with known tokens."""
    for row in rows:
        if row.rejected_ids is not None:
            ids = (np.array(one, np.int32) for one in (row.prompt_ids, row.answer_ids, row.rejected_ids))
            yield PreferencePair(row.id, row.cluster, *ids)
