"""Which micro-batches make up which optimizer step, for all epochs of a round; the same whenever it is asked.

An epoch's examples are packed into micro-batches in an order drawn from (seed, epoch), and consecutive micro-batches
form a step of about so many real tokens. An epoch is packed when a step of it is wanted and kept until another one is.
"""

import bisect
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from finetune.dataset.order import curriculum, difficulty, shuffled
from finetune.dataset.packing import pack
from finetune.dataset.pairs import pack_pairs
from finetune.packed import Example, Packed, Preference

CURRICULUM_WINDOW = 128
"""Examples packed together when their order matters: fewer share prompts, more lose the order."""


LAYOUT = 2
"""Another number whenever equal examples and settings come in other steps: a run is resumed with its own only."""


class Steps:
    def __init__(
        self,
        examples: Sequence[Example],
        *,
        seed: int,
        epochs: float,
        micro_batch_tokens: int,
        tokens_per_step: int,
        max_steps: int | None = None,
        is_curriculum: bool = False,
        pairs: Sequence[Preference] = (),
        references: Mapping[str, float] | None = None,
        window: int | None = None,
        num_sides: int = 1,
    ) -> None:
        """A micro-batch is longer where an example is: it and those that share its prompt. `references`: of the pairs,
        by id. `window`: dialogues in a drawn order, so many examples packed together; None: all, which shares most rows
        and makes micro-batches of examples that begin alike. Rounds take None: half a micro-batch holds three traces
        with tools, a call and a refusal of one tool set among them, and a window of 64 computes 28 % more rows for
        steps that are less alike (docs/loop.md). `num_sides`: so many micro-batches of like length are computed beside
        each other, and come in one step. Drawn one by one, of those of 512 rows 39 % would have nothing beside them."""
        self._examples = examples
        self._pairs, self._references = pairs, references or {}
        self._seed = seed
        self._micro_batch_tokens = micro_batch_tokens
        self._tokens_per_step = tokens_per_step
        self._is_curriculum = is_curriculum
        self._window = window
        self._num_sides = num_sides
        self._packed: tuple[int, list[list[Packed]]] = (-1, [])
        counts = [len(self._epoch(number)) for number in range(math.ceil(epochs))]
        if epochs % 1:
            counts[-1] = math.ceil(counts[-1] * (epochs % 1))
        self._ends = list(itertools.accumulate(counts))
        self.num_steps = min(self._ends[-1], max_steps or self._ends[-1])

    def __call__(self, step: int) -> list[Packed]:
        """The micro-batches of step 0, 1, ..."""
        number = bisect.bisect_right(self._ends, step)
        return self._epoch(number)[step - (self._ends[number - 1] if number else 0)]

    def _epoch(self, number: int) -> list[list[Packed]]:
        if self._packed[0] != number:
            self._packed = (number, self._pack(number))
        return self._packed[1]

    def _pack(self, epoch: int) -> list[list[Packed]]:
        steps: list[list[Packed]] = [[]]
        num_tokens = 0
        for group in self._in_order(epoch) if self._is_curriculum else self._mixed(epoch):
            if num_tokens >= self._tokens_per_step:
                steps.append([])
                num_tokens = 0
            steps[-1] += group
            num_tokens += sum(one.num_real_tokens for one in group)
        if len(steps) > 1 and num_tokens < self._tokens_per_step / 2:  # a step of a few tokens is noise
            last = steps.pop()  # not `steps[-2] += steps.pop()`, which stores into what is then another step
            steps[-1] += last
        return [normalized(step) for step in steps]

    def _mixed(self, epoch: int) -> list[list[Packed]]:
        limit = self._micro_batch_tokens
        long = [one for one in self._examples if len(one.token_ids) > limit]
        short = [one for one in self._examples if len(one.token_ids) <= limit]
        if self._window is not None:
            short = self._by_dialogue(short, epoch)
        packed = pack(short, limit, seed=self._seed, epoch=epoch, window=self._window)
        if long:  # runs of an agent share a prompt that may be longer than a micro-batch: there is room for their ends
            packed += pack(long, max(len(one.token_ids) for one in long) + limit, seed=self._seed, epoch=epoch)
        packed += self._packed_pairs(epoch)
        groups = self._groups(packed, epoch)
        order = shuffled([f"micro-batch {number}" for number in range(len(groups))], seed=self._seed, epoch=epoch)
        return _evenly([groups[index] for index in order])

    def _groups(self, packed: Sequence[Packed], epoch: int) -> list[list[Packed]]:
        """Of `num_sides` micro-batches, as many rows together as they may have. Of like length, not by length: else
        they had the same partners in every epoch."""
        if self._num_sides == 1:
            return [[one] for one in packed]
        order = shuffled([f"row {number}" for number in range(len(packed))], seed=self._seed, epoch=epoch)
        alike = max(self._micro_batch_tokens // 8, 1)
        groups: list[list[Packed]] = []
        room = 0
        for one in sorted((packed[index] for index in order), key=lambda one: -(len(one.token_ids) // alike)):
            if not groups or len(groups[-1]) == self._num_sides or len(one.token_ids) > room:
                groups.append([])
                room = self._num_sides * self._micro_batch_tokens
            groups[-1].append(one)
            room -= len(one.token_ids)
        return groups

    def _by_dialogue(self, examples: Sequence[Example], epoch: int) -> list[Example]:
        """In a drawn order, a dialogue's turns ("name:0", "name:1") together."""
        dialogues: dict[str, list[Example]] = {}
        for one in examples:
            dialogues.setdefault(one.id.rpartition(":")[0], []).append(one)
        turns = list(dialogues.values())
        return [one for place in shuffled(list(dialogues), seed=self._seed, epoch=epoch) for one in turns[place]]

    def _in_order(self, epoch: int) -> list[list[Packed]]:
        ids = [one.id for one in self._examples]
        order = curriculum(difficulty(self._examples), ids, seed=self._seed, epoch=epoch)
        limit = max(self._micro_batch_tokens, *(len(one.token_ids) for one in self._examples), 1)
        examples = [self._examples[index] for index in order]
        packed = pack(examples, limit, seed=self._seed, epoch=epoch, window=CURRICULUM_WINDOW)
        packed += self._packed_pairs(epoch)  # last: telling right from nearly right is the hardest
        return [packed[at : at + self._num_sides] for at in range(0, len(packed), self._num_sides)]

    def _packed_pairs(self, epoch: int) -> list[Packed]:
        return pack_pairs(self._pairs, self._micro_batch_tokens, self._references, seed=self._seed, epoch=epoch)


def normalized(step: Sequence[Packed]) -> list[Packed]:
    """Where examples were weighted by distrust: so that the step's cross-entropy weighs what it would without."""
    if all(one.answers is None or (one.answers.doubts == 1).all() for one in step):
        return list(step)
    doubted = plain = 0.0
    for one in step:
        assert one.answers is not None
        for (start, end), doubt in zip(one.answers.spans.tolist(), one.answers.doubts.tolist(), strict=True):
            weight = float(one.loss_weights[start:end][~one.loss_kl[start:end]].sum(dtype="float64"))
            doubted += weight
            plain += weight / doubt
    scale = np.float32(plain / doubted) if doubted else np.float32(1)
    return [
        replace(one, loss_weights=np.where(one.loss_kl, one.loss_weights, one.loss_weights * scale)) for one in step
    ]


def _evenly(groups: Sequence[list[Packed]]) -> list[list[Packed]]:
    """What is mostly KL spread among the others, one of the others first: steps are alike then, and the loss of the
    first one, by which a loss that runs away is told, is no KL at the base (which is 0)."""
    is_kl = [_is_mostly_kl(group) for group in groups]
    num_kl, num_ce = sum(is_kl), len(groups) - sum(is_kl)
    places: list[float] = []
    seen = [0, 0]
    for kl in is_kl:
        places.append((seen[1] + 1) / num_kl if kl else seen[0] / num_ce)
        seen[kl] += 1
    return [groups[index] for index in sorted(range(len(groups)), key=lambda index: (places[index], index))]


def _is_mostly_kl(group: Sequence[Packed]) -> bool:
    """By loss weight."""
    kl = sum(float(one.loss_weights[one.loss_kl].sum()) for one in group)
    return kl > sum(float(one.loss_weights.sum()) for one in group) / 2
