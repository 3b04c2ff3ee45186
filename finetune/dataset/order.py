"""In which order examples are learned: shuffled anew every epoch, or from easy to hard.

Drawn from digests of (seed, epoch, id), not from a generator's state: the same on every machine and library version,
and an example's place does not depend on how many others were drawn before it. Not here: packing (packing.py).
"""

import hashlib
from collections.abc import Sequence

from finetune.packed import Example

NUM_STAGES = 8
"""A curriculum goes up in so many steps of difficulty, shuffled within each: a strict sort would put all examples of
one length, which is often one tool, next to each other."""


def shuffled(ids: Sequence[str], *, seed: int, epoch: int) -> list[int]:
    """A permutation of the indices of `ids`."""

    def draw(index: int) -> tuple[bytes, int]:
        text = f"{seed}\n{epoch}\n{ids[index]}".encode()
        return hashlib.blake2b(text, digest_size=16, person=b"order").digest(), index

    return sorted(range(len(ids)), key=draw)


def curriculum(difficulty: Sequence[float], ids: Sequence[str], *, seed: int, epoch: int) -> list[int]:
    """Indices from easy to hard in `NUM_STAGES` stages, shuffled within each stage."""
    assert len(difficulty) == len(ids)
    ranked = sorted(range(len(ids)), key=lambda index: (difficulty[index], ids[index]))
    size = -(-len(ids) // NUM_STAGES) or 1
    order = []
    for first in range(0, len(ranked), size):
        stage = ranked[first : first + size]
        order += [stage[i] for i in shuffled([ids[index] for index in stage], seed=seed, epoch=epoch)]
    return order


def difficulty(examples: Sequence[Example], base_losses: Sequence[float] | None = None) -> list[float]:
    """The base's loss per weighted token where it is known; the number of trained tokens otherwise."""
    if base_losses is not None:
        assert len(base_losses) == len(examples)
        return list(base_losses)
    return [float((one.weights > 0).sum()) for one in examples]
