"""Packs preference pairs into micro-batches: both answers to a prompt in the same one, the prompt laid out once.

A pair's loss is no sum over tokens, so its two answers cannot be in different micro-batches. The chosen answer has its
own loss terms as any example has (the SFT term). Not here: the loss (finetune/model/answer_losses.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from finetune.dataset.order import shuffled
from finetune.dataset.packing import MIN_SHARED, Bin, Item, best_fit, chain_rows, lay_out
from finetune.packed import Example, Packed, Pairs, Preference


def pack_pairs(
    pairs: Sequence[Preference], max_tokens: int, references: Mapping[str, float], *, seed: int, epoch: int
) -> list[Packed]:
    """Of about `max_tokens` rows at most (a longer pair alone), in an order drawn from (seed, epoch).

    `references`: by the chosen example's id; those that are not in it are NaN.
    """
    items = [Item(_num_rows(pair), [index]) for index, pair in enumerate(pairs)]
    long = [item for item in items if item.num_rows > max_tokens]
    groups = best_fit([item for item in items if item.num_rows <= max_tokens], max_tokens) + long
    order = shuffled([f"pairs {number}" for number in range(len(groups))], seed=seed, epoch=epoch)
    return [_packed([pairs[index] for index in sorted(groups[number].members)], references) for number in order]


def _num_rows(pair: Preference) -> int:
    """At most: answers that begin alike may share more."""
    both = len(pair.chosen.token_ids) + len(pair.rejected_ids)
    return both - (pair.prompt_length if pair.prompt_length >= MIN_SHARED else 0)


def _packed(pairs: Sequence[Preference], references: Mapping[str, float]) -> Packed:
    examples: list[Example] = []
    for pair in pairs:
        nothing = np.zeros(len(pair.rejected_ids), np.float32)
        examples += [
            pair.chosen,
            Example(f"{pair.chosen.id}:rejected", pair.rejected_ids, nothing, pair.chosen.cluster),
        ]
    made: Bin = lay_out(examples, range(len(examples)))
    rows, targets, numbers, signs = [], [], [], []
    for place in made.placements:
        number, is_rejected = divmod(place.example, 2)
        ids = examples[place.example].token_ids
        at = np.arange(pairs[number].prompt_length, len(ids))
        rows.append(chain_rows(made.packed.segments, place.leaf)[at - 1])
        targets.append(ids[at])
        numbers.append(np.full(len(at), number))
        signs.append(np.full(len(at), -1 if is_rejected else 1))
    return replace(
        made.packed,
        num_examples=len(pairs),
        pairs=Pairs(
            ids=tuple(pair.chosen.id for pair in pairs),
            rows=np.concatenate(rows).astype(np.int32),
            targets=np.concatenate(targets).astype(np.int32),
            numbers=np.concatenate(numbers).astype(np.int32),
            signs=np.concatenate(signs).astype(np.int8),
            weights=np.array([pair.chosen.weights.sum(dtype="float64") / pair.chosen.doubt for pair in pairs]),
            references=np.array([references.get(pair.chosen.id, np.nan) for pair in pairs]),
        ),
    )
