"""From a snapshot's rows to what the trainer reads: examples with a weight for every token, and preference pairs.

Loss falls on the answer only, its end of turn included; system, user and tool tokens and earlier turns have none (an
agent's earlier turns are traces of their own). The base's answers to the general prompts are marked for KL.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from finetune.dataset.distrust import doubts
from finetune.dataset.rows import ExampleRow
from finetune.dataset.snapshot import Snapshot
from finetune.dataset.token_classes import ClassWeights
from finetune.packed import Example, Preference


@dataclass(frozen=True)
class Lessons:
    """All that is trained on. The chosen answers of `pairs` are not among `examples`: a pair has their loss too."""

    examples: list[Example]
    pairs: list[Preference]


def snapshot_lessons(
    snapshot: Snapshot, weights: ClassWeights | None = None, *, with_pairs: bool = False, with_distrust: bool = False
) -> Lessons:
    """`with_pairs`: rows whose answer was corrected, and served with known tokens, become preference pairs."""
    doubted: Mapping[str, float] = {}
    if with_distrust:
        doubted = doubts(row for part in (snapshot.train, snapshot.replay) for row in part())
    lessons = Lessons([], [])
    for part in (snapshot.train, snapshot.replay):
        for row in part():
            one = example(row, weights, doubt=doubted.get(row.id, 1.0))
            if with_pairs and row.rejected_ids is not None:
                lessons.pairs.append(preference(row, one))
            else:
                lessons.examples.append(one)
    lessons.examples.extend(example(row, kl=True) for row in snapshot.general())
    return lessons


def example(row: ExampleRow, weights: ClassWeights | None = None, *, kl: bool = False, doubt: float = 1.0) -> Example:
    """`weights` by class of token; all 1 without."""
    table = (weights or ClassWeights()).table()
    answer = table[row.token_classes()] * np.float32(doubt)
    return Example(
        id=row.id,
        token_ids=np.array([*row.prompt_ids, *row.answer_ids], np.int32),
        weights=np.concatenate([np.zeros(len(row.prompt_ids), np.float32), answer]),
        cluster=row.cluster,
        kl=kl,
        is_call=None if row.kind == "chat" else row.kind == "call",
        doubt=doubt,
    )


def preference(row: ExampleRow, chosen: Example) -> Preference:
    """Of a row with rejected ids."""
    assert row.rejected_ids is not None
    return Preference(chosen, np.array([*row.prompt_ids, *row.rejected_ids], np.int32), len(row.prompt_ids))
