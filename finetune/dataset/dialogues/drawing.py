"""Random choices that are the same on every machine, and the values that fill the slots of a template.

Everything goes through `random.Random.random`, the one method whose sequence Python promises to keep. Values of two
digits or more and texts are divided by a digest of how they are written: one in eight is reserved, never used in
training, and used alone where fresh values are tested (`pool`).
"""

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from finetune.dataset.dialogues import wordlists
from finetune.dataset.dialogues.numerals import in_words, separated

T = TypeVar("T")
Pool = Literal["train", "fresh", "any"]
RESERVED_SHARE = 8
MAX_TRIES = 2000
"""One value in eight is reserved, so that a range of twenty numbers fails to have one in 7 of 100 cases, and then the
caller draws another template."""


class NoValueError(Exception):
    """The pool has no value in that range."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A value, and how the request writes it."""

    value: Any
    text: str


Slots = dict[str, Slot]


def is_reserved(written: str) -> bool:
    if len(written) < 2:
        return False
    digest = hashlib.blake2b(written.encode(), digest_size=8, person=b"reserved").digest()
    return int.from_bytes(digest, "big") % RESERVED_SHARE == 0


class Dice:
    """Choices drawn from the digest of a few labels."""

    def __init__(self, *labels: object) -> None:
        text = "\n".join(map(str, labels))
        self._random = random.Random(hashlib.blake2b(text.encode(), digest_size=16).hexdigest())

    def chance(self, share: float) -> bool:
        return self._random.random() < share

    def below(self, count: int) -> int:
        return int(self._random.random() * count)

    def between(self, low: int, high: int) -> int:
        """Both ends included."""
        return low + self.below(high - low + 1)

    def pick(self, values: Sequence[T]) -> T:
        return values[self.below(len(values))]

    def sample(self, values: Sequence[T], count: int) -> list[T]:
        rest = list(values)
        return [rest.pop(self.below(len(rest))) for _ in range(count)]

    def shuffled(self, values: Sequence[T]) -> list[T]:
        return self.sample(values, len(values))


class Drawer:
    """Draws the slots of one example."""

    def __init__(self, dice: Dice, words: Mapping[str, Sequence[str]], *, pool: Pool, written: bool = False) -> None:
        self.dice = dice
        self.words = words
        """The family's: "things", "person", ..."""
        self._pool = pool
        self._written = written
        self._quote = dice.pick(['"', '"', "'"])

    def integer(self, low: int, high: int) -> Slot:
        return self.fit(lambda: self._whole(low, high))

    def _whole(self, low: int, high: int) -> Slot:
        # A third of the values is small: people say 12 more often than 1,837.
        top = min(high, max(low + 20, high // 10)) if self.dice.chance(1 / 3) else high
        return self.number(self.dice.between(low, top))

    def decimal(self, low: int, high: int, places: int = 2) -> Slot:
        """Half of them are whole."""
        if self.dice.chance(0.5):
            return self.integer(low, high)
        return self.fit(lambda: self.fraction(low, high, self.dice.between(1, places)))

    def fraction(self, low: int, high: int, places: int) -> Slot:
        scale = 10**places
        units = self.dice.between(low * scale, high * scale)
        value = units / scale
        return self.number(int(value) if units % scale == 0 else value)

    def number(self, value: float) -> Slot:
        if self._written and isinstance(value, int):
            return Slot(value, in_words(value) if 0 <= value <= 12 else separated(value))
        return Slot(value, str(value))

    def numbers(self, low: int, high: int, at_least: int = 3, at_most: int = 6) -> Slot:
        places = self.dice.pick([0, 0, 1])
        make = (lambda: self.fraction(low, high, places)) if places else (lambda: self._plain_whole(low, high))
        values = [self.fit(make).value for _ in range(self.dice.between(at_least, at_most))]
        return Slot(values, listed([str(value) for value in values], self.dice))

    def _plain_whole(self, low: int, high: int) -> Slot:
        value = self.dice.between(low, high)
        return Slot(value, str(value))

    def text(self, make: Callable[[], str] | None = None) -> Slot:
        """A quoted text; by default a few words of the family's world."""
        return self.fit(lambda: self.quoted((make or self.phrase)()))

    def quoted(self, value: str) -> Slot:
        quote = '"' if "'" in value else self._quote
        return Slot(value, f"{quote}{value}{quote}")

    def phrase(self) -> str:
        return wordlists.phrase(self.dice, self.words)

    def word(self) -> str:
        return wordlists.word(self.dice)

    def word_list(self, at_least: int = 3, at_most: int = 5) -> Slot:
        def make() -> Slot:
            source = self.dice.pick([wordlists.NOUNS, wordlists.NAMES, wordlists.NOUNS])
            values = self.dice.sample(source, self.dice.between(at_least, at_most))
            if source is wordlists.NAMES:
                values[0] = wordlists.coined(self.dice)
            return Slot(values, listed(values, self.dice))

        return self.fit(make)

    def fit(self, make: Callable[[], Slot]) -> Slot:
        """Until the pool has it."""
        for _ in range(MAX_TRIES):
            slot = make()
            written = str(slot.value)
            if self._pool == "any" or len(written) < 2 or is_reserved(written) == (self._pool == "fresh"):
                return slot
        raise NoValueError


def listed(values: Sequence[str], dice: Dice) -> str:
    """In a sentence: "3, 5 and 8" or "3, 5, 8"."""
    if len(values) == 2 or (len(values) > 2 and dice.chance(0.6)):
        return f"{', '.join(values[:-1])} and {values[-1]}"
    return ", ".join(values)
