"""Packed micro-batches for model tests: examples with prompts in common, as one forest, apart, or one by one."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from finetune.packed import Packed, Segment


@dataclass(frozen=True)
class Sample:
    """`prompt` (shared by name) and an answer of which every token carries loss."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    weight: float = 1.0
    kl: bool = False


def pack(samples: Sequence[Sample], *, share: bool) -> Packed:
    """All samples in one sequence; with `share`, equal prompts are laid out once."""
    ids: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    rows, targets, weights, kl = [], [], [], []
    prompts: dict[tuple[int, ...], int] = {}

    def lay(tokens: Sequence[int], first: int, parent: int) -> int:
        segments.append(Segment(len(ids), len(ids) + len(tokens), parent))
        ids.extend(tokens)
        positions.extend(range(first, first + len(tokens)))
        return len(segments) - 1

    for sample in samples:
        if not share or sample.prompt not in prompts:
            prompts[sample.prompt] = lay(sample.prompt, 0, -1)
        parent = prompts[sample.prompt]
        own = lay(sample.answer, len(sample.prompt), parent)
        sources = [segments[parent].end - 1, *range(segments[own].start, segments[own].end - 1)]
        rows += sources
        targets += sample.answer
        weights += [sample.weight] * len(sample.answer)
        kl += [sample.kl] * len(sample.answer)
    return Packed(
        token_ids=np.array(ids, np.int32),
        positions=np.array(positions, np.int32),
        segments=tuple(segments),
        loss_rows=np.array(rows, np.int32),
        loss_targets=np.array(targets, np.int32),
        loss_weights=np.array(weights, np.float32),
        loss_kl=np.array(kl, bool),
        num_examples=len(samples),
        num_real_tokens=sum(len(s.prompt) + len(s.answer) for s in samples),
    )


def plain(token_ids: Sequence[int], *, first_loss: int = 1) -> Packed:
    """One sequence; the tokens from `first_loss` on are predicted."""
    ids = np.array(token_ids, np.int32)
    rows = np.arange(first_loss - 1, len(ids) - 1, dtype=np.int32)
    return Packed(
        token_ids=ids,
        positions=np.arange(len(ids), dtype=np.int32),
        segments=(Segment(0, len(ids), -1),),
        loss_rows=rows,
        loss_targets=ids[rows + 1],
        loss_weights=np.ones(len(rows), np.float32),
        loss_kl=np.zeros(len(rows), bool),
        num_examples=1,
        num_real_tokens=len(ids),
    )


def some_samples(vocab_size: int = 384, *, kl: bool = False) -> list[Sample]:
    """Seven samples over three prompts; weights differ."""
    rng = np.random.default_rng(5)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(rng.integers(0, vocab_size, n).tolist())

    prompts = [tokens(9), tokens(4), tokens(13)]
    picks = [(0, 3), (0, 5), (1, 2), (0, 1), (2, 6), (1, 4), (2, 3)]
    return [
        Sample(prompts[prompt], tokens(length), weight=1 + 0.25 * i, kl=kl and i % 3 == 0)
        for i, (prompt, length) in enumerate(picks)
    ]
